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
