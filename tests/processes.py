"""Processes of their own that tests start: without torch, on virtual devices of the CPU."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
HANG = 900  # seconds that nothing takes which does not hang, however slow or busy the machine is
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


# main.py, which sends itself a signal behind step N of a run, or once a checkpoint behind step N is there. One from
# outside would come when the machine has time for it, and the run may have ended by then.
_SIGNALLED = """
import os, runpy, sys
from pathlib import Path
from jax_backtrack.training.checkpoints import newest_step
from jax_backtrack.training.metrics import MetricsWriter

number, moment, behind, workdir = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
write, sent = MetricsWriter.write, False

def write_and_look(self, step, metrics):
    global sent
    write(self, step, metrics)
    if not sent and (step >= behind if moment == "step" else (newest_step(workdir) or 0) > behind):
        sent = True
        os.kill(os.getpid(), number)

MetricsWriter.write = write_and_look
sys.argv = sys.argv[5:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_main(
    *arguments, signalled: signal.Signals | None = None, step: int = 0, checkpoint: int = 0, **settings
) -> subprocess.Popen:
    """main.py with these arguments. A training that is `signalled` sends that signal to itself: when the metrics of
    step `step` are written or, where none is given, at the first step that finds a checkpoint behind step `checkpoint`.
    """
    arguments = [ROOT / "main.py", *map(str, arguments)]
    if signalled is None:
        return start(*arguments, **settings)
    (workdir,) = (each.removeprefix("--workdir=") for each in arguments[1:] if each.startswith("--workdir="))
    moment = ("step", step) if step else ("checkpoint", checkpoint)
    return start("-c", _SIGNALLED, int(signalled), *moment, workdir, *arguments, **settings)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port for the coordinator of several processes, which no other program gets meanwhile: one that is asked for any
    port is not given it, and JAX's coordinator binds it all the same, because it shares its port."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("localhost", 0))
        yield reserved.getsockname()[1]


@contextlib.contextmanager
def full_after(size: int):
    """Files cannot grow beyond `size` bytes, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
