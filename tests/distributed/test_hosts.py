"""Several hosts, as processes on this machine: they train what one trains, agree first, and end together."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from configs import sft_smollm
from jax_backtrack import cli
from jax_backtrack.data.rows import batches
from jax_backtrack.distributed import hosts
from jax_backtrack.errors import InputError
from jax_backtrack.training.checkpoints import newest_step
from tests import processes
from tests.chat_tokenizers import DATED, EARLY, LATE
from tests.processes import HANG, ROOT
from tests.runs import CASES, assert_same_run, both_started, end_of, flags_of, itself_or_after, metrics, start_main

# Trains all cases in one go, which costs one start of Python for them all.
PROGRAM = """
import sys
from pathlib import Path
from jax_backtrack.distributed import hosts
processes, process, port, base, folder = *map(int, sys.argv[1:4]), *sys.argv[4:]
if processes > 1:
    hosts.start(f"localhost:{port}", processes, process)
from jax_backtrack.training.loop import train
from tests.runs import CASES, recipe
for name, (axis, fields) in CASES.items():
    config = recipe(base, name.split()[0], **fields)
    config.mesh.data = 1
    config.mesh[axis] = 2
    if name == "sft tensor":
        config.model.chat_template = f"{folder}/dated.jinja"
    train(config, Path(folder) / name)
hosts.finish()
"""


def start(*arguments, devices=1, **settings) -> subprocess.Popen:
    return processes.start(*arguments, devices=devices, JAX_PLATFORMS="cpu", **settings)


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def one_process(base, tmp_path_factory) -> Path:
    """All cases, trained by one process with two devices."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "dated.jinja").write_text(DATED)
    end_of(start("-c", PROGRAM, 1, 0, 0, base, folder, devices=2, TZ=EARLY))
    return folder


@pytest.fixture(scope="module")
def two_processes(base, tmp_path_factory) -> tuple[Path, list[str]]:
    """All cases, trained by two processes with one device each; and what they printed. To the second it is another day,
    which a chat template prints in one case."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "dated.jinja").write_text(DATED)
    with processes.reserved_port() as port:
        zones = enumerate((EARLY, LATE))
        started = [start("-c", PROGRAM, 2, process, port, base, folder, TZ=zone) for process, zone in zones]
        return folder, [end_of(process)[0] for process in started]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(one_process, two_processes, case):
    assert_same_run(one_process / case, two_processes[0] / case)
    assert len(metrics(one_process / case)) == CASES[case][1]["steps"]


def test_the_reference_has_one_name_wherever_its_weights_lie(one_process, two_processes):
    (one,), (two,) = ((folder / "dpo" / "reference").iterdir() for folder in (one_process, two_processes[0]))
    assert one.name == two.name
    np.testing.assert_array_equal(np.load(one), np.load(two))


def test_only_the_first_process_prints_and_writes(one_process, two_processes):
    folder, (first, second) = two_processes
    assert "sft steps" in first and "testbed: 40 rows" in first
    assert not [line for line in second.splitlines() if line and not line.startswith("[Gloo]")]
    for case in CASES:
        one, two = (
            {re.sub(r"\d{6,}.*", "", str(path.relative_to(where / case))) for path in (where / case).glob("[!c]*/**/*")}
            for where in (one_process, folder)
        )
        assert one == two
        assert {path.name for path in (folder / case).glob("[cr]*")} - {"checkpoints", "reference"} == {"recipe.json"}
        assert len(list((folder / case / "tensorboard").iterdir())) == 1


def test_when_one_is_killed_the_other_ends_and_both_go_on_where_they_were(base, one_process, tmp_path):
    """First the second process is killed, when the other is about to save a checkpoint with it, then, in the run that
    resumes, the first one, where all meet. What is left is trained by one process, and the whole is bit for bit what
    one process makes without a disturbance."""
    arguments = flags_of(base, tmp_path / "w", **CASES["sft"][1])
    reached = 0
    for victim in (1, 0):
        moment = dict(step=6) if victim else dict(checkpoint=reached)
        with both_started(*arguments, victim=victim, signalled=signal.SIGKILL, **moment) as both:
            both[victim].wait(timeout=HANG)
            killed = time.monotonic()
            out, err = end_of(both[1 - victim], code=1)
        assert both[victim].returncode == -signal.SIGKILL, both[victim].communicate()
        reached = newest_step(tmp_path / "w")
        print(f"process {victim} killed at step {reached}; the other ended after {time.monotonic() - killed:.1f} s")
        (line,) = said(err)
        assert line.startswith(f"error: process {1 - victim}: ")
        assert f"process {victim} stopped without a word; the same command" in line
    out, _ = end_of(start(ROOT / "main.py", *arguments, devices=2))
    assert int(re.search(r"resumed from step (\d+)", out)[1]) >= reached
    assert_same_run(one_process / "sft", tmp_path / "w")


def test_hosts_that_do_not_agree_on_recipe_or_step_stop_and_name_it(base, tmp_path):
    """They find each other by the environment of two TPU slices, and have a workdir each, one of them with a step."""
    (tmp_path / "1" / "checkpoints" / "6").mkdir(parents=True)
    slices = dict(JAX_FORCE_TPU_INIT="1", MEGASCALE_COORDINATOR_ADDRESS="localhost", MEGASCALE_NUM_SLICES="2")
    slices |= dict(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    with processes.reserved_port() as port:
        slices["JAX_COORDINATOR_PORT"] = str(port)
        both = [
            start(
                ROOT / "main.py",
                *flags_of(base, tmp_path / str(process), learning_rate=0.1 * (1 + process)),
                MEGASCALE_SLICE_ID=str(process),
                **slices,
            )
            for process in (0, 1)
        ]
        errors = [end_of(each, code=2)[1] for each in both]
    for process, err in enumerate(errors):
        (line,) = said(err)
        told = (
            "the hosts do not agree on config.train.learning_rate (0.1 on process 0; 0.2 on process 1), "
            "the step to resume from (no checkpoint on process 0; step 6 on process 1)"
        )
        assert re.fullmatch(itself_or_after(process) + re.escape(told), line)
        assert "Traceback" not in err
    assert not (tmp_path / "0").exists()


@pytest.mark.parametrize("second", ["other data", "no data"])
def test_hosts_with_other_data_stop_and_name_it(base, tmp_path, second):
    """The same relative path, each process in a folder of its own."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for process, folder in enumerate(folders):
        folder.mkdir()
        rows = [{"prompt": "Hi", "chosen": f"Hello {row}", "rejected": "No"} for row in range(4 + process)]
        if not process or second == "other data":
            (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [*flags_of(base, tmp_path / "w"), "--config.data.path=pairs.jsonl"]
    with processes.reserved_port() as port:
        both = [start_main(arguments, process, port, cwd=folder) for process, folder in enumerate(folders)]
        errors = [end_of(each, code=2)[1] for each in both]
    for process, err in enumerate(errors):
        (line,) = said(err)
        assert line.startswith(f"error: process {process}: ") and "Traceback" not in err
        if second == "other data":
            assert re.search(r"agree on the data \(4 examples .* on process 0; 5 examples .* on process 1\)", line)
        else:
            assert "pairs.jsonl is no file or folder here" in line
            assert process or "process 1 ended: " in line
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "placement,message",
    [
        (("localhost:80", 2, None), r"go together; missing: --process=I"),
        ((None, None, 0), r"missing: --coordinator=HOST:PORT, --processes=N"),
        (("localhost", 2, 0), "it must be HOST:PORT"),
        (("localhost:99999", 2, 0), "it must be HOST:PORT"),
        (("localhost:80", 2, 2), "--process=2 of --processes=2: processes are counted from 0"),
        (("localhost:80", 0, 0), "--processes=0"),
    ],
)
def test_flags_that_cannot_be_meant_are_named(placement, message):
    with pytest.raises(InputError, match=message):
        hosts.start(*placement)


def test_one_host_starts_nothing(monkeypatch):
    hosts.start()
    hosts.start("localhost:80", 1, 0)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    hosts.start()
    assert not hosts.several()


def test_the_other_modes_run_on_one_host(tmp_path, capsys):
    code = cli.run("sample", sft_smollm.get_config(), str(tmp_path), placement=("localhost:80", 2, 0))
    assert code == 2 and "error: --mode=sample runs on one host" in " ".join(capsys.readouterr().out.split())


def test_hosts_take_their_rows_and_the_data_position_is_everybodys():
    """Rows are their own numbers here."""
    rows = np.arange(24)
    whole, parts = batches(rows, 4), [batches(rows, 4, local) for local in ([0, 3], [1, 2])]
    for _ in range(2):
        batch, (one, other) = next(whole), (next(part) for part in parts)
        np.testing.assert_array_equal(batch[[0, 3]], one)
        np.testing.assert_array_equal(batch[[1, 2]], other)
    parts[1].set_state(whole.get_state())
    assert parts[0].get_state() == whole.get_state()
    np.testing.assert_array_equal(next(whole)[[1, 2]], next(parts[1]))
    assert len(list(parts[0])) == 4
