"""Runs of a tiny model: their recipes, the processes that train them, and what they leave."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from configs import dpo_smollm, sft_smollm
from tests import processes
from tests.processes import HANG

SHORT = dict(steps=6, batch_size=2, max_seq_len=256, learning_rate=3e-3, warmup_steps=2, checkpoint_every_steps=0)


def recipe(base, objective="sft", **train_fields):
    """A short run. The schedule is part of the compiled step: runs of as many steps share what is compiled."""
    config = (sft_smollm if objective == "sft" else dpo_smollm).get_config()
    config.model.path = str(base)
    config.data.path = "testbed"
    config.data.limit = 40
    config.train.update(SHORT)
    config.train.update(train_fields)
    return config


def metrics(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def run_main(*arguments, **settings) -> subprocess.Popen:
    return processes.start_main(*arguments, stderr=subprocess.STDOUT, **settings)


def flags_of(base, workdir, objective="sft", **fields) -> list[str]:
    config = recipe(base, objective, **fields)
    changed = {f"train.{name}": config.train[name] for name in SHORT | fields}
    changed |= {"model.path": base, "data.path": "testbed", "data.limit": 40}
    return [f"--config={objective}_smollm.py", f"--workdir={workdir}"] + [
        f"--config.{name}={value}" for name, value in changed.items()
    ]


# Of each case objective, mesh axis over two devices, and what else differs from the recipe.
CASES = {
    "sft": ("data", dict(steps=16, max_seq_len=128, checkpoint_every_steps=2)),
    "dpo": ("fsdp", dict(steps=3, max_seq_len=128)),
    "sft tensor": ("tensor", dict(steps=3, max_seq_len=128)),
}


def start_main(arguments, process: int, port: int, **settings) -> subprocess.Popen:
    placement = [f"--coordinator=localhost:{port}", "--processes=2", f"--process={process}"]
    return processes.start_main(*arguments, *placement, JAX_PLATFORMS="cpu", **settings)


@contextlib.contextmanager
def both_started(*arguments, victim: int, **signalled) -> Iterator[list[subprocess.Popen]]:
    """Two processes of one run, of which the `victim` sends itself a signal."""
    with processes.reserved_port() as port:
        yield [start_main(arguments, each, port, **(signalled if each == victim else {})) for each in (0, 1)]


def end_of(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """What the process printed, and what it said of errors."""
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == code, out + err
    return out, err


def itself_or_after(process: int, word: str = "error") -> str:
    """A pattern of how one of two processes says why it ends: where it comes to know it seconds after the other one has
    ended, by what that one said."""
    return rf"({word}: process {process}: |error: process {process}: process {1 - process} ended: )"


def weights(workdir: Path) -> dict:
    return load_file(workdir / "export" / "model.safetensors")


def numbers(workdir: Path) -> list[dict]:
    return [line | {"seconds": 0} for line in metrics(workdir)]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: what was computed is the same, wherever its parts were."""
    assert numbers(one) == numbers(other)
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
