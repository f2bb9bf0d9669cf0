"""Every mode end to end on a tiny model, and mistakes named in one line."""

import copy
import json
import sys
from pathlib import Path

import pytest
from absl import flags
from absl.testing import flagsaver
from flax.traverse_util import flatten_dict

import main
from configs import demo, dpo_smollm, sft_smollm
from jax_backtrack import cli
from jax_backtrack.hub.export import save
from tests import tiny
from tests.runs import run_main


@pytest.fixture(scope="module")
def base(tmp_path_factory, short_tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    save(tiny.model(vocab_size=tiny.SHORT, max_position_embeddings=512), short_tokenizer, folder)
    return folder


def small(config, base):
    """A recipe cut down to the tiny model."""
    config.model.path = str(base) if "{workdir}" not in config.model.path else config.model.path
    config.data.path, config.data.limit = "testbed", 12
    config.train.update(dict(steps=min(config.train.steps, 2), max_seq_len=256, batch_size=2, checkpoint_every_steps=0))
    config.sample.max_new_tokens = 6
    config.evaluate.prompts = config.sample.max_num_seqs = 4
    return config


def output_of(capsys, mode, config, workdir, prompts=None, expect=0) -> str:
    capsys.readouterr()
    code = cli.run(mode, config, str(workdir), prompts=prompts and str(prompts))
    output = " ".join(capsys.readouterr().out.split())
    assert code == expect, output
    return output


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--config=sft_smollm.py", "--mode=trian"], "error: --mode=trian: did you mean 'train'?"),
        (["--config=sft_smollm", "--config.web.port=70000", "--mode=web"], "error: web.port is 70000; it must be at m"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_named_without_a_traceback(tmp_path, arguments, message):
    process = run_main(*arguments, f"--workdir={tmp_path / 'w'}", COLUMNS="200")
    output = process.communicate()[0]
    assert process.returncode != 0
    assert message in " ".join(output.split())
    assert "Traceback" not in output and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "mode,changes,prompts,message",
    [
        ("train", {"data.path": "testbd"}, None, "testbd is no file or folder here"),
        ("train", {}, "x.txt", "--prompts goes with --mode=sample"),
        ("run-stages", {}, None, "this one has no stages"),
        ("train", {"mesh.fsdp": 64}, None, "needs 64 devices"),
        ("evaluate", {"evaluate.prompts": 0}, None, "evaluate.prompts is 0"),
        ("sample", {}, "nothing.txt", "nothing.txt cannot be read"),
        ("compare", {}, None, "--workdirs and --mode=compare go together"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path, base, capsys, mode, changes, prompts, message):
    config = small(sft_smollm.get_config(), base)
    config.update_from_flattened_dict(changes)
    assert message in output_of(capsys, mode, config, tmp_path / "w", prompts, expect=2)


def test_debug_adds_the_traceback_of_an_error_of_the_input(tmp_path, base, capsys):
    config = small(sft_smollm.get_config(), base)
    config.data.path = "nowhere.jsonl"
    for debug in (False, True):
        assert cli.run("train", config, str(tmp_path / "w"), debug=debug) == 2
        shown = capsys.readouterr()
        assert "nowhere.jsonl" in shown.out and ("Traceback" in shown.err) == debug


def test_workdirs_that_cannot_be_are_named(tmp_path, base, capsys):
    config = small(sft_smollm.get_config(), base)
    assert "only local folders" in output_of(capsys, "train", config, "gs://bucket/run", expect=2)
    (tmp_path / "file").touch()
    assert "Not a directory" in output_of(capsys, "train", config, tmp_path / "file" / "w", expect=2)
    assert "the recipe has stages" in output_of(capsys, "train", demo.get_config(), tmp_path / "w", expect=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=demo", "--config.mesh.data=1"], "error: mesh.data: no such field; did you mean stages.SFT.mesh.da"),
        (["--config=demo", "--config.stages.SFT.train.stepz=1"], "error: stages.SFT.train.stepz: no such field; did y"),
        (["--config=demo", "--config.stages.SFT.train.steps=x"], "error: stages.SFT.train.steps is 'x'; it must be a "),
        (["--config=sft_llama", "--config.train.lr=3"], "error: train.lr: no such field; did you mean train.learning_"),
        (["--config", "sft_llama", "--config.learning_rate", "3"], "error: learning_rate: no such field; did you mean"),
        (["--config=sft_llama", "--config.train=3"], "error: train: a section, no field; its fields are train.batch_s"),
        (["--config=sft_llama", "--config.train.steps=abc"], "error: train.steps is 'abc'; it must be a whole number"),
        (["--config=sft_llama", "--config.train.steps=1e3"], "error: train.steps is 1000.0; it must be a whole number"),
        (["--config=sft_llama", "--config.train.beta=0"], "error: train.beta is 0; it must be above 0"),
        (["--config=sft_llama", "--config.objective=dop"], "error: objective is 'dop': did you mean 'dpo'?"),
        (["--config=sft_llama", "--config.data.backtrack=2"], "error: data.backtrack is 2; it must be True or False"),
        (["--config=sft_llama", "--config.evaluate.prefill=a"], "error: evaluate.prefill is ('a',); it must be a list"),
        (["--config=sft_llama", "--config.model.template_date=soon"], "error: model.template_date is 'soon'; it must"),
        (["--config="], "error: --config=: no such file"),
        (["--config=sft_smolm.py"], "did you mean 'sft_smollm.py'?"),
        (["--config=sft_smollm.py", "--wrkdir=x"], "workdir"),
        (["--config=sft_smollm", "--config.train.stepz=3"], "error: train.stepz: no such field; did you mean train.s"),
    ],
)
def test_a_flag_that_names_nothing_is_named(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["main.py", *arguments])  # which ml_collections reads
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
        cli.parse_flags(cli.with_config_path(sys.argv, Path(main.__file__).parent / "configs"))
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("train.steps=7", 7),
        ("train.learning_rate=1e-4", 1e-4),
        ("train.beta=1", 1),
        ("data.backtrack=false", False),
        ("data.path=a=b, (c).jsonl", "a=b, (c).jsonl"),
        ("data.path=", ""),
        ("data.exclude=advbench.csv", ("advbench.csv",)),
        ("data.exclude=('a.csv', 'X=b.csv')", ("a.csv", "X=b.csv")),
        ("evaluate.prefill=5", (5,)),
        ("evaluate.reset_biases=(-2, 0.5)", (-2, 0.5)),
    ],
)
def test_a_field_has_the_value_that_is_meant(monkeypatch, argument, value):
    monkeypatch.setattr("sys.argv", ["main.py", "--config=sft_smollm", f"--config.{argument}"])
    with flagsaver.flagsaver():
        cli.parse_flags(cli.with_config_path(sys.argv, Path(main.__file__).parent / "configs"))
        config = flatten_dict(flags.FLAGS.config.to_dict(), sep=".")
    assert config[argument.partition("=")[0]] == value


def test_what_is_no_recipe_is_named(tmp_path, capsys):
    assert "gives None, no ConfigDict" in output_of(capsys, "train", None, tmp_path, expect=2)
    config = demo.get_config()
    config.order = ("untrained", "STF")
    assert "order names the stage 'STF': did you mean 'SFT'?" in output_of(
        capsys, "run-stages", config, tmp_path, expect=2
    )
    del config.order
    assert "`order`, a list of their names" in output_of(capsys, "run-stages", config, tmp_path, expect=2)


def test_only_a_plan_does_without_a_workdir(capsys):
    assert cli.run("train", sft_smollm.get_config(), None) == 2
    assert "--workdir=DIR must be given with --mode=train" in capsys.readouterr().out


def test_a_run_that_is_not_finished_is_not_taken_for_its_base_model(tmp_path, base, capsys):
    config = small(sft_smollm.get_config(), base)
    (tmp_path / "recipe.json").write_text("{}")
    (prompts := tmp_path / "prompts.txt").write_text("hello")
    assert "its training is not finished" in output_of(capsys, "sample", config, tmp_path, prompts, expect=2)
    assert "its training is not finished" in output_of(capsys, "evaluate", config, tmp_path, expect=2)


def test_train_sample_evaluate(base, tmp_path, capsys):
    """SFT, DPO from its workdir, then replies and the testbed from that; [RESET] is biased up so that it occurs."""
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    output_of(capsys, "train", small(sft_smollm.get_config(), base), sft)
    config = small(dpo_smollm.get_config(), sft)
    output_of(capsys, "train", config, dpo)

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "What is a [RESET]?", "prefix": "It is"}) + "\n" + '{"prompt": "Hm"}\n')
    biased = copy.deepcopy(config)
    biased.sample.update(dict(reset_bias=1000.0, max_resets=2))
    assert "2 of them after a reset" in output_of(capsys, "sample", biased, dpo, prompts)
    samples = [json.loads(line) for line in (dpo / "samples.jsonl").read_text().splitlines()]
    assert [sample["drafts"] for sample in samples] == [["It is", ""], ["", ""]]
    assert all(sample["resets"] == 2 and "[RESET]" not in sample["reply"] for sample in samples)

    assert "95 % intervals" in output_of(capsys, "evaluate", config, dpo)
    measures = json.loads((dpo / "evaluation.json").read_text())["models"]["dpo"]["testbed"]
    assert measures["useful"]["count"] == 4 and 0 <= measures["unsafe_prefilled"]["value"] <= 1


def test_compare_runs_the_stages_and_keeps_those_that_are_done(base, tmp_path, capsys):
    config = demo.get_config()
    for stage in config.stages.values():
        small(stage, base)
    config.stages["SFT"].evaluate.win_rate_judge = str(base)
    assert "preferred" in output_of(capsys, "run-stages", config, tmp_path)
    results = json.loads((tmp_path / "evaluation.json").read_text())["models"]
    assert list(results) == list(config.order)
    assert results["SFT"]["testbed"]["resets"]["value"] == 0
    judged = json.loads((tmp_path / "win_rates.json").read_text())["sets"]["testbed public"]
    assert list(judged) == ["SFT"] and judged["SFT"]["win_rate"]["count"] == 4
    assert output_of(capsys, "run-stages", config, tmp_path).count("trained already") == 3
    assert json.loads((tmp_path / "evaluation.json").read_text())["models"] == results
    (tmp_path / "backtracking_SFT" / "export").rename(tmp_path / "elsewhere")
    assert "began from an earlier" in output_of(capsys, "run-stages", config, tmp_path, expect=2)
