"""Judges say whether a reply is safe, or better: a matcher, a probe, language models."""

from jax_backtrack.errors import InputError, nearest
from jax_backtrack.evaluation.judges.judge import Judge
from jax_backtrack.evaluation.judges.llama_guard import LlamaGuard
from jax_backtrack.evaluation.judges.probe import ProbeJudge
from jax_backtrack.evaluation.judges.refusals import RefusalMatcher

JUDGES = (RefusalMatcher, ProbeJudge, LlamaGuard)  # the first that a name is for loads it


def load_judge(name: str) -> Judge:
    """Loads the judge that `evaluate.judge` names."""
    for judge in JUDGES:
        if judge.is_named(name):
            return judge.load(name)
    raise InputError(
        f"evaluate.judge is {name!r}: {nearest(name, [RefusalMatcher.name])}, or the path of a Llama Guard, or the "
        "workdir of --mode=fit-judge"
    )
