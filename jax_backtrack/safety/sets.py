"""Evaluates a model on the prompt sets of a recipe: `evaluation.json`, `evaluation.html` and a table."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich import box
from rich.table import Table

from jax_backtrack.errors import InputError, nearest
from jax_backtrack.hub.load import load
from jax_backtrack.progress import console, progress_bar, share_bar
from jax_backtrack.safety import page, prompt_sets
from jax_backtrack.safety.asked import Answer, Asked, ask, title
from jax_backtrack.safety.cells import HEADINGS, cell
from jax_backtrack.safety.gcg import Attack, Objective, Settings
from jax_backtrack.safety.judge import Judge
from jax_backtrack.safety.llama_guard import LlamaGuard
from jax_backtrack.safety.prompt_sets import Question
from jax_backtrack.safety.refusals import Refusals
from jax_backtrack.sampling.reply import Reply
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sharding import row_parts

EVALUATION = "evaluation.json"


def read_sets(config: ConfigDict) -> list[tuple[str, bool, list[Question]]]:
    """Name, whether it is harmful, and questions of every set of the recipe. Nothing is sampled before all are read."""
    limit = config.evaluate.limit or None
    return [
        (*prompt_sets.read(entry, harmful, limit), harmful)
        for harmful, entries in ((True, config.evaluate.harmful), (False, config.evaluate.harmless))
        for entry in entries
    ]


def make_judge(name: str) -> Judge:
    """The judge of this name: "refusals", or the path or Hub id of a Llama Guard."""
    if name == Refusals.name:
        return Refusals()
    if "/" not in name and not Path(name).exists():
        raise InputError(f"evaluate.judge is {name!r}: {nearest(name, [Refusals.name])}, or the path of a Llama Guard")
    with share_bar(f"loading judge {name[-32:]}") as progress:
        return LlamaGuard(*load(name, dtype="bfloat16", progress=progress))


def evaluate_sets(config: ConfigDict, sampler: Sampler, judge: Judge, sets, model: str, workdir: Path) -> list[Asked]:
    """Asks every set plainly, and harmful ones with targets under each of `evaluate.prefill` and after GCG too."""
    settings = config.evaluate
    asked = []
    for name, questions, harmful in sets:
        with_target = [question for question in questions if question.target]
        conditions = [(questions, 0, "")]
        if harmful and with_target:
            conditions += [(with_target, prefill, "") for prefill in settings.prefill]
            if settings.gcg_steps:
                conditions.append((_attacked(config, sampler, name, with_target), 0, _attack_name(config)))
        for chosen, prefill, attack in conditions:
            with progress_bar(title(name, prefill, attack), len(chosen) * settings.samples) as advance:
                asked.append(
                    ask(
                        sampler,
                        judge,
                        name,
                        chosen,
                        harmful=harmful,
                        prefill=prefill,
                        attack=attack,
                        samples=settings.samples,
                        progress=advance,
                    )
                )
    write({model: asked}, judge.name, workdir / EVALUATION)
    page.write({model: asked}, judge.name, workdir / "evaluation.html")
    show({model: asked}, judge.name)
    console.print(f"replies and page in [bold]{workdir}[/]: evaluation.json, evaluation.html", highlight=False)
    return asked


def _attack_name(config: ConfigDict) -> str:
    return "adaptive GCG" if config.evaluate.gcg_reset_weight else "GCG"


def _attacked(config: ConfigDict, sampler: Sampler, name: str, questions: Sequence[Question]) -> list[Question]:
    """The questions with the suffixes that GCG finds against the sampler's model."""
    settings = config.evaluate
    search = Settings(
        steps=settings.gcg_steps,
        width=settings.gcg_width,
        seed=config.sample.seed,
        rows=row_parts(sampler.model.compute.mesh),
    )
    attacked = []
    with progress_bar(f"{_attack_name(config)} on {name}", len(questions) * settings.gcg_steps) as advance:
        for question in questions:
            objective = Objective.of(sampler.tokenizer, question.messages, question.target, settings.gcg_reset_weight)
            best = None
            for step in Attack(sampler.model, sampler.tokenizer, objective, search).run():
                best = step if best is None or step.loss < best.loss else best
                advance(note=f"loss {best.loss:.2f}")
            attacked.append(question.with_suffix(sampler.tokenizer.decode(best.suffix)))
    return attacked


def show(models: dict[str, Sequence[Asked]], judge: str) -> None:
    """Prints one table: a row for each model, set and condition."""
    table = Table(title=f"judge: {judge}; 95 % intervals", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("model", "prompts", "", *HEADINGS.values()):
        table.add_column(heading, justify="right" if heading in HEADINGS.values() else "left")
    for model, asked in models.items():
        for one in asked:
            measures = one.measures()
            cells = ["\n".join(cell(measures.get(name), name)) for name in HEADINGS]
            table.add_row(model, one.title, str(len(one.answers)), *cells)
    console.print(table)


def write(models: dict[str, Sequence[Asked]], judge: str, path: Path) -> None:
    """Writes measures and every reply of each model, judged, to a JSON file."""
    content = {"judge": judge, "models": {model: [_as_json(one) for one in asked] for model, asked in models.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def compare_evaluations(folders: Sequence[Path], workdir: Path) -> None:
    """Shows evaluations of several workdirs side by side, and leaves `comparison.html`; the first is the baseline."""
    models, judges = {}, {}
    for folder in folders:
        judge, read = read_evaluation(folder / EVALUATION)
        judges.setdefault(judge, folder)
        for model, asked in read.items():
            if model in models:
                raise InputError(f"{folder} has the model {model!r}, which an earlier workdir has too")
            models[model] = asked
    if len(judges) > 1:
        raise InputError("not the same judge: " + ", ".join(f"{judge} in {at}" for judge, at in judges.items()))
    (judge,) = judges
    page.write(models, judge, workdir / "comparison.html")
    show(models, judge)
    console.print(f"page in [bold]{workdir}[/]: comparison.html", highlight=False)


def read_evaluation(path: Path) -> tuple[str, dict[str, list[Asked]]]:
    """The judge and the models of a file that `write` wrote."""
    try:
        content = json.loads(path.read_text())
        models = {model: [_from_json(one) for one in asked] for model, asked in content["models"].items()}
        return content["judge"], models
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}: run --mode=evaluate with prompt sets there") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no evaluation of prompt sets: {type(error).__name__} {error}") from None


def _as_json(asked: Asked) -> dict:
    return {
        "set": asked.name,
        "harmful": asked.harmful,
        "prefill": asked.prefill,
        "attack": asked.attack,
        "samples": len(asked.answers[0]),
        "measures": {name: dataclasses.asdict(measure) for name, measure in asked.measures().items()},
        "answers": [
            {
                "messages": list(answer.question.messages),
                "target": answer.question.target,
                "prefix": answer.prefix,
                "reply": answer.reply.text,
                "drafts": list(answer.reply.drafts),
                "finish": answer.reply.finish,
                "unsafe": answer.unsafe,
                "shown_unsafe": answer.shown_unsafe,
            }
            for samples in asked.answers
            for answer in samples
        ],
    }


def _from_json(content: dict) -> Asked:
    answers = [
        Answer(
            Question(tuple(one["messages"]), one["target"]),
            one["prefix"],
            Reply(one["reply"], tuple(one["drafts"]), one["finish"]),
            float(one["unsafe"]),
            float(one["shown_unsafe"]),
        )
        for one in content["answers"]
    ]
    samples = content["samples"]
    questions = tuple(tuple(answers[first : first + samples]) for first in range(0, len(answers), samples))
    return Asked(content["set"], content["harmful"], content["prefill"], questions, content["attack"])
