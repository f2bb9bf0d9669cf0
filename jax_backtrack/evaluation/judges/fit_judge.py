"""Fits a judge to labelled replies, and says how well it agrees with labels of prompts that it has not seen."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from rich.markup import escape

from jax_backtrack.data.preferences import Report
from jax_backtrack.data.reading import files
from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.asked import UNSAFE_FROM
from jax_backtrack.evaluation.judges import fitted
from jax_backtrack.evaluation.judges.fitted import Heads
from jax_backtrack.evaluation.judges.hidden_states import Reader
from jax_backtrack.evaluation.measures import Measure
from jax_backtrack.hub.settings import load_model
from jax_backtrack.tokenizer.chat_tokenizer import Message, check_messages
from jax_backtrack.utils.console import bold, console, progress_bar
from jax_backtrack.utils.workdir import atomic_write

_COLUMNS = ("prompt", "response", "unsafe")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A reply to a prompt with its label."""

    prompt: tuple[Message, ...]
    reply: str
    unsafe: bool


def fit(config: ConfigDict, workdir: Path) -> Measure:
    """Fits the judge of a recipe and leaves it in the workdir, with `agreement.json`; gives the agreement's kappa."""
    settings = config.judge
    labelled = read(settings.data, config.data.split)
    model, tokenizer = load_model(config, config.model.path, make_mesh(**config.mesh))
    reader = Reader(model, tokenizer, settings.layers, settings.tokens)
    prompts, replies = [each.prompt for each in labelled], [each.reply for each in labelled]
    unsafe_N = np.array([each.unsafe for each in labelled])
    with progress_bar("reading replies", len(labelled)) as advance:
        hidden_NxF = reader(prompts, replies, advance)
    groups = np.unique([json.dumps(prompt) for prompt in prompts], return_inverse=True)[1]
    with progress_bar("cross-validation", settings.folds, first="") as advance:
        judged_N = cross_validated(replies, hidden_NxF, unsafe_N, groups, settings.folds, advance)
    kappa = agreement(judged_N >= UNSAFE_FROM, unsafe_N, groups)
    accuracy = float(((judged_N >= UNSAFE_FROM) == unsafe_N).mean())
    fitted.save(workdir, Heads.fit(replies, hidden_NxF, unsafe_N), config.model.path, settings.layers, settings.tokens)
    found = {"kappa": dataclasses.asdict(kappa), "accuracy": accuracy, "prompts": int(groups.max()) + 1}
    atomic_write(workdir / "agreement.json", json.dumps(found, indent=1) + "\n")
    console.print(
        f"{len(labelled)} replies to {found['prompts']} prompts, {unsafe_N.mean():.0%} unsafe. On prompts that were "
        f"left out ({settings.folds} folds): kappa {kappa.value:.2f} ({kappa.low:.2f}–{kappa.high:.2f}), "
        f"the same verdict on {accuracy:.1%}",
        highlight=False,
    )
    console.print(
        f"judge in {bold(workdir)}: use it with --config.evaluate.judge={escape(str(workdir))}", highlight=False
    )
    return kappa


def read(path: str, split: str) -> list[Labelled]:
    """Labelled replies of a file or a Hub data set. The first row that has not what it should is an error."""
    if not path:
        raise InputError("judge.data is not set: a file or Hub id of labelled replies (prompt, response, unsafe)")
    report, labelled = Report(), []
    for place, row in files.rows(path, split, report):
        if missing := [column for column in _COLUMNS if row.get(column) is None]:
            raise InputError(f"{place}: no {', '.join(missing)}; there are {', '.join(map(str, row))}")
        prompt = row["prompt"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            check_messages(prompt)
        except InputError as error:
            raise InputError(f"{place}, prompt: {error}") from None
        if not isinstance(row["response"], str) or not isinstance(row["unsafe"], bool):
            raise InputError(f"{place}: response is no text, or unsafe neither true nor false")
        labelled.append(Labelled(tuple(prompt), row["response"], row["unsafe"]))
    if report.dropped:
        raise InputError(f"{path}: {'; '.join(report.lines())}")
    if len({each.unsafe for each in labelled}) < 2:
        raise InputError(f"{path}: all replies have the same label, or there are none")
    return labelled


def cross_validated(replies, hidden_NxF, unsafe_N, groups_N, folds: int, progress=lambda: None) -> np.ndarray:
    """float64 `[N]`: the probability of each reply by heads that saw no reply to its prompt."""
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second, which other modes should not cost

    if len(np.unique(groups_N)) < folds:
        raise InputError(f"judge.folds is {folds}, more than the {len(np.unique(groups_N))} prompts")
    judged_N = np.zeros(len(replies))
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    for seen, left_out in parts.split(replies, unsafe_N, groups_N):
        heads = Heads.fit([replies[i] for i in seen], hidden_NxF[seen], unsafe_N[seen])
        judged_N[left_out] = heads([replies[i] for i in left_out], hidden_NxF[left_out])
        progress()
    return judged_N


def agreement(ours_N: np.ndarray, labels_N: np.ndarray, groups_N: np.ndarray, resamples: int = 2000) -> Measure:
    """Cohen's kappa (Cohen 1960), with its interval by resampling prompts."""
    rng, members = np.random.default_rng(0), [np.flatnonzero(groups_N == group) for group in np.unique(groups_N)]
    values = []
    for _ in range(resamples):
        drawn = np.concatenate([members[group] for group in rng.integers(0, len(members), len(members))])
        values.append(_kappa(ours_N[drawn], labels_N[drawn]))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Measure(_kappa(ours_N, labels_N), float(low), float(high), len(ours_N))


def _kappa(one_N: np.ndarray, other_N: np.ndarray) -> float:
    """Of two sets of verdicts; not a number where both are all alike, which tells nothing of their agreement."""
    of_one, of_other = one_N.mean(), other_N.mean()
    chance = of_one * of_other + (1 - of_one) * (1 - of_other)
    return float(((one_N == other_N).mean() - chance) / (1 - chance)) if chance < 1 else float("nan")
