"""Intervals against published numbers, and what every interval must do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_backtrack.safety.measures import mean, rate


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(hits, count, low, high):
    measure = rate([True] * hits + [False] * (count - hits))
    assert (measure.value, measure.count) == (hits / count, count)
    assert (measure.low, measure.high) == pytest.approx((low, high), abs=5e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_wilson_interval_holds_the_share_and_mirrors(hits):
    measure, mirrored = rate(hits), rate([not hit for hit in hits])
    assert 0 <= measure.low <= measure.value <= measure.high <= 1
    assert measure.low == pytest.approx(1 - mirrored.high)
    assert rate(hits * 4).high - rate(hits * 4).low < measure.high - measure.low


def test_mean_of_a_constant_has_no_width():
    measure = mean([3.0] * 7)
    assert (measure.value, measure.low, measure.high, measure.count) == (3, 3, 3, 7)


def test_bootstrap_interval_nears_the_normal_one():
    """Of 1,000 values with deviation 1/2 it is 1.96 * 0.5 / sqrt(1000) = 0.031 to each side."""
    measure = mean([0, 1] * 500)
    assert measure.value == 0.5
    assert np.subtract([measure.high, measure.value], [measure.value, measure.low]) == pytest.approx(0.031, abs=0.004)


def test_mean_is_the_same_every_time():
    values = [0.0, 2.0, 7.0, 1.0]
    assert mean(values) == mean(values)
    assert mean(values).low < mean(values).value < mean(values).high
