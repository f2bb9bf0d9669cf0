"""Training on a tiny model with real tokens: what it leaves, what it refuses, and how a killed run goes on."""

import math
import re
import shutil
import signal

import numpy as np
import pytest

from jax_backtrack.backtracking.trees import TreeSpec
from jax_backtrack.data import examples, sources
from jax_backtrack.data.rows import TreeSource
from jax_backtrack.errors import InputError
from jax_backtrack.hub.load import load
from jax_backtrack.models.assign import assign
from jax_backtrack.training import reference
from jax_backtrack.training.loop import train
from jax_backtrack.training.reference import reference_logps
from tests import tiny
from tests.processes import HANG
from tests.runs import flags_of, leaves, metrics, recipe, run_main


@pytest.fixture(scope="module")
def sft_workdir(base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sft")
    train(recipe(base), workdir)
    return workdir


@pytest.fixture(scope="module")
def adapters_workdir(base, tmp_path_factory):
    """Of a finished SFT run of adapters that left checkpoints."""
    workdir = tmp_path_factory.mktemp("adapters")
    train(with_adapters(recipe(base, steps=4, checkpoint_every_steps=2)), workdir)
    return workdir


def with_adapters(config):
    config.lora.rank = 2
    return config


def test_sft_learns_and_leaves_a_model_that_can_reset(sft_workdir):
    lines = metrics(sft_workdir)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["reset_loss"] < lines[0]["reset_loss"]
    assert all({"grad_norm", "learning_rate", "scored_tokens", "seconds"} <= line.keys() for line in lines)
    assert any((sft_workdir / "tensorboard").iterdir())
    model, tokenizer = load(str(sft_workdir))
    assert tokenizer.reset_id == 4 and tokenizer.reset_mode == "rewind"
    assert model.config.vocab_size == tiny.SHORT


def test_dpo_starts_from_an_sft_workdir_at_exactly_log_2(sft_workdir, tmp_path):
    config = recipe(sft_workdir, "dpo", steps=15, learning_rate=1e-3, warmup_steps=1)
    config.data.limit = 5
    train(config, tmp_path)
    lines = metrics(tmp_path)
    assert math.isclose(lines[0]["dpo_loss"], math.log(2), abs_tol=2e-6)
    assert lines[-1]["dpo_loss"] < lines[0]["dpo_loss"] and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["rewards/accuracies"] > 0.5 and lines[-1]["rewards/chosen"] > lines[-1]["rewards/rejected"]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_the_baselines_train_without_resets(base, tmp_path, objective):
    config = recipe(base, objective, steps=3)
    config.data.backtrack = False
    train(config, tmp_path)
    assert load(str(tmp_path))[1].reset_id is None
    assert "reset_loss" not in metrics(tmp_path)[0]


def test_dpo_in_another_reset_context_is_refused(sft_workdir, tmp_path):
    config = recipe(sft_workdir, "dpo")
    config.reset.mode = "keep"
    with pytest.raises(InputError, match=r"'keep', but .* was trained with 'rewind'"):
        train(config, tmp_path)


def test_a_finished_workdir_is_loaded_and_left_as_it_is(sft_workdir, base):
    before = {path: path.stat().st_mtime_ns for path in sft_workdir.rglob("*")}
    again, _ = train(recipe(base), sft_workdir)
    for one, other in zip(leaves(again), leaves(load(sft_workdir)[0]), strict=True):
        np.testing.assert_array_equal(one, other)
    assert before == {path: path.stat().st_mtime_ns for path in sft_workdir.rglob("*")}


def test_a_workdir_of_another_recipe_is_refused_by_field(sft_workdir, base):
    with pytest.raises(InputError, match=r"other settings \(train\.learning_rate, train\.steps\)"):
        train(recipe(base, steps=9, learning_rate=1.0), sft_workdir)


def test_a_loss_that_is_not_finite_stops_with_step_and_examples(base, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"step 5: loss .*nan.*testbed \d+; .* 4 in all, and train.max_skipped is 3"
    ):
        train(recipe(base, learning_rate=1e30, warmup_steps=1), tmp_path)
    assert not (tmp_path / "export").exists()


def test_a_start_that_failed_leaves_the_workdir_free(base, tmp_path):
    config = recipe(base, steps=1)
    config.data.path = "nothing.jsonl"
    with pytest.raises(InputError, match=r"nothing\.jsonl is no file"):
        train(config, tmp_path / "w")
    config.data.path, config.train.max_seq_len = "testbed", 16
    with pytest.raises(InputError, match="no example is left"):
        train(config, tmp_path / "w")
    train(recipe(base), tmp_path / "w")


def test_the_schedule_rises_from_the_first_update_and_ends_at_a_tenth(sft_workdir):
    rates = [line["learning_rate"] for line in metrics(sft_workdir)]
    np.testing.assert_allclose(rates[:3], [1e-3, 2e-3, 3e-3], rtol=1e-5)
    assert rates[2:] == sorted(rates[2:], reverse=True) and math.isclose(rates[-1], 3e-4, rel_tol=1e-5)


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("objective", "dop", "objective is 'dop': did you mean 'dpo'"),
        ("reset.mode", "rewnd", "did you mean 'rewind'"),
        ("model.compute_dtype", "bflaot16", "did you mean 'bfloat16'"),
        ("model.param_dtype", "bfloat16", "trained in float32"),
        ("train.steps", 0, r"train\.steps is 0; it must be at least 1"),
        ("train.batch_size", 0, r"train\.batch_size is 0"),
        ("train.logits_chunk_size", 0, r"train\.logits_chunk_size is 0"),
        ("train.max_grad_norm", 0.0, r"train\.max_grad_norm is 0.0; it must be above 0"),
        ("train.max_seq_len", 4096, "exceeds the model's 512 positions"),
        ("data.seed", -1, r"data\.seed is -1"),
        ("data.path", "", "neither data.path nor data.utility_path"),
        ("data.split", "tran", "did you mean 'train'"),
        ("mesh.data", 0, r"mesh\.data, fsdp, tensor = 0, 1, 1"),
        ("mesh.fsdp", 3, "3 devices, 1 are here"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_named(base, tmp_path, field, value, message):
    config = recipe(base)
    with config.unlocked():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError, match=message):
        train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_rows_too_short_for_every_tree_are_an_error_that_says_so(base, tmp_path):
    with pytest.raises(InputError, match=r"no example is left.*dropped 40: over-long"):
        train(recipe(base, max_seq_len=16), tmp_path)


def test_the_reference_is_computed_once(sft_workdir, tmp_path):
    model, tokenizer = load(str(sft_workdir))
    tree_spec = TreeSpec("dpo", True, "rewind", tokenizer.reset_id)
    preferences, report = sources.read("testbed", limit=9)
    source = TreeSource(examples.encode(preferences, tokenizer, tree_spec, 256, report), tree_spec, seed=0)
    settings = dict(folder=tmp_path, max_seq_len=256, batch_size=2, chunk=32)

    def computed(model, source, needed=range(9), **changes):
        return reference_logps(model, source, list(needed), **(settings | changes))

    first, count = computed(model, source, [0, 2, 5])
    assert count == 3 and (np.isnan(first).all(axis=(1, 2)) == [i not in (0, 2, 5) for i in range(9)]).all()
    whole, count = computed(model, source)
    assert count == 6 and not np.isnan(whole).any()
    np.testing.assert_array_equal(whole[[0, 2, 5]], first[[0, 2, 5]])
    again, count = computed(model, source)
    assert count == 0
    np.testing.assert_array_equal(again, whole)
    wider, _ = computed(model, source, folder=tmp_path / "2", max_seq_len=512)
    np.testing.assert_allclose(whole, wider, rtol=1e-3, atol=1e-3)
    assign(model.final_norm.scale_M, model.final_norm.scale_M[...] * 1.01)
    assert computed(model, source)[1] == 9
    assert computed(model, TreeSource(source.examples, tree_spec, seed=1))[1] == 9


def test_a_reference_pass_that_is_stopped_keeps_its_portions(sft_workdir, tmp_path, monkeypatch):
    model, tokenizer = load(str(sft_workdir))
    tree_spec = TreeSpec("dpo", True, "rewind", tokenizer.reset_id)
    preferences, report = sources.read("testbed", limit=9)
    source = TreeSource(examples.encode(preferences, tokenizer, tree_spec, 256, report), tree_spec, seed=0)
    settings = dict(max_seq_len=256, batch_size=2, chunk=32)
    monkeypatch.setattr(reference, "PORTION", 4)
    whole, _ = reference_logps(model, source, range(9), folder=tmp_path / "whole", **settings)

    def stop(done: int) -> None:
        nonlocal reached
        reached += done
        if reached > 4:
            raise KeyboardInterrupt

    reached = 0
    with pytest.raises(KeyboardInterrupt):
        reference_logps(model, source, range(9), folder=tmp_path / "stopped", progress=stop, **settings)
    again, count = reference_logps(model, source, range(9), folder=tmp_path / "stopped", **settings)
    assert count == 5
    np.testing.assert_array_equal(again, whole)


def test_a_killed_run_goes_on_as_if_it_had_not_been(base, tmp_path, capsys):
    """SIGKILL behind the first checkpoint; the resumed run ends bit for bit where the undisturbed one does."""
    fields = dict(steps=16, checkpoint_every_steps=2)
    whole = train(recipe(base, **fields), tmp_path / "whole")[0]
    killed = tmp_path / "killed"
    process = run_main(*flags_of(base, killed, **fields), signalled=signal.SIGKILL)
    output = process.communicate(timeout=HANG)[0]
    assert process.returncode == -signal.SIGKILL and not (killed / "export").exists(), output
    capsys.readouterr()
    resumed = train(recipe(base, **fields), killed)[0]
    assert int(re.search(r"resumed from step (\d+)", capsys.readouterr().out)[1]) in range(2, 16, 2)
    for one, other in zip(leaves(whole), leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    kept = [[line | {"seconds": 0} for line in metrics(tmp_path / name)] for name in ("whole", "killed")]
    assert kept[0] == kept[1]


def test_sharded_training_equals_training_on_one_device(base, tmp_path):
    """Four virtual devices, two for `fsdp` and two for `tensor`. Small steps: Adam makes much of rounding errors."""
    fields = dict(steps=4, learning_rate=1e-6)
    flags = [*flags_of(base, tmp_path / "four", **fields), "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    process = run_main(*flags, devices=4)
    train(recipe(base, **fields), tmp_path / "one")
    output = process.communicate(timeout=HANG)[0]
    assert process.returncode == 0, output
    for one, four in zip(metrics(tmp_path / "one"), metrics(tmp_path / "four"), strict=True):
        assert math.isclose(one["loss"], four["loss"], rel_tol=1e-4)
        assert math.isclose(one["grad_norm"], four["grad_norm"], rel_tol=1e-3)


def test_adapters_are_trained_beside_a_frozen_model_and_merged(base, adapters_workdir):
    """What is exported differs from its base by matrices of the adapters' rank, and by the row of [RESET]."""
    assert "| lora.rank | `2` |" in (adapters_workdir / "export" / "README.md").read_text()
    begun, _ = load(str(base))
    ended, tokenizer = load(str(adapters_workdir))
    difference = np.asarray(ended.blocks.gate_MxF[...], np.float32) - np.asarray(begun.blocks.gate_MxF[...], np.float32)
    assert np.abs(difference).max() > 0
    for layer in difference:
        sizes = np.linalg.svd(layer, compute_uv=False)
        assert sizes[2] < 1e-4 * sizes[0]
    np.testing.assert_array_equal(ended.final_norm.scale_M[...], begun.final_norm.scale_M[...])
    changed = np.flatnonzero(np.any(np.asarray(ended.embedding_VxM[...] != begun.embedding_VxM[...]), axis=1))
    assert changed.tolist() == [tokenizer.reset_id]


def test_the_reference_of_adapters_is_the_model_without_them(sft_workdir, tmp_path):
    """So DPO by adapters, beside a model in bfloat16, starts at log 2."""
    config = with_adapters(recipe(sft_workdir, "dpo", steps=2, rpo_alpha=0.0))
    config.model.param_dtype = "bfloat16"
    train(config, tmp_path)
    assert metrics(tmp_path)[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_a_killed_run_of_adapters_goes_on_where_it_was(base, adapters_workdir, tmp_path):
    """Stopped after a checkpoint, as by a full disk, and resumed: the export is that of an undisturbed run."""
    again = shutil.copytree(adapters_workdir, tmp_path / "again")
    shutil.rmtree(again / "export")
    shutil.rmtree(again / "checkpoints" / "4")
    train(with_adapters(recipe(base, steps=4, checkpoint_every_steps=2)), again)
    one, other = (leaves(load(str(workdir))[0]) for workdir in (adapters_workdir, again))
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


def test_accumulated_parts_are_the_whole_batch(base, sft_workdir, tmp_path):
    """Parts of one row each; for parts of several, test_sharding compares every gradient."""
    train(recipe(base, grad_accumulation_steps=2), tmp_path)
    whole, parts = ([line["loss"] for line in metrics(workdir)] for workdir in (sft_workdir, tmp_path))
    assert parts == pytest.approx(whole, rel=1e-4)
