"""Trains the stages of a recipe one after another, evaluates each, and ends in one table."""

import copy
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation import win_rate
from jax_backtrack.evaluation.evaluate import CONDITIONS, Evaluation, evaluate
from jax_backtrack.evaluation.judges.pairwise import PairwiseJudge
from jax_backtrack.evaluation.reports import report
from jax_backtrack.hub.load import load
from jax_backtrack.hub.settings import load_model
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.sampling.build import recipe_sampler
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.training.loop import train
from jax_backtrack.utils.console import bold, console, progress_bar
from jax_backtrack.utils.resume_cache import ResumeCache, resume_cache_of
from jax_backtrack.utils.settings import check
from jax_backtrack.utils.workdir import EXPORT

_COMPARISON = "comparison.json"


def compare(config: ConfigDict, workdir: Path) -> dict[str, Evaluation]:
    """Runs the stages named in `config.order`, each in a folder of its own under `workdir`; evaluations by name.

    A stage of 0 steps is the model as it comes. `{workdir}` in a stage's `model.path` stands for the workdir, so that
    one stage can start from another. Where a stage has an `evaluate.win_rate_judge`, its replies to public questions
    are judged against the first stage's. Leaves `comparison.json` and prints the table and three transcripts.
    """
    evaluations, stages, load_judge = {}, Stages(), functools.cache(win_rate.load_judge)
    with resume_cache_of(workdir / _COMPARISON) as resume_cache:
        for name in config.order:
            console.rule(name)
            stage = copy.deepcopy(config.stages[name])
            check(stage)
            stage.model.path = stage.model.path.replace("{workdir}", str(workdir))
            model, tokenizer = stages.model(stage, workdir / folder_name(name))
            evaluations[name] = evaluate_with_progress(
                recipe_sampler(stage, model, tokenizer), stage.evaluate.prompts, f"evaluating {name}", resume_cache
            )
            del model
            baseline = evaluations[config.order[0]]
            if stage.evaluate.win_rate_judge and evaluations[name] is not baseline:
                evaluations[name] = _judged(load_judge(stage.evaluate.win_rate_judge), evaluations[name], baseline)
        report.write(evaluations, workdir / _COMPARISON)
    report.show(evaluations)
    report.show_transcripts(list(evaluations.values())[-1], count=3)
    console.print(f"numbers and replies in {bold(workdir / _COMPARISON)}", highlight=False)
    return evaluations


def folder_name(stage: str) -> str:
    """The name of a stage's folder within the workdir."""
    return stage.replace(" ", "_")


def _judged(judge: PairwiseJudge, evaluation: Evaluation, baseline: Evaluation) -> Evaluation:
    """The evaluation with the share of public questions whose reply the judge prefers to the baseline's."""
    ours, theirs = evaluation.answers["public"], baseline.answers["public"]
    if [answer.question for answer in ours] != [answer.question for answer in theirs]:
        raise InputError(
            f"evaluate.prompts: {len(ours)} and {len(theirs)}; to compare replies stages ask the same ones"
        )
    replies = [[answer.reply.text for answer in answers] for answers in (ours, theirs)]
    won = win_rate.win_rate(judge, [answer.question.messages for answer in ours], *replies).won
    return dataclasses.replace(evaluation, measures=evaluation.measures | {"won": won})


class Stages:
    """Models of stages that may start from one another; a start that follows another of the same is not read again."""

    def __init__(self):
        self._load, self._trained_now = _remembering_load(), set()

    def model(self, stage: ConfigDict, folder: Path) -> tuple[Transformer, ChatTokenizer]:
        """The stage's model, trained in `folder`; of a stage of 0 steps the model as it comes.

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
    """`load` for stages that start from the same model: it is read once, and each stage gets a copy of its own."""
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


def evaluate_with_progress(asked: Sampler, prompts: int, description: str, resume_cache: ResumeCache) -> Evaluation:
    """`evaluate` with a bar."""
    with progress_bar(description, len(CONDITIONS) * prompts) as advance:
        return evaluate(asked, prompts, advance, resume_cache)
