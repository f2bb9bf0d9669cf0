"""Evaluates a model on the prompt sets of a recipe: `evaluation.json`, `evaluation.html` and a table."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich.table import Table

from jax_backtrack.data import prompt_sets
from jax_backtrack.data.prompt_sets import Question
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.evaluation import evaluation, perplexity, win_rate
from jax_backtrack.evaluation.asked import Condition, ask, has_reset_word_leak
from jax_backtrack.evaluation.attacks.gcg import Attack, Objective, Settings
from jax_backtrack.evaluation.evaluation import EVALUATION, Evaluation
from jax_backtrack.evaluation.judges import fitted
from jax_backtrack.evaluation.judges.judge import Judge
from jax_backtrack.evaluation.judges.llama_guard import LlamaGuard
from jax_backtrack.evaluation.judges.refusals import Refusals
from jax_backtrack.evaluation.reports import page
from jax_backtrack.evaluation.reports.cells import HEADINGS, LENGTHS, cell, in_line
from jax_backtrack.evaluation.win_rate import NOT_JUDGED, WinRates
from jax_backtrack.hub.load import load
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.utils.console import bold, console, progress_bar, share_bar
from jax_backtrack.utils.resume_cache import ResumeCache, key_of, resume_cache_of
from jax_backtrack.utils.tables import add_figures, add_names, fits, new_table
from jax_backtrack.utils.workdir import atomic_write

SYSTEM_ATTACK = "system prompt"
_IN_A_LINE = "reset_word_leak"  # the measure that stands below a table which is too narrow for it


def read_sets(config: ConfigDict) -> list[tuple[str, bool, list[Question]]]:
    """Name, whether it is harmful, and questions of every set of the recipe. Nothing is sampled before all are read."""
    limit = config.evaluate.limit or None
    read = []
    for harmful, entries in ((True, config.evaluate.harmful), (False, config.evaluate.harmless)):
        for entry in entries:
            name, questions = prompt_sets.read(entry, harmful, limit)
            read.append((name, harmful, questions))
    return read


def make_judge(name: str) -> Judge:
    """The judge of this name: "refusals", or the path or Hub id of a Llama Guard, or the folder of a fitted judge."""
    if name == Refusals.name:
        return Refusals()
    if "/" not in name and not Path(name).exists():
        raise InputError(
            f"evaluate.judge is {name!r}: {nearest(name, [Refusals.name])}, or the path of a Llama Guard, or the "
            "workdir of --mode=fit-judge"
        )
    if fitted.is_fitted(name):
        return fitted.FittedJudge.load(name)
    with share_bar(f"loading judge {name[-32:]}") as progress:
        return LlamaGuard(*load(name, dtype="bfloat16", progress=progress))


def evaluate_sets(config: ConfigDict, sampler: Sampler, judge: Judge, sets, model: str, workdir: Path) -> Evaluation:
    """Asks every set in all conditions of the recipe, and measures the perplexity of what it held out."""
    settings = config.evaluate
    asked = []
    with resume_cache_of(workdir / EVALUATION) as resume_cache:
        for name, harmful, questions in sets:
            for condition, chosen in _conditions(config, sampler, name, harmful, questions, resume_cache):
                asked.append(
                    ask(
                        sampler,
                        judge,
                        name,
                        chosen,
                        harmful=harmful,
                        condition=condition,
                        samples=settings.samples,
                        seed=config.sample.seed,
                        resume_cache=resume_cache,
                    )
                )
        found = Evaluation(tuple(asked), perplexity.held_out_perplexity(config, sampler.model, sampler.tokenizer))
        evaluation.write({model: found}, judge.name, workdir / EVALUATION)
    page.write({model: found}, judge.name, workdir / "evaluation.html", settings.false_resets)
    show({model: found}, judge.name)
    console.print(f"replies and page in {bold(workdir)}: evaluation.json, evaluation.html", highlight=False)
    return found


def _conditions(
    config: ConfigDict, sampler: Sampler, name: str, harmful: bool, questions: list[Question], resume_cache: ResumeCache
) -> Iterator[tuple[Condition, list[Question]]]:
    """Every condition of a set with its questions: prefilling and attacks of harmful ones, and the trade-off's biases
    of the harmless ones and of the hardest prefilling."""
    settings = config.evaluate
    with_target = [question for question in questions if question.target]
    prefills = [0, *settings.prefill] if harmful and with_target else [0]
    asked_of = {prefill: with_target if prefill else questions for prefill in prefills}
    for prefill, chosen in asked_of.items():
        yield Condition(prefill), chosen
        if harmful and settings.without_resets:
            yield Condition(prefill, resets=False), chosen
        if harmful and settings.system_attack:
            attacked = [question.with_system(settings.system_attack) for question in chosen]
            yield Condition(prefill, SYSTEM_ATTACK), attacked
    if harmful and with_target and settings.gcg_steps:
        yield Condition(attack=_attack_name(config)), _attacked(config, sampler, name, with_target, resume_cache)
    hardest = max(prefills)
    for bias in settings.reset_biases:
        yield Condition(hardest, reset_bias=bias), asked_of[hardest]


def _attack_name(config: ConfigDict) -> str:
    return "adaptive GCG" if config.evaluate.gcg_reset_weight else "GCG"


def _attacked(
    config: ConfigDict, sampler: Sampler, name: str, questions: Sequence[Question], resume_cache: ResumeCache
) -> list[Question]:
    """The questions with the suffixes that GCG finds against the sampler's model. Each is kept in the resume cache."""
    settings = config.evaluate
    search = Settings(
        steps=settings.gcg_steps,
        width=settings.gcg_width,
        seed=config.sample.seed,
    )
    attacked = []
    with progress_bar(f"{_attack_name(config)} on {name}", len(questions) * settings.gcg_steps) as advance:
        for question in questions:
            objective = Objective.of(sampler.tokenizer, question.messages, question.target, settings.gcg_reset_weight)
            key = key_of(sampler.weights_hash, dataclasses.asdict(objective), dataclasses.asdict(search))
            if (suffix := resume_cache.get(key)) is None:
                best = None
                for step in Attack(sampler.model, sampler.tokenizer, objective, search).run():
                    best = step if best is None or step.loss < best.loss else best
                    advance(note=f"loss {best.loss:.2f}")
                suffix = sampler.tokenizer.decode(best.suffix)
                resume_cache.add(key, suffix)
            else:
                advance(settings.gcg_steps)
            attacked.append(question.with_suffix(suffix))
    return attacked


def show(models: dict[str, Evaluation], judge: str, win_rates: WinRates = NOT_JUDGED) -> None:
    """Prints one table: a row for each model, set and condition. Where the terminal is too narrow it has no lengths;
    where that is not enough, a line for each model counts what would be in the column of leaks."""
    names = [name for name in HEADINGS if name != "won" or win_rates.of]
    for left_out in ((), LENGTHS, (*LENGTHS, _IN_A_LINE)):
        table = _table(models, judge, win_rates, [name for name in names if name not in left_out])
        if fits(table):
            break
    console.print(table)
    if _IN_A_LINE in left_out:
        for model, found in models.items():
            hits = [hit for one in found.asked for hit in one.hits(has_reset_word_leak)]
            console.print(f"{model}: reset word leak in {sum(hits)} of {len(hits)} replies", markup=False)
    if left_out:
        console.print("words and tokens stand in the page; a wider terminal has them here too", style="dim")
    if win_rates.of:
        console.print(f"preferred to {next(iter(models))}, by {win_rates.judge}", highlight=False, markup=False)
    for model, found in models.items():
        for kind, measure in found.perplexity.items():
            shown = in_line(measure, "perplexity")
            console.print(f"{model}: perplexity of {measure.count} held-out {kind} replies {shown}")


def _table(models: dict[str, Evaluation], judge: str, win_rates: WinRates, names: Sequence[str]) -> Table:
    table = new_table(f"judge: {judge}; 95 % intervals")
    add_names(table, "model", models)
    add_names(table, "set", (one.title for found in models.values() for one in found.asked))
    for heading in ("prompts", *(HEADINGS[name] for name in names)):
        add_figures(table, heading)
    for model, found in models.items():
        for one in found.asked:
            measures = win_rates.measures(model, one)
            cells = ["\n".join(cell(measures.get(name), name)) for name in names]
            table.add_row(model, one.title.replace(", ", ",\n"), str(len(one.answers)), *cells)
    return table


def compare_evaluations(folders: Sequence[Path], workdir: Path, settings: ConfigDict) -> None:
    """Shows evaluations of several workdirs side by side, and leaves `comparison.html`; the first is the baseline.

    `settings` are a recipe's `evaluate`. With `win_rate_judge` it also leaves `win_rates.json`.
    """
    models, judges = {}, {}
    for folder in folders:
        judge, read = evaluation.read(folder / EVALUATION)
        judges.setdefault(judge, folder)
        for model, found in read.items():
            if model in models:
                raise InputError(f"{folder} has the model {model!r}, which an earlier workdir has too")
            models[model] = found
    if len(judges) > 1:
        raise InputError("not the same judge: " + ", ".join(f"{judge} in {at}" for judge, at in judges.items()))
    (judge,) = judges
    win_rates = NOT_JUDGED
    if settings.win_rate_judge:
        win_rates = win_rate.against_baseline(win_rate.load_judge(settings.win_rate_judge), models)
        workdir.mkdir(parents=True, exist_ok=True)
        atomic_write(workdir / "win_rates.json", json.dumps(win_rates.as_json(), indent=1, ensure_ascii=False) + "\n")
    page.write(models, judge, workdir / "comparison.html", settings.false_resets, win_rates)
    show(models, judge, win_rates)
    console.print(f"page in {bold(workdir)}: comparison.html", highlight=False)
