"""Metrics on Weights & Biases, by the real package in its offline mode: what a run leaves in its own files."""

import importlib.util
import json
import shutil
import signal
import struct
import subprocess

import pytest

from configs import sft_smollm
from jax_backtrack import cli
from jax_backtrack.hub.export import save
from jax_backtrack.training.loop import train
from tests import processes, tiny

without_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="pip install -r requirements-wandb.txt"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    save(tiny.model(vocab_size=49152, max_position_embeddings=512), tokenizer, folder)
    return folder


def recipe(base, **train_fields):
    config = sft_smollm.get_config()
    config.model.path, config.data.path, config.data.limit = str(base), "testbed", 12
    config.train.update(dict(steps=4, max_seq_len=256, batch_size=2, checkpoint_every_steps=2) | train_fields)
    config.wandb.project = "backtracking"
    return config


@pytest.fixture(autouse=True)
def of_its_own(monkeypatch):
    """Processes that a test starts would share this one's service process of wandb, which outlives them. That may take
    its time to start and to answer."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    monkeypatch.setenv("WANDB__SERVICE_WAIT", str(processes.HANG))
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", str(processes.HANG))


def run_main(base, workdir, signalled=None, **train_fields):
    """The same recipe in a process of its own."""
    train_fields = dict(steps=4, max_seq_len=256, batch_size=2, checkpoint_every_steps=2) | train_fields
    return processes.start_main(
        *("--config=sft_smollm.py", f"--workdir={workdir}", f"--config.model.path={base}"),
        *("--config.data.path=testbed", "--config.data.limit=12", "--config.wandb.project=backtracking"),
        *(f"--config.train.{name}={value}" for name, value in train_fields.items()),
        signalled=signalled,
        stderr=subprocess.STDOUT,
        WANDB_MODE="offline",
    )


def records(path) -> list:
    """Records of a .wandb file: LevelDB's log format behind a header of 7 bytes, one protobuf message a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, found, parts = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or the last part of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


def sent(workdir) -> tuple[list[dict], list]:
    """Lines of history that all processes sent, in their order, and the run that each process said it is."""
    lines, runs = [], []
    for path in sorted((workdir / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                runs.append(record.run)
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                lines.append({name: json.loads(value) for name, value in items.items()})
    return lines, runs


@without_wandb
def test_a_resumed_run_goes_on_with_its_run_and_sends_every_step_once(base, tmp_path, monkeypatch):
    """Gone back to the checkpoint of step 2, when steps 3 and 4 were sent already."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = tmp_path / "mine"
    train(recipe(base), workdir)
    before = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines, (run,) = sent(workdir)
    names = before[0].keys() - {"step"}
    assert [line["_step"] for line in lines] == [1, 2, 3, 4]
    assert [{name: line[name] for name in names} for line in lines] == [
        {name: line[name] for name in names} for line in before
    ]
    assert (run.project, run.display_name) == ("backtracking", "mine")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"]["steps"] == 4 and config["objective"] == "sft"

    shutil.rmtree(workdir / "export")
    shutil.rmtree(workdir / "checkpoints" / "4")
    train(recipe(base), workdir)
    lines, runs = sent(workdir)
    assert [line["_step"] for line in lines] == [1, 2, 3, 4]
    assert [each.run_id for each in runs] == [run.run_id] * 2


@without_wandb
def test_a_killed_run_is_gone_on_with_where_it_was(base, tmp_path, monkeypatch):
    """SIGKILL behind the first checkpoint, when wandb has written nothing yet: the next process sends every step."""
    process = run_main(base, tmp_path, signalled=signal.SIGKILL, steps=16)
    # wandb's own process lives on for a while, and holds the output open.
    assert process.wait(timeout=processes.HANG) == -signal.SIGKILL
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(recipe(base, steps=16), tmp_path)
    lines, runs = sent(tmp_path)
    assert runs[-1].run_id == json.loads((tmp_path / "wandb_run.json").read_text())["id"]
    assert [line["_step"] for line in lines][-16:] == list(range(1, 17))


@without_wandb
def test_a_run_that_fails_ends_as_failed(base, tmp_path):
    """Stopped by a loss that is not finite: what was written before it was sent too."""
    process = run_main(base, tmp_path, learning_rate=1e30, warmup_steps=1, steps=6, checkpoint_every_steps=0)
    output = process.communicate()[0]
    assert process.returncode == 2 and "gradient norm" in output
    lines, _ = sent(tmp_path)
    written = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["_step"] for line in lines] == written
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    (code,) = (record.exit.exit_code for record in records(path) if record.HasField("exit"))
    assert code == 1


def test_without_the_package_a_recipe_that_asks_for_it_is_refused_at_once(base, tmp_path, monkeypatch, capsys):
    """A folder of that name, as earlier runs leave it, is not the package."""
    (tmp_path / "wandb").mkdir()
    real = importlib.util.find_spec
    folder = importlib.machinery.ModuleSpec("wandb", None, is_package=True)
    for spec in (None, folder):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, spec=spec: spec if name == "wandb" else real(name)
        )
        assert cli.run("train", recipe(base), str(tmp_path / "w")) == 2
        output = " ".join(capsys.readouterr().out.split())
        assert "wandb is not installed: pip install -r requirements-wandb.txt" in output
    assert not (tmp_path / "w").exists()


def test_wandb_is_imported_where_it_is_asked_for_only(base, tmp_path):
    process = processes.start(
        "-c",
        "import sys; from jax_backtrack import main; assert 'wandb' not in sys.modules, 'imported'",
        stderr=subprocess.STDOUT,
    )
    assert (process.communicate()[0], process.returncode) == ("", 0)
