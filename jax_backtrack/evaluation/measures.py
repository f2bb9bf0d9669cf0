"""Rates and means with 95 % intervals."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959963984540054  # of the standard normal distribution, two-sided 95 %


@dataclasses.dataclass(frozen=True)
class Measure:
    """A value with its 95 % interval, and the number of prompts that it was measured on."""

    value: float
    low: float
    high: float
    count: int


def rate(hits: Sequence[bool]) -> Measure:
    """Share of hits with its Wilson interval (Wilson 1927)."""
    count = len(hits)
    share = sum(hits) / count
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    # Rounding must not put the share outside its interval: plots take the distances as lengths.
    return Measure(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)), count)


def mean(values: Sequence[float], resamples: int = 2000) -> Measure:
    """Mean with its percentile bootstrap interval (Efron 1979), from a fixed seed."""
    array = np.asarray(values, np.float64)
    draws = np.random.default_rng(0).integers(0, len(array), (resamples, len(array)))
    low, high = np.percentile(array[draws].mean(axis=1), [2.5, 97.5])
    return Measure(float(array.mean()), float(low), float(high), len(array))


@dataclasses.dataclass(frozen=True)
class Paired:
    """One model's rate against another's on the same prompts.

    reduction:  1 - rate / baseline's rate, with its 95 % interval by resampling prompts; None where the baseline has
                no hit
    only_here, only_baseline: prompts that hit in one of them alone
    p_value:    of McNemar's exact test: that the two differ as much by chance
    """

    reduction: Measure | None
    only_here: int
    only_baseline: int
    p_value: float


def paired(hits: Sequence[bool], baseline: Sequence[bool], resamples: int = 2000) -> Paired:
    """Compares two models prompt by prompt (McNemar 1947)."""
    here, there = np.asarray(hits, bool), np.asarray(baseline, bool)
    if here.shape != there.shape:
        raise ValueError(f"{len(here)} and {len(there)} prompts: the two are not of the same prompts")
    only_here, only_baseline = int((here & ~there).sum()), int((there & ~here).sum())
    disagree = only_here + only_baseline
    tail = sum(math.comb(disagree, k) for k in range(min(only_here, only_baseline) + 1)) / 2**disagree
    reduction = None
    if there.any():
        draws = np.random.default_rng(0).integers(0, len(here), (resamples, len(here)))
        of_baseline = there[draws].mean(axis=1)
        counted = of_baseline > 0
        values = 1 - here[draws].mean(axis=1)[counted] / of_baseline[counted]
        low, high = np.percentile(values, [2.5, 97.5])
        reduction = Measure(float(1 - here.mean() / there.mean()), float(low), float(high), len(here))
    return Paired(reduction, only_here, only_baseline, min(1.0, 2 * tail))


def worst_of(hits_of_prompts: Sequence[Sequence[bool]], k: int) -> Measure:
    """The chance that the worst of k samples is a hit, over prompts, from their n samples each.

    Of n samples with c hits, k drawn without return hold none with the chance C(n - c, k) / C(n, k), so no estimate is
    biased by the samples that were taken (Chen et al. 2021, arXiv 2107.03374, section 2.1, of pass@k). k is at most n.
    The interval is by resampling prompts; where the worst is the same of all of them, which that would tell nothing of,
    it is Wilson's.
    """
    counts = {len(hits) for hits in hits_of_prompts}
    if len(counts) != 1 or not 1 <= k <= (n := counts.pop()):
        raise ValueError(f"worst of {k} needs as many samples of every prompt, and the same number of each")
    chances = [1 - math.comb(n - sum(hits), k) / math.comb(n, k) for hits in hits_of_prompts]
    return rate([bool(chances[0])] * len(chances)) if set(chances) in ({0.0}, {1.0}) else mean(chances)


def perplexity(log_probs_N: Sequence[float], tokens_N: Sequence[int], resamples: int = 2000) -> Measure:
    """exp of the mean negative log-probability per token, from each reply's sum and its number of tokens; the interval
    is by resampling replies."""
    nats, counts = -np.asarray(log_probs_N, np.float64), np.asarray(tokens_N, np.float64)
    draws = np.random.default_rng(0).integers(0, len(nats), (resamples, len(nats)))
    low, high = np.percentile(np.exp(nats[draws].sum(axis=1) / counts[draws].sum(axis=1)), [2.5, 97.5])
    return Measure(float(np.exp(nats.sum() / counts.sum())), float(low), float(high), len(nats))


def over_seeds(values_SxN: np.ndarray) -> Measure:
    """Mean over the seeds of a training and over prompts, with its interval by resampling both.

    Of few seeds the interval knows little: resampling cannot show what none of them did. Where all values are 0 or all
    are 1 it would show nothing at all, so there it is Wilson's, of the prompts alone.
    """
    values_SxN = np.asarray(values_SxN, np.float64)
    if (values_SxN == (first := values_SxN.flat[0])).all() and first in (0, 1):
        return rate([bool(first)] * values_SxN.shape[1])
    low, high = np.percentile(_resampled(values_SxN), [2.5, 97.5])
    return Measure(float(values_SxN.mean()), float(low), float(high), values_SxN.shape[1])


def reduction_over_seeds(here_SxN: np.ndarray, baseline_SxN: np.ndarray) -> Measure | None:
    """1 - rate / baseline's rate of the same prompts, with its interval by resampling seeds and prompts; None where
    the baseline has no hit. A seed's two models are drawn together."""
    here_SxN, baseline_SxN = np.asarray(here_SxN, np.float64), np.asarray(baseline_SxN, np.float64)
    if here_SxN.shape != baseline_SxN.shape:
        raise ValueError(f"{here_SxN.shape} and {baseline_SxN.shape} seeds and prompts: not the same ones")
    if not baseline_SxN.any():
        return None
    here, there = _resampled(here_SxN), _resampled(baseline_SxN)
    counted = there > 0
    low, high = np.percentile(1 - here[counted] / there[counted], [2.5, 97.5])
    return Measure(float(1 - here_SxN.mean() / baseline_SxN.mean()), float(low), float(high), here_SxN.shape[1])


def _resampled(values_SxN: np.ndarray, resamples: int = 4000) -> np.ndarray:
    """Means of resampled seeds and prompts, the same draws for every array of a shape."""
    rng, (seeds, prompts) = np.random.default_rng(0), values_SxN.shape
    drawn_seeds = rng.integers(0, seeds, (resamples, seeds))
    drawn_prompts = rng.integers(0, prompts, (resamples, prompts))
    return np.array([values_SxN[one][:, two].mean() for one, two in zip(drawn_seeds, drawn_prompts, strict=True)])
