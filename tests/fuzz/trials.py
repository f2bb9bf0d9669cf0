"""Gives one part of the program many inputs, good and bad: each works, or is refused with one of our own errors, soon.

    @fuzz("prompt files", inputs=some_strategy)
    def test_prompt_files(given):
        read(given)

FUZZ_INPUTS inputs are tried, the same ones in every run. A test fails at an input that ends in any other exception,
takes longer than SECONDS or more memory than MEMORY; and where nearly all of the inputs are of one kind: valid ones
test no refusal, and garbage alone gets no further than the first check.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import resource
import signal
import sys
import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings

from jax_backtrack.errors import InputError

INPUTS = int(os.environ.get("FUZZ_INPUTS", "120"))
SECONDS = 5.0  # of the processor, for one input; by SIGVTALRM, since libtpu sends its process SIGPROF
MEMORY = 256 * 2**20  # bytes that one input may add
_LEAST_SHARE = 0.1  # of the inputs that work, and of those that are refused
_COUNTED_FROM = 100  # inputs, below which shares say little


class Refused(Exception):
    """What was given is refused, and that was said in another way than by an InputError."""


class Stuck(BaseException):
    """No Exception, so that no handler of the program takes it for an error of the input."""


@dataclasses.dataclass
class Tally:
    """What came of the inputs of one target; `slowest`: most seconds of the processor that one of them took; `memory`:
    the most bytes that one of them added."""

    target: str
    worked: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    memory: int = 0

    @property
    def tried(self) -> int:
        return self.worked + self.refused


TALLIES: list[Tally] = []


def fuzz(target: str, **strategies):
    """Makes a test of a function of the inputs that `strategies` draw, and of any fixtures.

    The function returns where the input works. It raises InputError, or Refused, where it is refused.
    """

    def decorate(check):
        @functools.wraps(check)
        def trial(*arguments, **named):
            _try(functools.partial(check, *arguments, **named), tally)

        # Hypothesis gives the inputs, pytest the fixtures: both look at the signature.
        trial.__signature__ = inspect.signature(check)
        many = settings(
            max_examples=INPUTS,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(trial))
        tally = Tally(target)

        def test(**fixtures):
            started = time.perf_counter()
            many(**fixtures)
            tally.seconds = time.perf_counter() - started
            TALLIES.append(tally)
            if tally.tried >= _COUNTED_FROM:
                share = tally.worked / tally.tried
                assert _LEAST_SHARE <= share <= 1 - _LEAST_SHARE, f"{tally}: the inputs are nearly all of one kind"

        parameters = inspect.signature(check).parameters.values()
        test.__signature__ = inspect.Signature([each for each in parameters if each.name not in strategies])
        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate


def _try(check, tally: Tally) -> None:
    _peak_memory()
    before, started = _peak_memory(), time.process_time()
    try:
        with _limits():
            check()
    except (InputError, Refused) as error:
        str(error).encode()  # what is said must be fit to be printed
        tally.refused += 1
    else:
        tally.worked += 1
    tally.slowest = max(tally.slowest, time.process_time() - started)
    grown = _peak_memory() - before
    tally.memory = max(tally.memory, grown)
    assert grown <= MEMORY, f"took {grown / 2**20:.0f} MiB"


@contextlib.contextmanager
def _limits():
    """Ends what takes too long; and memory, so that the machine survives what is asked of it."""

    def stop(*_):
        raise Stuck(f"took longer than {SECONDS:g} seconds")

    earlier, (soft, hard) = signal.signal(signal.SIGVTALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * MEMORY, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, earlier)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _peak_memory() -> int:
    """The most bytes that were resident since this was called the last time."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak.split()[1]) * 1024


def table() -> str:
    """What came of all targets, as a Markdown table."""
    lines = ["| target | inputs tried | worked | refused | seconds | slowest | most memory |", "|---|" + "---:|" * 6]
    lines += [
        f"| {each.target} | {each.tried:,} | {each.worked:,} | {each.refused:,} | {each.seconds:.0f} "
        f"| {1000 * each.slowest:.0f} ms | {each.memory / 2**20:.0f} MiB |"
        for each in TALLIES
    ]
    return "\n".join(lines)


assert sys.platform == "linux", "limits and /proc are those of Linux"
