"""Intervals against published numbers, and what every interval must do."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from jax_backtrack.evaluation.stats import (
    kappa,
    mean,
    over_seeds,
    paired,
    perplexity,
    reduction_over_seeds,
    wilson,
    worst_of,
)


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
    measure = wilson([True] * hits + [False] * (count - hits))
    assert (measure.value, measure.count) == (hits / count, count)
    assert (measure.low, measure.high) == pytest.approx((low, high), abs=5e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_wilson_interval_holds_the_share_and_mirrors(hits):
    measure, mirrored = wilson(hits), wilson([not hit for hit in hits])
    assert 0 <= measure.low <= measure.value <= measure.high <= 1
    assert measure.low == pytest.approx(1 - mirrored.high)
    assert wilson(hits * 4).high - wilson(hits * 4).low < measure.high - measure.low


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


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemars_p_value_is_that_of_the_exact_binomial_test(hits):
    here, baseline = zip(*hits, strict=True)
    found = paired(here, baseline, resamples=10)
    disagree = found.only_here + found.only_baseline
    assert disagree == sum(one != other for one, other in hits)
    expected = binomtest(found.only_here, disagree).pvalue if disagree else 1.0
    assert found.p_value == pytest.approx(expected)


def test_a_reduction_holds_its_value_and_needs_a_baseline_with_hits():
    found = paired([True] * 5 + [False] * 95, [True] * 20 + [False] * 80)
    assert found.reduction.value == pytest.approx(0.75)
    assert 0.4 < found.reduction.low < 0.75 < found.reduction.high < 1
    assert paired([True, False], [False, False]).reduction is None
    with pytest.raises(ValueError, match="2 and 3 prompts"):
        paired([True, False], [True, False, True])


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_worst_of_k_is_the_mean_over_all_choices_of_k(samples):
    for k in range(1, 6):
        chosen = [any(choice) for hits in samples for choice in itertools.combinations(hits, k)]
        assert worst_of(samples, k).value == pytest.approx(np.mean(chosen))


def test_over_seeds_is_the_mean_with_what_prompts_and_seeds_do_to_it():
    same = np.tile(np.arange(40) % 4 == 0, (3, 1))
    found, of_one_seed = over_seeds(same), over_seeds(same[:1])
    assert found.value == of_one_seed.value == 0.25 and found.count == 40
    assert (found.low, found.high) == (of_one_seed.low, of_one_seed.high)  # seeds that agree tell no more than one
    apart = over_seeds(np.array([[False] * 40, [True] * 40]))
    assert (apart.low, apart.value, apart.high) == (0, 0.5, 1)
    assert over_seeds(np.zeros((3, 40), bool)) == wilson([False] * 40)
    assert over_seeds(np.full((2, 40), 48.0)).high == 48


def test_a_reduction_over_seeds_draws_a_seeds_two_models_together():
    baseline = np.array([[True] * 20 + [False] * 20, [True] * 40])
    found = reduction_over_seeds(baseline & (np.arange(40) % 2 == 0), baseline)
    assert found.value == pytest.approx(0.5) and 0.3 < found.low < 0.5 < found.high < 0.7
    assert reduction_over_seeds(baseline, baseline & False) is None
    with pytest.raises(ValueError, match="not the same ones"):
        reduction_over_seeds(baseline, baseline[:1])


@pytest.mark.filterwarnings("ignore")
def test_kappa_of_verdicts_that_are_all_alike_is_no_number():
    found = kappa(np.ones(6, bool), np.ones(6, bool), np.arange(6))
    assert np.isnan([found.value, found.low, found.high]).all() and found.count == 6


def test_an_interval_of_one_observation_has_no_width():
    assert (found := mean([3.0])) and (found.low, found.value, found.high) == (3, 3, 3)


def test_perplexity_is_of_tokens_and_not_of_replies():
    found = perplexity([-1.0, -9.0], [1, 3])
    assert found.value == pytest.approx(np.exp(10 / 4))
    assert found.low == pytest.approx(np.exp(1)) and found.high == pytest.approx(np.exp(3))


def test_where_the_worst_is_the_same_of_every_prompt_the_interval_is_that_of_the_prompts_alone():
    assert worst_of([[True, False]] * 8, 2) == wilson([True] * 8)
    assert worst_of([[False, False]] * 8, 2) == wilson([False] * 8)


def test_worst_of_more_than_the_samples_is_refused():
    with pytest.raises(ValueError, match="worst of 3"):
        worst_of([[True, False], [True, True]], 3)
    with pytest.raises(ValueError, match="the same number of each"):
        worst_of([[True, False], [True]], 1)
