"""Checkpoints that are damaged, cannot be written, or are asked for by a signal: nothing is lost, and what goes on ends
bit for bit where an undisturbed run does."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_backtrack import cli
from jax_backtrack.distributed import preemption
from jax_backtrack.errors import InputError
from jax_backtrack.training.checkpoints import newest_step
from jax_backtrack.training.loop import train
from tests.processes import HANG, full_after
from tests.runs import assert_same_run, both_started, end_of, flags_of, itself_or_after, recipe, run_main

FIELDS = dict(steps=8, max_seq_len=128, checkpoint_every_steps=2, max_to_keep=3)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole")
    train(recipe(base, **FIELDS), workdir)
    return workdir


@pytest.fixture
def cut_short(whole, tmp_path):
    """The same, as if killed behind its last checkpoint."""
    workdir = shutil.copytree(whole, tmp_path / "w")
    shutil.rmtree(workdir / "export")
    return workdir


def without_spaces(text: str) -> str:
    """What was said, wherever its lines, and long paths in them, were broken."""
    return "".join(text.split())


def steps(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def largest_file(workdir, step: int):
    files = (path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def cut_off(workdir, step: int) -> None:
    file = largest_file(workdir, step)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(workdir, step: int) -> None:
    file = largest_file(workdir, step)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)


def take_facts(workdir, step: int) -> None:
    shutil.rmtree(workdir / "checkpoints" / str(step) / "facts")


def change_a_number(workdir, step: int) -> None:
    """A checkpoint that Orbax finds nothing wrong with: the state is that of another step."""
    folder = workdir / "checkpoints"
    shutil.rmtree(folder / str(step) / "state")
    shutil.copytree(folder / str(step - 2) / "state", folder / str(step) / "state")


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, take_facts, change_a_number])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(base, whole, cut_short, capsys, damage):
    damage(cut_short, 8)
    capsys.readouterr()
    train(recipe(base, **FIELDS), cut_short)
    said = without_spaces(capsys.readouterr().out)
    assert re.search(r"checkpoint\S*checkpoints/8isdamaged\(.+\)andsetasideas8\.damaged", said), said
    assert "resumedfromstep6" in said
    assert_same_run(whole, cut_short)
    assert (cut_short / "checkpoints" / "8.damaged").is_dir() and steps(cut_short) == [4, 6, 8]


@pytest.mark.parametrize(
    ("part", "link", "reason"),
    [("state", "itself", "[Tt]oo many levels of symbolic links"), ("facts", "/proc/self/mem", "Input/output error")],
)
def test_one_that_cannot_be_read_is_not_damaged(base, whole, cut_short, tmp_path, part, link, reason):
    """Of what the file holds nothing is known, so the one before it is not taken."""
    file = largest_file(cut_short, 8) if part == "state" else cut_short / "checkpoints" / "8" / "facts" / "metadata"
    file.rename(tmp_path / "aside")
    file.symlink_to(file if link == "itself" else link)
    with pytest.raises(OSError, match=rf"checkpoints/8 cannot be read \(.*{reason}"):
        train(recipe(base, **FIELDS), cut_short)
    assert steps(cut_short) == [4, 6, 8] and not (cut_short / "export").exists()
    (tmp_path / "aside").replace(file)
    train(recipe(base, **FIELDS), cut_short)
    assert_same_run(whole, cut_short)


def test_where_none_is_whole_nothing_is_begun_anew(base, cut_short):
    for step in steps(cut_short):
        cut_off(cut_short, step)
    for _ in range(2):
        with pytest.raises(InputError, match=r"checkpoints/8 is damaged .*checkpoints/4 is damaged .*another workdir"):
            train(recipe(base, **FIELDS), cut_short)
    assert steps(cut_short) == [4, 6, 8]


def test_a_checkpoint_knows_its_recipe_and_its_data(base, cut_short, tmp_path):
    (cut_short / "recipe.json").unlink()
    with pytest.raises(InputError, match=r"other settings \(train.learning_rate\)"):
        train(recipe(base, **FIELDS | {"learning_rate": 1e-4}), cut_short)
    rows = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."} for number in range(20)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    config = recipe(base, **FIELDS)
    config.data.path = str(rows)
    train(config, tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "export")
    pairs[3]["chosen"] = "Maybe."
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    with pytest.raises(InputError, match=r"the data is not what .* was begun with"):
        train(config, tmp_path / "other")


def test_multiples_are_kept_for_good(base, tmp_path):
    train(recipe(base, **FIELDS | dict(max_to_keep=1, keep_period=4, checkpoint_every_steps=1)), tmp_path)
    assert steps(tmp_path) == [4, 8]


def test_a_full_disk_ends_the_run_and_nothing_is_lost(base, whole, cut_short, capsys):
    """No file may grow beyond four fifths of the embedding. That is made of random numbers, so hardly compressed, and
    Orbax keeps it in one piece: however many files it spreads a checkpoint over, one of them finds no room, and all
    else that is written does."""
    shutil.rmtree(cut_short / "checkpoints" / "8")
    before = {path: path.read_bytes() for path in (cut_short / "checkpoints").rglob("*") if path.is_file()}
    room = load_file(base / "model.safetensors")["model.embed_tokens.weight"].nbytes * 4 // 5
    assert (base / "tokenizer.json").stat().st_size < room
    capsys.readouterr()
    with full_after(room):
        assert cli.run("train", recipe(base, **FIELDS), str(cut_short)) == 2
    assert re.search(
        r"error:acheckpointcannotbewrittento\S+\(.*Filetoolarge.*\);thenewestwholeoneisofstep6\."
        r"Oncethereisroom,thesamecommandgoesonfromthere",
        said := without_spaces(capsys.readouterr().out),
    ), said
    assert all(path.read_bytes() == content for path, content in before.items())
    train(recipe(base, **FIELDS), cut_short)
    assert_same_run(whole, cut_short)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, preemption.RESTART), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_a_code_to_start_again(base, tmp_path, number, code):
    """No checkpoint is due: the one that is there was made for the signal."""
    fields = FIELDS | dict(checkpoint_every_steps=1000)
    process = run_main(*flags_of(base, tmp_path / "w", **fields), signalled=number, step=3)
    output = process.communicate(timeout=HANG)[0]
    assert process.returncode == code, output
    assert newest_step(tmp_path / "w") == 4  # step 3 is written when step 4 has begun
    assert f"stopped:{number.name}came;step4issaved;thesamecommandgoeson" in without_spaces(output)
    assert not (tmp_path / "w" / "export").exists()


def test_a_run_that_was_stopped_goes_on_bit_for_bit(base, whole, tmp_path):
    """Stopped again and again, until it is done."""
    workdir, command = tmp_path / "w", flags_of(base, tmp_path / "w", **FIELDS)
    for step in (1, 4):
        process = run_main(*command, signalled=signal.SIGTERM, step=step)
        output = process.communicate(timeout=HANG)[0]
        assert process.returncode == preemption.RESTART, output
        assert newest_step(workdir) == step + 1 and not (workdir / "export").exists()
    train(recipe(base, **FIELDS), workdir)
    assert_same_run(whole, workdir)


def test_the_preemption_of_one_host_stops_all_behind_the_same_step(base, tmp_path):
    arguments = flags_of(base, tmp_path / "w", **FIELDS | dict(steps=400, checkpoint_every_steps=1000))
    with both_started(*arguments, victim=1, signalled=signal.SIGTERM, step=3) as both:
        said = [end_of(process, code=preemption.RESTART)[1] for process in both]
    step = newest_step(tmp_path / "w")
    for process, err in enumerate(said):
        assert re.search(itself_or_after(process, "stopped") + f"SIGTERM came; step {step} is saved", err), err
    assert any("stopped: process" in err for err in said)


def test_a_run_goes_on_on_another_mesh(base, whole, tmp_path):
    """Rounding differs between meshes, so the end is that of one device to float32's precision, not bit for bit."""
    fields = FIELDS | dict(learning_rate=1e-6, checkpoint_every_steps=4, steps=8)
    one = tmp_path / "one"
    train(recipe(base, **fields), one)
    first = shutil.copytree(one, tmp_path / "w")
    shutil.rmtree(first / "export")
    shutil.rmtree(first / "checkpoints" / "8")
    process = run_main(*flags_of(base, first, **fields), "--config.mesh.data=1", "--config.mesh.fsdp=2", devices=2)
    output = process.communicate(timeout=HANG)[0]
    assert process.returncode == 0 and "resumed from step 4" in output, output
    ours, theirs = (
        [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()] for workdir in (first, one)
    )
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-4)


@pytest.mark.parametrize("mode", [mode for mode in cli.MODES if mode != "compile"])
def test_nothing_is_followed_out_of_a_workdir(tmp_path, capsys, mode):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "inside").symlink_to(tmp_path / "w")
    (tmp_path / "w" / "export.writing").symlink_to(tmp_path / "elsewhere")
    workdirs = ["one", "other"] if mode == "compare" else []
    assert cli.run(mode, recipe("m"), str(tmp_path / "w"), workdirs=workdirs) == 2
    assert "export.writingisalinkto" in without_spaces(capsys.readouterr().out)


def test_outside_of_steps_a_signal_ends_at_once(tmp_path, monkeypatch):
    """Here while a mode does something that keeps what it has finished."""

    def mode(*_arguments):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")

    monkeypatch.setitem(cli.MODES, "train", mode)
    assert cli.run("train", recipe("m"), str(tmp_path)) == preemption.RESTART
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert preemption.asked(step=1) is None  # of what this process trains next
