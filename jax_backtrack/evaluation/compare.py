"""Evaluations of several workdirs side by side: `comparison.html` and a table."""

import collections
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from jax_backtrack.errors import InputError
from jax_backtrack.evaluation import results, win_rate
from jax_backtrack.evaluation.judges.pairwise import PairwiseJudge
from jax_backtrack.evaluation.reports.page import report
from jax_backtrack.evaluation.results import Evaluation, check_comparable
from jax_backtrack.evaluation.win_rate import NOT_JUDGED
from jax_backtrack.utils.workdir import COMPARISON_PAGE, EVALUATION


def compare(folders: Sequence[Path], workdir: Path, settings: ConfigDict) -> None:
    """Shows evaluations of several workdirs side by side, and leaves `comparison.html`; the first is the baseline.

    `settings` are a recipe's `evaluate`. With `win_rate_judge` it also leaves `win_rates.json`.
    """
    models, win_rates = read_models(folders), NOT_JUDGED
    (first, baseline), *others = models.items()
    for model, evaluation in others:
        for result in evaluation.results:
            if of_baseline := baseline.of(result.title):
                check_comparable(result, of_baseline, model, first)
    if settings.win_rate_judge:
        win_rates = win_rate.against_baseline(PairwiseJudge.load(settings.win_rate_judge), models)
    report(models, workdir / COMPARISON_PAGE, settings.false_resets, win_rates)


def read_models(folders: Sequence[Path]) -> dict[str, Evaluation]:
    """Reads the models of several workdirs; those of one name are told apart by their workdirs' paths."""
    earlier, models_read = set(), []
    for folder in folders:
        for model, evaluation in results.read(folder / EVALUATION).items():
            if folder.resolve() in earlier:
                raise InputError(f"{folder} has the model {model!r}, which an earlier workdir has too")
            models_read.append((folder, model, evaluation))
        earlier.add(folder.resolve())
    counts = collections.Counter(model for _, model, _ in models_read)
    return {
        model if counts[model] == 1 else str(folder) if folder.name == model else f"{folder}: {model}": evaluation
        for folder, model, evaluation in models_read
    }
