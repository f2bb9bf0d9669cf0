"""Shares, means and comparisons with 95 % intervals.

SciPy's statistics take a second or more to import, so they are imported where they are needed.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, and the number of prompts that it was measured on."""

    value: float
    low: float
    high: float
    count: int


def wilson(hits: Sequence[bool]) -> Estimate:
    """Returns the share of hits with its Wilson interval (Wilson 1927)."""
    from scipy.stats import binomtest

    share = sum(hits) / len(hits)
    low, high = binomtest(int(sum(hits)), len(hits)).proportion_ci(method="wilson")
    # Rounding must not put the share outside its interval: plots take the distances as lengths.
    return Estimate(share, float(min(share, low)), float(max(share, high)), len(hits))


def bootstrap(statistic: Callable[..., np.ndarray], *counts: int, resamples: int = 2000) -> tuple[float, float]:
    """Returns the percentile interval (Efron 1979) of a statistic, by resampling from a fixed seed.

    statistic: takes for each of `counts` the indices `[..., n]` of so many observations, and gives `[...]`. NaN is left
               out, as of draws that tell nothing
    """
    from scipy.stats import bootstrap

    def of_drawn(*drawn, axis=-1):
        drawn = iter(drawn)
        return statistic(*(next(drawn) if count > 1 else np.zeros(1, int) for count in counts))

    several = [np.arange(count) for count in counts if count > 1]  # SciPy refuses to resample a single observation
    if not several:
        return (float(of_drawn()),) * 2
    drawing = dict(n_resamples=resamples, method="percentile", vectorized=True, rng=np.random.default_rng(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of draws that tell nothing
        drawn = bootstrap(several, of_drawn, **drawing).bootstrap_distribution
        return tuple(np.nanpercentile(drawn, [2.5, 97.5]).tolist())


def mean(values: Sequence[float]) -> Estimate:
    """Returns the mean with its bootstrap interval."""
    array = np.asarray(values, np.float64)
    interval = bootstrap(lambda drawn: array[drawn].mean(axis=-1), len(array))
    return Estimate(float(array.mean()), *interval, len(array))


@dataclasses.dataclass(frozen=True)
class Paired:
    """One model's rate against another's on the same prompts.

    reduction:  1 - rate / baseline's rate, with its 95 % interval by resampling prompts; None where the baseline has
                no hit
    only_here, only_baseline: prompts that hit in one of them alone
    p_value:    of McNemar's exact test: that the two differ as much by chance
    """

    reduction: Estimate | None
    only_here: int
    only_baseline: int
    p_value: float


def paired(hits: Sequence[bool], baseline: Sequence[bool], resamples: int = 2000) -> Paired:
    """Compares two models prompt by prompt (McNemar 1947)."""
    from scipy.stats import binomtest

    ours, theirs = np.asarray(hits, bool), np.asarray(baseline, bool)
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} and {len(theirs)} prompts: the two are not of the same prompts")
    only_here, only_baseline = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    disagree = only_here + only_baseline
    p_value = float(binomtest(only_here, disagree).pvalue) if disagree else 1.0
    return Paired(_reduction(ours[None], theirs[None], resamples), only_here, only_baseline, p_value)


def worst_of(hits_of_prompts: Sequence[Sequence[bool]], k: int) -> Estimate:
    """Returns the chance that the worst of k samples is a hit, over prompts, from their n samples each.

    Of n samples with c hits, k drawn without return hold none with the chance C(n - c, k) / C(n, k), so no estimate is
    biased by the samples that were taken (Chen et al. 2021, arXiv 2107.03374, section 2.1, of pass@k). k is at most n.
    The interval is by resampling prompts; where the worst is the same of all of them, which that would tell nothing of,
    it is Wilson's.
    """
    counts = {len(hits) for hits in hits_of_prompts}
    if len(counts) != 1 or not 1 <= k <= (n := counts.pop()):
        raise ValueError(f"worst of {k} needs as many samples of every prompt, and the same number of each")
    chances = [1 - math.comb(n - sum(hits), k) / math.comb(n, k) for hits in hits_of_prompts]
    return wilson([bool(chances[0])] * len(chances)) if set(chances) in ({0.0}, {1.0}) else mean(chances)


def perplexity(log_probs_N: Sequence[float], tokens_N: Sequence[int]) -> Estimate:
    """Returns exp of the mean negative log-probability per token, from each reply's sum and its number of tokens; the
    interval is by resampling replies."""
    nats_N, counts_N = -np.asarray(log_probs_N, np.float64), np.asarray(tokens_N, np.float64)
    interval = bootstrap(lambda drawn: np.exp(nats_N[drawn].sum(axis=-1) / counts_N[drawn].sum(axis=-1)), len(nats_N))
    return Estimate(float(np.exp(nats_N.sum() / counts_N.sum())), *interval, len(nats_N))


def over_seeds(values_SxN: np.ndarray) -> Estimate:
    """Returns the mean over the seeds of a training and over prompts, with its interval by resampling both.

    Of few seeds the interval knows little: resampling cannot show what none of them did. Where all values are 0 or all
    are 1 it would show nothing at all, so there it is Wilson's, of the prompts alone.
    """
    values_SxN = np.asarray(values_SxN, np.float64)
    if (values_SxN == (first := values_SxN.flat[0])).all() and first in (0, 1):
        return wilson([bool(first)] * values_SxN.shape[1])
    interval = bootstrap(lambda *drawn: _mean_of(values_SxN, *drawn), *values_SxN.shape, resamples=4000)
    return Estimate(float(values_SxN.mean()), *interval, values_SxN.shape[1])


def reduction_over_seeds(here_SxN: np.ndarray, baseline_SxN: np.ndarray) -> Estimate | None:
    """Returns 1 - rate / baseline's rate of the same prompts, with its interval by resampling seeds and prompts; None
    where the baseline has no hit. A seed's two models are drawn together."""
    here_SxN, baseline_SxN = np.asarray(here_SxN, np.float64), np.asarray(baseline_SxN, np.float64)
    if here_SxN.shape != baseline_SxN.shape:
        raise ValueError(f"{here_SxN.shape} and {baseline_SxN.shape} seeds and prompts: not the same ones")
    return _reduction(here_SxN, baseline_SxN, resamples=4000)


def kappa(ours_N: np.ndarray, labels_N: np.ndarray, groups_N: np.ndarray) -> Estimate:
    """Returns Cohen's kappa (Cohen 1960) of two sets of verdicts, with its interval by resampling groups; NaN where
    both are all alike, which tells nothing of their agreement."""
    from sklearn.metrics import cohen_kappa_score

    members = [np.flatnonzero(groups_N == group) for group in np.unique(groups_N)]

    def of_group(drawn: np.ndarray) -> float:
        chosen = np.concatenate([members[group] for group in drawn])
        return cohen_kappa_score(ours_N[chosen], labels_N[chosen])

    interval = bootstrap(lambda drawn: np.apply_along_axis(of_group, -1, drawn), len(members))
    return Estimate(float(cohen_kappa_score(ours_N, labels_N)), *interval, len(ours_N))


def _reduction(here_SxN: np.ndarray, baseline_SxN: np.ndarray, resamples: int) -> Estimate | None:
    if not baseline_SxN.any():
        return None

    def reduction(*drawn):
        baseline = _mean_of(baseline_SxN, *drawn)
        return 1 - _mean_of(here_SxN, *drawn) / np.where(baseline > 0, baseline, np.nan)

    interval = bootstrap(reduction, *here_SxN.shape, resamples=resamples)
    return Estimate(float(1 - here_SxN.mean() / baseline_SxN.mean()), *interval, here_SxN.shape[1])


def _mean_of(values_SxN: np.ndarray, seeds: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Returns means `[...]` of drawn seeds `[..., S]` and prompts `[..., N]`."""
    return values_SxN[seeds[..., :, None], prompts[..., None, :]].mean(axis=(-2, -1))
