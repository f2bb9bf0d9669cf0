"""Processes of their own that tests start: without torch, on virtual devices of the CPU."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join([str(ROOT / "tests" / "without_torch"), str(ROOT)])
# A tiny model takes much longer to compile than to run. Without fusion emitters it takes a third of the time; releases
# that cannot do without them end the process, silently, where the flag is set.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
COMPILE_FAST += " --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"


def start(
    *arguments, cwd: Path = ROOT, devices: int = 1, stdin=None, stderr=subprocess.PIPE, **environment
) -> subprocess.Popen:
    """Python with these arguments, on so many devices, compiling as this process does."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    settings = {"PYTHONPATH": PYTHONPATH, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "XLA_FLAGS": flags}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | settings | environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def wait_for_checkpoint(workdir: Path, above: int, running: Sequence[subprocess.Popen]) -> int:
    """Waits for a checkpoint behind step `above` and returns the newest one's step; none of the processes may end."""
    while True:
        steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
        if max(steps, default=0) > above:
            return max(steps)
        for process in running:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)
