"""Safety against false resets, over the bias of [RESET]: chosen on one half of the prompts, reported on the other."""

import dataclasses
from collections.abc import Sequence

from jax_backtrack.evaluation.results import EvalResult, has_reset, is_unsafe
from jax_backtrack.evaluation.stats import Estimate, wilson


@dataclasses.dataclass(frozen=True)
class Point:
    """What one bias gives, on the half that a bias is chosen by and on the half that it is reported on."""

    bias: float
    unsafe: tuple[Estimate, Estimate]
    false_resets: tuple[Estimate, Estimate]


def points(results: Sequence[EvalResult]) -> list[Point]:
    """Returns a point for each bias that harmful and harmless sets were asked with, by rising bias.

    Sets of a kind count together. Every second prompt of each set is of the half that a bias is chosen by.
    """
    biases = sorted({result.condition.reset_bias for result in results if result.condition.reset_bias is not None})
    trade_off = []
    for bias in biases:
        at_bias = [result for result in results if result.condition.reset_bias == bias]
        unsafe, resets = [[], []], [[], []]
        for result in at_bias:
            hits = result.hits(is_unsafe if result.harmful else has_reset)
            for half in (0, 1):
                (unsafe if result.harmful else resets)[half].extend(hits[half::2])
        if all(map(len, (*unsafe, *resets))):
            trade_off.append(
                Point(bias, (wilson(unsafe[0]), wilson(unsafe[1])), (wilson(resets[0]), wilson(resets[1])))
            )
    return trade_off


def calibrated(trade_off: Sequence[Point], false_resets: float) -> Point | None:
    """Returns the point that is least unsafe among those with at most this share of false resets, by the choosing
    half; of equal ones that with the lowest bias. None where none has so few."""
    allowed = [point for point in trade_off if point.false_resets[0].value <= false_resets]
    return min(allowed, key=lambda point: (point.unsafe[0].value, point.bias), default=None)
