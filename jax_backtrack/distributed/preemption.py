"""SIGTERM, as a preemption sends it, and Ctrl-C: what runs comes to a place where it can be gone on from, and says so.

A launcher starts the same command again behind the exit code `RESTART`. Of several hosts JAX's preemption service
carries the SIGTERM of one to all, and they stop behind the same step.
"""

import contextlib
import signal
from collections.abc import Iterator

from jax.experimental import multihost_utils

from jax_backtrack.distributed import hosts

RESTART = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on
_CTRL_C = 128 + signal.SIGINT  # what shells give a command that Ctrl-C ended

_asked: signal.Signals | None = None
_deferred = False


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to end. `code` is what it should end with."""

    def __init__(self, number: signal.Signals, left: str = "what was finished is kept"):
        super().__init__(f"{number.name} came; {left}; the same command goes on")
        self.code = _CTRL_C if number == signal.SIGINT else RESTART


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Here SIGTERM and Ctrl-C raise Interrupted, in the main thread, which must enter this; behind it they do what they
    did before, and what came is forgotten.

    Of several hosts SIGTERM is left to JAX's preemption service, which took it over when they met.
    """
    global _asked
    _asked = None
    numbers = [signal.SIGINT] if hosts.several() else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, _take) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = None


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Here a first signal waits to be asked for (`asked`); a second one raises Interrupted at once."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def asked(step: int) -> signal.Signals | None:
    """Returns the signal that asks for an end behind this step, if any; to be called behind every step, on every
    host."""
    if hosts.several() and multihost_utils.reached_preemption_sync_point(step):
        return signal.SIGTERM
    return _asked


def _take(number: int, _frame) -> None:
    global _asked
    again, _asked = _asked is not None, signal.Signals(number)
    if not _deferred or again:
        raise Interrupted(_asked)
