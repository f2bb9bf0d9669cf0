"""Loading onto a mesh: every device has its part, and every process reads what its devices need and no more."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.checkpoints import TOLERANCE, port, random_model, random_tokens, relative_error
from tests.processes import HANG, ROOT, reserved_port

PROGRAM = """
import sys
import jax, numpy as np
from flax import nnx
folder, out, processes, index, port_number, data, fsdp, tensor = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
if processes > 1:
    jax.distributed.initialize(f"localhost:{port_number}", processes, index)

import json
from pathlib import Path
import jax_backtrack
from tests.chat_tokenizers import small_tokenizer
from jax_backtrack.hub.safetensors_folder import SafetensorsFolder
from jax_backtrack.distributed.mesh import make_mesh
from tests.checkpoints import port

read = 0

class Counting(SafetensorsFolder):
    def read(self, name, index):
        global read
        part = super().read(name, index)
        read += part.size
        return part

import tests.checkpoints
tests.checkpoints.SafetensorsFolder = Counting
model = port(Path(folder), mesh=make_mesh(data, fsdp, tensor))
params = nnx.to_flat_state(nnx.state(model, nnx.Param))
elements = sum(param.size for _, param in params)
held = sum(sum({str(s.index): s.data.size for s in param[...].addressable_shards}.values()) for _, param in params)
jax_backtrack.save(model, small_tokenizer(), out)
if processes == 1:
    np.save(Path(out) / "logits.npy", model(tests.checkpoints.random_tokens((4, 40))))
print("READ", read, "HELD", held, "ELEMENTS", elements, flush=True)
"""


def run(folder, out, processes: int, devices: int, mesh: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """Runs the program. Elements read by each process, on its devices (copies not counted), and of the whole model."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    with reserved_port() as port_number:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, (folder, out, processes, index, port_number, *mesh))],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": "."},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(processes)
        ]
        said = [process.communicate(timeout=HANG) for process in started]
    results = []
    for process, (printed, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors
        results.append(tuple(map(int, re.search(r"READ (\d+) HELD (\d+) ELEMENTS (\d+)", printed).groups())))
    return results


def contents(folder: Path) -> dict:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_files(one: Path, other: Path) -> None:
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize(
    "shape,processes,devices,mesh,share",
    [
        ("Gemma-2-2B", 1, 8, (2, 2, 2), 1),
        ("Llama-3.1-8B", 2, 2, (1, 2, 2), 0.5),
        ("Llama-3.1-8B", 2, 1, (2, 1, 1), 1),
    ],
)
def test_devices_hold_their_parts_and_processes_read_no_more(tmp_path, shape, processes, devices, mesh, share):
    """Each process reads its share of the parameters. What is saved, and the logits, are those of one device."""
    random_model(shape).save_pretrained(tmp_path / "in")
    for read, held, elements in run(tmp_path / "in", tmp_path / "out", processes, devices, mesh):
        assert read == held
        assert held == pytest.approx(share * elements, rel=0.01)
    assert_same_files(tmp_path / "in", tmp_path / "out")
    if processes == 1:
        alone = port(tmp_path / "in")(random_tokens((4, 40)))
        assert relative_error(np.load(tmp_path / "out" / "logits.npy"), alone) < TOLERANCE
