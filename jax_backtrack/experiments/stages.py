"""Trains the stages of a recipe one after another, evaluates each, and ends in one table."""

import copy
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation import results
from jax_backtrack.evaluation.judges.pairwise import PairwiseJudge
from jax_backtrack.evaluation.reports import tables
from jax_backtrack.evaluation.reports.page import report
from jax_backtrack.evaluation.results import Evaluation
from jax_backtrack.evaluation.run import evaluate
from jax_backtrack.evaluation.win_rate import NOT_JUDGED, against_baseline
from jax_backtrack.hub.load import load
from jax_backtrack.hub.settings import load_model
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.sampling.build import recipe_sampler
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.training.loop import train
from jax_backtrack.utils.console import console
from jax_backtrack.utils.resume_cache import resume_cache_of
from jax_backtrack.utils.settings import check
from jax_backtrack.utils.workdir import EVALUATION, EVALUATION_PAGE, EXPORT


def run_stages(config: ConfigDict, workdir: Path) -> dict[str, Evaluation]:
    """Runs the stages named in `config.order`, each in a folder of its own under `workdir`; evaluations by name.

    A stage of 0 steps is the model as it comes. `{workdir}` in a stage's `model.path` stands for the workdir, so that
    one stage can start from another. Where a stage has an `evaluate.win_rate_judge`, its replies to harmless prompts
    are judged against the first stage's. Leaves `evaluation.json` and its page, and prints the table and three
    transcripts.
    """
    evaluations, stages, win_rates = {}, Stages(), NOT_JUDGED
    path, judged = _judged_stages(config)
    with resume_cache_of(workdir / EVALUATION) as resume_cache:
        for name in config.order:
            console.rule(name)
            stage = copy.deepcopy(config.stages[name])
            check(stage)
            stage.model.path = stage.model.path.replace("{workdir}", str(workdir))
            evaluated = recipe_sampler(stage, *stages.model(stage, workdir / folder_name(name)))
            evaluations[name] = evaluate(stage, evaluated, resume_cache=resume_cache)
            del evaluated
        results.write(evaluations, workdir / EVALUATION)
    if path:
        win_rates = against_baseline(PairwiseJudge.load(path), {name: evaluations[name] for name in judged})
    settings = config.stages[config.order[0]].evaluate
    report(evaluations, workdir / EVALUATION_PAGE, settings.false_resets, win_rates)
    tables.show_transcripts(list(evaluations.values())[-1], count=3)
    return evaluations


def folder_name(stage: str) -> str:
    """Returns the name of a stage's folder within the workdir."""
    return stage.replace(" ", "_")


def _judged_stages(config: ConfigDict) -> tuple[str, list[str]]:
    """Returns the path of the judge of win rates, empty where there is none, and the stages that it judges."""
    first, *others = config.order
    judges = {name: judge for name in others if (judge := config.stages[name].evaluate.win_rate_judge)}
    if len(set(judges.values())) > 1:
        raise InputError(f"stages name several judges as evaluate.win_rate_judge: {', '.join(judges.values())}")
    return next(iter(judges.values()), ""), [first, *judges]


class Stages:
    """Models of stages that may start from one another; a start that follows another of the same is not read again."""

    def __init__(self):
        self._load, self._trained_now = _remembering_load(), set()

    def model(self, stage: ConfigDict, folder: Path) -> tuple[Transformer, ChatTokenizer]:
        """Returns the stage's model, trained in `folder`; of a stage of 0 steps the model as it comes.

        Raises InputError where it was trained already, from a stage that is trained anew by this object.
        """
        if not stage.train.steps:
            return load_model(stage, stage.model.path, make_mesh(**stage.mesh), load=self._load)
        if not (folder / EXPORT).exists():
            self._trained_now.add(str(folder))
        elif stage.model.path in self._trained_now:
            raise InputError(f"{folder} began from an earlier {stage.model.path}: remove it, to train it anew too")
        return train(stage, folder, self._load)


def _remembering_load():
    """Returns a `load` for stages that start from the same model: it is read once, and each stage gets a copy of its
    own."""
    remembered = {}

    def load_again(path, mesh, dtype, *, progress, **settings):
        key = path, dtype, *sorted(settings.items())
        if key not in remembered:
            remembered.clear()  # one model at a time: stages that share a start follow one another
            remembered[key] = load(path, mesh, dtype, progress=progress, **settings)
        model, tokenizer = remembered[key]
        graph, params = nnx.split(model)
        return nnx.merge(graph, jax.tree.map(jnp.copy, params)), tokenizer

    return load_again
