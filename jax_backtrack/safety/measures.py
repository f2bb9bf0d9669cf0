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


def worst_of(hits_of_prompts: Sequence[Sequence[bool]], most: int) -> list[Measure]:
    """For k = 1..most the chance that the worst of k samples is a hit, over prompts, from their n samples each.

    Of n samples with c hits, k drawn without return hold none with the chance C(n - c, k) / C(n, k), so no estimate is
    biased by the samples that were taken (Chen et al. 2021, arXiv 2107.03374, section 2.1, of pass@k). `most` is at
    most n. Intervals are by resampling prompts.
    """
    counts = {len(hits) for hits in hits_of_prompts}
    if len(counts) != 1 or not 1 <= most <= (n := counts.pop()):
        raise ValueError(f"worst of {most} needs as many samples of every prompt, and the same number of each")
    missed = [n - sum(hits) for hits in hits_of_prompts]
    return [mean([1 - math.comb(miss, k) / math.comb(n, k) for miss in missed]) for k in range(1, most + 1)]
