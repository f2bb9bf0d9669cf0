"""Training, saving, the reference pass, export and evaluation are killed at random moments, and started again: in the
end everything is as if nothing had happened."""

import collections
import dataclasses
import json
import random
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests import processes
from tests.runs import assert_same_run, flags_of

KILLS = {"start": 6, "steps": 6, "saving": 6, "export": 4, "reference": 4, "evaluation": 3, "replies": 2}
SEED = 0
SFT = dict(steps=56, batch_size=1, max_seq_len=128, checkpoint_every_steps=4)
DPO = dict(steps=8, max_seq_len=128, checkpoint_every_steps=4, learning_rate=1e-4)
# Starts `main.py` with the arguments of each line that it reads, as a process that need not import anything any more;
# answers with its status, and the seconds of processors that it took, when it has ended. The kernel ends it, as by
# SIGKILL, when it has taken `seconds` more from a moment on: the first time that it opens, makes or renames what
# `moment` is found in. So it is killed at the same kind of work however slow or busy the machine is.
STARTER = """
import json, os, re, runpy, signal, sys
import jax_backtrack.cli, configs.dpo_smollm

def limit(moment, seconds):
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which libtpu ignores, and with it all that its process starts
    if not moment:
        return signal.setitimer(signal.ITIMER_PROF, seconds)
    waiting = [re.compile(moment)]

    def look(event, arguments):
        if waiting and event in ("open", "os.mkdir", "os.rename") and waiting[0].search(f"{event} {arguments[0]}"):
            waiting.clear()
            signal.setitimer(signal.ITIMER_PROF, seconds)

    sys.addaudithook(look)

for line in sys.stdin:
    log, end, arguments = json.loads(line)
    if not (child := os.fork()):
        log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["main.py", *arguments]
        if end:
            limit(*end)
        runpy.run_path("main.py", run_name="__main__")
    _, status, used = os.wait4(child, 0)
    print(status, used.ru_utime + used.ru_stime, flush=True)
"""


@dataclasses.dataclass
class Starter:
    """Starts processes, which may be killed."""

    process: subprocess.Popen
    log: Path

    def run(self, command: list, moment: str | None = None, seconds: float = 0.0) -> tuple[bool, float]:
        """Runs a command to its end, or until it is killed, `seconds` of processors behind the moment. Whether it was
        killed, and the seconds of processors that it took."""
        end = None if moment is None else [moment, max(seconds, 0.001)]
        self.process.stdin.write(json.dumps([str(self.log), end, [*map(str, command)]]) + "\n")
        self.process.stdin.flush()
        status, used = self.process.stdout.readline().split()
        assert int(status) in (0, signal.SIGPROF), self.log.read_text()
        return int(status) == signal.SIGPROF, float(used)


@pytest.fixture
def starter(tmp_path):
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    process = processes.start("-c", STARTER, stdin=subprocess.PIPE, stderr=None, **cache)
    yield Starter(process, tmp_path / "log")
    process.stdin.close()
    process.wait()


def commands(base, folder: Path) -> dict[str, list]:
    evaluation = ["--mode=evaluate", "--config.evaluate.prompts=6", "--config.sample.max_new_tokens=12"]
    sft, dpo = flags_of(base, folder / "sft", **SFT), flags_of(folder / "sft", folder / "dpo", "dpo", **DPO)
    return {"sft": sft, "dpo": dpo, "evaluation": [*dpo, *evaluation]}


def moments(seconds: float) -> dict[str, tuple[str, str, float]]:
    """Of each kind of kill the command, the moment from which its time runs, and how much that is at most, in
    processors' seconds.

    seconds: that an evaluation takes which compiles nothing any more, as those that are killed
    """
    saving = "os.mkdir .*sft/checkpoints/.*tmp"
    return {
        "start": ("sft", "", 1.0),
        "steps": ("sft", saving, 0.5),
        "saving": ("sft", saving, 0.04),
        "export": ("sft", "os.mkdir .*sft/export.writing", 0.04),
        "reference": ("dpo", "os.rename .*dpo/recipe.json.writing", 0.5),
        "evaluation": ("evaluation", "", seconds / 3),
        "replies": ("evaluation", "open .*evaluation.json.partial.writing", 0.04),
    }


def test_whatever_is_killed_goes_on_as_if_it_had_not_been(base, tmp_path, starter, record_property):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for command in commands(base, undisturbed).values():
        starter.run(command)
    _, seconds = starter.run(commands(base, undisturbed)["evaluation"])

    chance, kills = random.Random(SEED), collections.Counter()
    todo = commands(base, disturbed)
    for kind, (name, moment, most) in moments(seconds).items():
        for _ in range(KILLS[kind]):
            killed, _ = starter.run(todo[name], moment, chance.uniform(0, most))
            kills[kind] += killed
        if kind in ("export", "reference"):
            starter.run(todo[name])
    starter.run(todo["evaluation"])
    record_property("kills", dict(kills))
    print(f"killed {kills.total()} times: {dict(kills)}")
    assert kills == KILLS

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
