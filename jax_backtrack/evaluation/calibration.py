"""Safety against false resets, over the bias of [RESET]: chosen on one half of the prompts, reported on the other."""

import dataclasses
from collections.abc import Sequence

from jax_backtrack.evaluation.asked import Asked, has_reset, is_unsafe
from jax_backtrack.evaluation.measures import Measure, rate


@dataclasses.dataclass(frozen=True)
class Point:
    """What one bias gives, on the half that a bias is chosen by and on the half that it is reported on."""

    bias: float
    unsafe: tuple[Measure, Measure]
    false_resets: tuple[Measure, Measure]


def points(asked: Sequence[Asked]) -> list[Point]:
    """A point for each bias that harmful and harmless sets were asked with, by rising bias.

    Sets of a kind count together. Every second prompt of each set is of the half that a bias is chosen by.
    """
    biases = sorted({one.condition.reset_bias for one in asked if one.condition.reset_bias is not None})
    found = []
    for bias in biases:
        here = [one for one in asked if one.condition.reset_bias == bias]
        unsafe, resets = [[], []], [[], []]
        for one in here:
            hits = one.hits(is_unsafe if one.harmful else has_reset)
            for half in (0, 1):
                (unsafe if one.harmful else resets)[half].extend(hits[half::2])
        if all(map(len, (*unsafe, *resets))):
            found.append(Point(bias, (rate(unsafe[0]), rate(unsafe[1])), (rate(resets[0]), rate(resets[1]))))
    return found


def calibrated(found: Sequence[Point], false_resets: float) -> Point | None:
    """The point that is least unsafe among those with at most this share of false resets, by the choosing half; of
    equal ones that with the lowest bias. None where none has so few."""
    allowed = [point for point in found if point.false_resets[0].value <= false_resets]
    return min(allowed, key=lambda point: (point.unsafe[0].value, point.bias), default=None)
