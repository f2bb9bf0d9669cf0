"""From SIGTERM to a whole checkpoint: what a preempted machine has to wait for.

    python -m benchmarks.preemption

Trains SmolLM2-135M on the testbed as `main.py` does, in a process of its own; sends it SIGTERM at random moments of its
steps, and measures how long it takes until the newest checkpoint is whole and until the process has ended. The step
that is running when the signal comes is ended first, and steps are taken while the one before is looked at, so the time
of a step is shown beside them; so is that of a fingerprint of the weights, of which a checkpoint computes one over
weights and optimizer.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from flax import nnx

from benchmarks.worker import ROOT, print_table, say, write_model
from jax_backtrack import load
from jax_backtrack.distributed.preemption import RESTART
from jax_backtrack.utils.fingerprint import fingerprint

STEPS = 1000  # more than a round takes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="of a batch, of 256 tokens each")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    chance, rounds = random.Random(0), []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_model("", scratch / "model")
        fingerprint = _seconds_of_fingerprint(scratch / "model")
        for number in range(1, options.rounds + 1):
            rounds.append(_one(scratch, options.rows, chance))
            say(f"round {number} of {options.rounds}: {rounds[-1]}")
        size = sum(file.stat().st_size for file in (scratch / "run/checkpoints").rglob("*") if file.is_file())
        size //= len(list((scratch / "run/checkpoints").glob("[0-9]*")))
    found = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    found |= {"fingerprint": fingerprint}
    print_table([("seconds, medians", *found), ("", *(f"{seconds:.2f}" for seconds in found.values()))])
    print(f"a checkpoint has {size / 1e9:.2f} GB; 'fingerprint' is that of the weights alone")
    found |= {"checkpoint_bytes": size}
    print(json.dumps(found))


def _one(scratch: Path, rows: int, chance: random.Random) -> dict[str, float]:
    """Starts or resumes the run, lets it take some steps, and stops it by SIGTERM."""
    workdir = scratch / "run"
    flags = {
        "model.path": scratch / "model",
        "data.path": "testbed",
        "train.steps": STEPS,
        "train.batch_size": rows,
        "train.max_seq_len": 256,
        "train.checkpoint_every_steps": STEPS,
    }
    command = [sys.executable, "main.py", "--config=sft_smollm.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    seen = _steps(workdir)
    with (scratch / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        while len(_steps(workdir)) < len(seen) + 4 and process.poll() is None:
            time.sleep(0.05)
        step = _steps(workdir)[-1]["seconds"] - _steps(workdir)[-2]["seconds"]
        time.sleep(chance.uniform(0, step))
        before, sent = set(_checkpoints(workdir)), time.perf_counter()
        process.send_signal(signal.SIGTERM)
        while not set(_checkpoints(workdir)) - before and process.poll() is None:
            time.sleep(0.005)
        whole = time.perf_counter() - sent
        code = process.wait()
        ended = time.perf_counter() - sent
    if code != RESTART:
        raise SystemExit(f"the run ended with {code}:\n{(scratch / 'log').read_text()[-4000:]}")
    return {"step": step, "until_whole": whole, "until_ended": ended}


def _steps(workdir: Path) -> list[dict]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _checkpoints(workdir: Path) -> list[str]:
    """Whole ones; others have names that are no numbers."""
    return [path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def _seconds_of_fingerprint(folder: Path) -> float:
    """Of the model's parameters, once it is compiled."""
    params = nnx.state(load(str(folder))[0], nnx.Param)
    fingerprint(params)
    started = time.perf_counter()
    fingerprint(params)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
