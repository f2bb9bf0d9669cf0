"""Trains and evaluates the models of a recipe for several seeds, and compares those that backtrack with the others."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.evaluation import results as evaluations
from jax_backtrack.evaluation.judges import load_judge
from jax_backtrack.evaluation.reports import plots
from jax_backtrack.evaluation.reports.tables import cell, in_line
from jax_backtrack.evaluation.results import EvalResult, Evaluation
from jax_backtrack.evaluation.run import evaluate_in, read_sets
from jax_backtrack.evaluation.stats import Estimate, over_seeds, reduction_over_seeds
from jax_backtrack.experiments.stages import Stages, folder_name
from jax_backtrack.hub.settings import load_model
from jax_backtrack.sampling.build import recipe_sampler
from jax_backtrack.sampling.files import Asked, write_samples
from jax_backtrack.training.data import read_data
from jax_backtrack.training.loop import refuse_other_recipe, write_recipe
from jax_backtrack.utils.console import bold, console
from jax_backtrack.utils.json_text import to_json
from jax_backtrack.utils.settings import check
from jax_backtrack.utils.tables import add_figures, add_names, new_table
from jax_backtrack.utils.workdir import EVALUATION, RECIPE, REPLICATION, REPLICATION_PLOT, SAMPLES, atomic_write

_SCALES = ("small", "full")
_EVALUATED_RECIPE = "evaluated.json"  # of a stage that is not trained, and so has no RECIPE
_MEASURES = {
    "unsafe": evaluations.is_unsafe,
    "stream_unsafe": evaluations.is_stream_unsafe,
    "over_refusal": evaluations.is_refused,
    "useful": evaluations.is_useful,
    "reset": evaluations.has_reset,
    "reset_word_leak": evaluations.has_reset_word_leak,
    "tokens": lambda response: response.reply.num_tokens,
}


def replicate(config: ConfigDict, workdir: Path) -> dict:
    """Trains every stage of the recipe for every seed in `workdir/seed<N>`, evaluates it, and compares them.

    Stages may name `{own_replies}` as data: what the model of the recipe's `own_replies` answers to utility prompts.
    What is trained or evaluated already is not done again, so a run that was broken off goes on where it was. After
    each seed it leaves `results.json` and `results.svg` and prints the tables. Gives what `results.json` holds.
    """
    if config.scale not in _SCALES:
        raise InputError(f"scale is {config.scale!r}: {nearest(config.scale, _SCALES)}")
    stages = {name: _stage(config, name) for name in config.order}
    for stage in stages.values():
        check(stage)
    judge, models_of = load_judge(config.judge), Stages()
    sets = {name: read_sets(stage) for name, stage in stages.items()}
    own_replies(config, workdir)
    evaluations_of: dict[str, list[Evaluation]] = {name: [] for name in config.order}
    results = {}
    for seed in config.seeds:
        for name in config.order:
            if stages[name].train.steps == 0 and evaluations_of[name]:
                continue  # without training, seeds do not differ
            folder = workdir / f"seed{seed}" / folder_name(name)
            console.rule(f"{name}, seed {seed}")
            stage = _of_seed(stages[name], seed, folder.parent)
            recipe_file = RECIPE if stage.train.steps else _EVALUATED_RECIPE
            refuse_other_recipe(folder, stage, also=("reset", "sample", "evaluate"), file=recipe_file)
            if (folder / EVALUATION).exists() and (folder / recipe_file).exists():
                evaluated = evaluations.read(folder / EVALUATION)[name]
                if others := set(evaluated.judges) - {judge.name}:
                    others = ", ".join(others)
                    raise InputError(f"{folder} was judged by {others!r}, not by {judge.name!r}: remove {EVALUATION}")
                evaluations_of[name].append(evaluated)
                console.print(f"{folder} is evaluated already: nothing to do", highlight=False)
                continue
            sampler = recipe_sampler(stage, *models_of.model(stage, folder))
            evaluations_of[name].append(evaluate_in(folder, stage, sampler, name, judge, sets[name]))
            if recipe_file == _EVALUATED_RECIPE:
                write_recipe(folder / recipe_file, stage)
            del sampler
        results = summary(evaluations_of, config.baselines.to_dict())
        _write(results, config, judge.name, workdir)
        show(results)
    console.print(f"numbers and plot in {bold(workdir)}: {REPLICATION}, {REPLICATION_PLOT}", highlight=False)
    return results


def own_replies(config: ConfigDict, workdir: Path) -> None:
    """Samples the model's own replies to utility prompts, unless no stage wants them or they are there.

    Raises InputError where those that are there, or were begun, are of other settings.
    """
    if not any("{own_replies}" in config.stages[name].data.utility_path for name in config.order):
        return
    path = _own_replies_path(workdir)
    settings = copy.deepcopy(config.own_replies)
    if config.scale == "small":
        settings.update(config.cuts.own_replies)
    settings.data.utility_path = settings.data.utility_path.replace("{shared}", config.shared)
    check(settings)
    refuse_other_recipe(path.parent, settings, also=("reset", "sample"))
    if path.exists():
        return
    preferences = [item for _, preferences_read, _ in read_data(settings, utility=True) for item in preferences_read]
    console.rule("own replies")
    sampler = recipe_sampler(settings, *load_model(settings, settings.model.path, make_mesh(**settings.mesh)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_recipe(path.parent / RECIPE, settings)
    prompts = [Asked(preference.prompt) for preference in preferences]
    write_samples(sampler, prompts, path)


def _own_replies_path(workdir: Path) -> Path:
    return workdir / "own_replies" / SAMPLES


def _stage(config: ConfigDict, name: str) -> ConfigDict:
    """Returns the recipe of a stage, with the cuts, and with the shared folder in its paths."""
    if name not in config.stages:
        raise InputError(f"order names {name!r}: {nearest(name, config.stages)}")
    stage = copy.deepcopy(config.stages[name])
    if config.scale == "small":
        trains = stage.train.steps > 0
        stage.update(config.cuts.all)
        if trains:
            stage.update(config.cuts[stage.objective])
    fill = lambda text: text.replace("{shared}", config.shared)  # noqa: E731
    for section, fields in (("data", ("path", "utility_path", "exclude")), ("evaluate", ("harmful", "harmless"))):
        for field in fields:
            value = stage[section][field]
            stage[section][field] = fill(value) if isinstance(value, str) else tuple(map(fill, value))
    return stage


def _of_seed(stage: ConfigDict, seed: int, folder: Path) -> ConfigDict:
    stage = copy.deepcopy(stage)
    stage.model.path = stage.model.path.replace("{workdir}", str(folder))
    stage.data.utility_path = stage.data.utility_path.replace("{own_replies}", str(_own_replies_path(folder.parent)))
    stage.data.seed = stage.sample.seed = seed
    return stage


# --------------------------------------------------------------------------------------------------- comparing


def summary(evaluations_of: dict[str, Sequence[Evaluation]], baselines: dict[str, str]) -> dict:
    """Measures over prompts and seeds of every model in every condition, perplexities, and the reductions of unsafe
    replies against the baselines: `{"sets": {title: {model: {measure: Estimate}}}, "reduction": {title: {model: ...}},
    "perplexity": {kind: {model: [of each seed]}}, "seeds": ...}`."""
    titles = list(
        dict.fromkeys(one.title for each in evaluations_of.values() for of_seed in each for one in of_seed.results)
    )
    measures, reductions = {}, {}
    for title in titles:
        results_of = {
            model: [one for of_seed in each if (one := of_seed.of(title))] for model, each in evaluations_of.items()
        }
        results_of = {model: each for model, each in results_of.items() if each}
        measures[title] = {model: _measures(each) for model, each in results_of.items()}
        reductions[title] = {
            model: reduction_over_seeds(
                *(_values(results_of[one], evaluations.is_unsafe)[:seeds] for one in (model, baseline))
            )
            for model, baseline in baselines.items()
            if model in results_of and baseline in results_of and results_of[model][0].harmful
            if (seeds := min(len(results_of[model]), len(results_of[baseline])))
        }
    kinds = list(
        dict.fromkeys(kind for each in evaluations_of.values() for of_seed in each for kind in of_seed.perplexity)
    )
    return {
        "seeds": max(map(len, evaluations_of.values())),
        "sets": measures,
        "reduction": {title: each for title, each in reductions.items() if each},
        "perplexity": {
            kind: {
                model: [one.perplexity[kind] for one in each if kind in one.perplexity]
                for model, each in evaluations_of.items()
            }
            for kind in kinds
        },
    }


def _measures(of_seeds: Sequence[EvalResult]) -> dict[str, Estimate]:
    return {
        name: over_seeds(_values(of_seeds, what)) for name, what in _MEASURES.items() if name in of_seeds[0].measures
    }


def _values(of_seeds: Sequence[EvalResult], what) -> np.ndarray:
    """Returns `[seeds, prompts]`."""
    if any(result.prompts() != of_seeds[0].prompts() for result in of_seeds):
        raise InputError(f"{of_seeds[0].title}: the seeds were not asked the same prompts")
    return np.array([result.hits(what) for result in of_seeds])


def show(results: dict) -> None:
    """Prints a table for every set in every condition, and one of perplexities."""
    for title, models in results["sets"].items():
        names = list(next(iter(models.values())))
        counts = f"{next(iter(next(iter(models.values())).values())).count} prompts, up to {results['seeds']} seeds"
        table = new_table(f"{title} ({counts})")
        add_names(table, "model", models)
        reductions = results["reduction"].get(title, {})
        for heading in (*names, *(["reduction"] if reductions else [])):
            add_figures(table, heading.replace("_", " "))
        for model, measures in models.items():
            cells = ["\n".join(cell(measures[name], name)) for name in names]
            table.add_row(model, *cells, *(["\n".join(cell(reductions.get(model), "reduction"))] if reductions else []))
        console.print(table)
    for kind, models in results["perplexity"].items():
        for model, seeds in models.items():
            shown = "; ".join(in_line(measure, "perplexity") for measure in seeds)
            console.print(f"perplexity of held-out {kind} replies, {model}: {shown}", highlight=False)


def _write(results: dict, config: ConfigDict, judge: str, workdir: Path) -> None:
    content = {"judge": judge, "scale": config.scale, "cuts": config.cuts.to_dict() if config.scale == "small" else {}}
    content |= results
    atomic_write(workdir / REPLICATION, to_json(content, indent=1) + "\n")
    unsafe = {
        title: {model: measures["unsafe"] for model, measures in models.items()}
        for title, models in results["sets"].items()
        if "unsafe" in next(iter(models.values()))
    }
    atomic_write(workdir / REPLICATION_PLOT, plots.bars(unsafe, "unsafe replies, %"))
