"""Training, saving, the reference pass, export and evaluation are killed at random moments, and started again: in the
end everything is as if nothing had happened."""

import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import processes
from tests.test_hosts import assert_same_run
from tests.test_training import base, flags_of  # noqa: F401

KILLS = {"start": 3, "steps": 8, "saving": 8, "export": 6, "reference": 6, "evaluation": 6}
SEED = 0
SFT = dict(steps=120, batch_rows=1, row_length=128, checkpoint_every=4)
DPO = dict(steps=8, row_length=128, checkpoint_every=4, learning_rate=1e-4)
# Starts `main.py` with the arguments of each line that it reads, as a process that need not import anything any more;
# answers with its number, and when it has ended with its status.
STARTER = """
import json, os, runpy, sys
import jax_backtrack.command_line, configs.dpo_smollm
for line in sys.stdin:
    if not (child := os.fork()):
        sys.argv = ["main.py", *json.loads(line)]
        log = os.open(sys.argv.pop(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        runpy.run_path("main.py", run_name="__main__")
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@dataclasses.dataclass
class Starter:
    """Starts processes, and kills them when it is told to."""

    process: subprocess.Popen
    log: Path

    def run(self, command: list, until: Callable[[], bool] | None = None, delay: float = 0.0) -> bool:
        """Runs a command to its end, or kills it `delay` seconds after `until` says True. Whether it was killed."""
        self.process.stdin.write(json.dumps([*map(str, command), str(self.log)]) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if until:
            while not until() and os.path.exists(f"/proc/{child}"):
                time.sleep(0.001)
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = int(self.process.stdout.readline())
        assert status in (0, signal.SIGKILL), self.log.read_text()
        return status == signal.SIGKILL


@pytest.fixture
def starter(tmp_path):
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    process = processes.start("-c", STARTER, stdin=subprocess.PIPE, stderr=None, **cache)
    yield Starter(process, tmp_path / "log")
    process.stdin.close()
    process.wait()


def commands(base, folder: Path) -> dict[str, list]:  # noqa: F811
    evaluation = ["--mode=evaluate", "--config.evaluate.prompts=6", "--config.sample.max_new_tokens=12"]
    sft, dpo = flags_of(base, folder / "sft", **SFT), flags_of(folder / "sft", folder / "dpo", "dpo", **DPO)
    return {"sft": sft, "dpo": dpo, "evaluation": [*dpo, *evaluation]}


def moments(folder: Path, seconds: float) -> dict[str, tuple[str, Callable[[], bool], float]]:
    """Of each kind of kill the command, what is waited for, and within how many seconds behind that it comes.

    seconds: that an evaluation takes
    """

    def lines() -> int:
        file = folder / "sft/metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    seen = collections.Counter()

    def goes_on() -> bool:
        """Whether a step was written since the last kill; those behind the checkpoint are taken out first."""
        now = lines()
        begun = seen["lines"] and now > seen["lines"]
        seen["lines"] = now
        return bool(begun)

    return {
        "start": ("sft", lambda: True, 2.0),
        "steps": ("sft", goes_on, 0.1),
        "saving": ("sft", lambda: any((folder / "sft/checkpoints").glob("*tmp*")), 0.02),
        "export": ("sft", (folder / "sft/export.writing").exists, 0.02),
        "reference": ("dpo", (folder / "dpo/config.json").exists, 1.0),
        "evaluation": ("evaluation", lambda: True, seconds),
    }


def test_whatever_is_killed_goes_on_as_if_it_had_not_been(base, tmp_path, starter, record_property):  # noqa: F811
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for command in commands(base, undisturbed).values():
        begun = time.monotonic()
        starter.run(command)
    seconds = time.monotonic() - begun

    chance, kills = random.Random(SEED), collections.Counter()
    plan = moments(disturbed, seconds)
    todo = commands(base, disturbed)
    for kind, (name, until, within) in plan.items():
        for _ in range(KILLS[kind]):
            kills[kind] += starter.run(todo[name], until, chance.uniform(0, within))
        if kind in ("export", "reference"):
            starter.run(todo[name])
    starter.run(todo["evaluation"])
    record_property("kills", dict(kills))
    print(f"killed {kills.total()} times: {dict(kills)}")
    assert kills.total() >= 30 and all(kills[kind] for kind in KILLS)

    assert_same_run(undisturbed / "sft", disturbed / "sft")
    assert_same_run(undisturbed / "dpo", disturbed / "dpo")
    one, other = (
        {path.name: np.load(path) for path in (where / "dpo/reference").iterdir()} for where in (undisturbed, disturbed)
    )
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert (undisturbed / "dpo/evaluation.json").read_text() == (disturbed / "dpo/evaluation.json").read_text()
    left = [path for path in disturbed.rglob("*") if any(word in path.name for word in ("writing", "tmp", "partial"))]
    assert not left
