"""What the fuzzing tests rest on: that they fail where they should."""

import numpy as np
import pytest

from jax_backtrack.errors import InputError
from tests.fuzz import trials
from tests.fuzz.trials import MEMORY, Stuck, Tally, _try


def refuse():
    raise InputError("no")


def crash():
    raise KeyError("another error than ours")


def take_memory():
    np.ones(2 * MEMORY, np.uint8)


def take_more_memory():
    np.ones(5 * MEMORY, np.uint8)


def hang():
    while True:
        try:
            sum(range(1000))
        except Exception:  # as a reader does that takes every error for one of its input
            raise InputError("no") from None


def test_what_works_and_what_is_refused_is_counted():
    tally = Tally("any")
    for check in (refuse, lambda: None, refuse):
        _try(check, tally)
    assert (tally.worked, tally.refused) == (1, 2)


@pytest.mark.parametrize(
    ("check", "error"),
    [(crash, KeyError), (take_memory, AssertionError), (take_more_memory, MemoryError), (hang, Stuck)],
)
def test_what_should_not_be_fails(check, error, monkeypatch):
    monkeypatch.setattr(trials, "SECONDS", 0.2 if check is hang else 60)
    with pytest.raises(error):
        _try(check, Tally("any"))
