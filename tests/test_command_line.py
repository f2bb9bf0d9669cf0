"""`main.py` as a user runs it: every mode end to end on a tiny model, and mistakes named in one line."""

import json

import pytest

from jax_backtrack.hub.load import save
from tests import tiny
from tests.test_training import run_main


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    save(tiny.model(vocab_size=49152, max_position_embeddings=512), tokenizer, folder)
    return folder


def output_of(*arguments, expect: int = 0) -> str:
    process = run_main(*map(str, arguments), COLUMNS="200")
    output = process.communicate()[0]
    assert process.returncode == expect, output
    return output


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--config=sft_smollm.py", "--mode=trian"], "--mode=trian: did you mean 'train'?"),
        (["--config=sft_smolm.py"], "did you mean 'sft_smollm.py'?"),
        (["--config=sft_smollm.py", "--config.train.stepz=3"], 'Did you mean "steps"'),
        (["--config=sft_smollm.py", "--config.data.path=testbd"], "testbd is no file here"),
        (["--config=sft_smollm.py"], "neither data.path nor data.utility_path is set"),
        (["--config=sft_smollm.py", "--prompts=x.txt"], "--prompts goes with --mode=sample"),
        (["--config=demo.py"], "the recipe has stages, for --mode=compare"),
        (["--config=sft_smollm.py", "--mode=compare"], "has no stages"),
        (["--config=sft_smollm.py", "--config.mesh.fsdp=64"], "needs 64 devices"),
        (["--config=sft_smollm.py", "--mode=evaluate", "--config.evaluate.prompts=0"], "evaluate.prompts is 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_named_without_a_traceback(tmp_path, base, arguments, message):
    process = run_main(*arguments, f"--workdir={tmp_path / 'w'}", f"--config.model.path={base}", COLUMNS="200")
    output = process.communicate()[0]
    assert process.returncode != 0
    assert message in " ".join(output.split())
    assert "Traceback" not in output


def test_train_sample_evaluate(base, tmp_path):
    """SFT, DPO from its workdir, then replies and the testbed from that; [RESET] is biased up so that it occurs."""
    small = ["--config.data.path=testbed", "--config.data.limit=20", "--config.train.steps=3"]
    small += ["--config.train.row_length=256", "--config.train.batch_rows=2", "--config.sample.max_new_tokens=8"]
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    output_of("--config=sft_smollm.py", f"--workdir={sft}", f"--config.model.path={base}", *small)
    output_of("--config=dpo_smollm.py", f"--workdir={dpo}", f"--config.model.path={sft}", *small)

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "What is a [RESET]?", "prefix": "It is"}) + "\n" + '{"prompt": "Hm"}\n')
    biased = ["--config.reset.logit_bias=1000", "--config.reset.max_resets=2"]
    output = output_of(
        "--config=dpo_smollm.py", f"--workdir={dpo}", "--mode=sample", f"--prompts={prompts}", *small, *biased
    )
    assert "2 replies" in output and "2 of them after a reset" in output
    samples = [json.loads(line) for line in (dpo / "samples.jsonl").read_text().splitlines()]
    assert [sample["drafts"] for sample in samples] == [["It is", ""], ["", ""]]
    assert all(sample["resets"] == 2 and "[RESET]" not in sample["reply"] for sample in samples)

    output = output_of(
        "--config=dpo_smollm.py", f"--workdir={dpo}", "--mode=evaluate", "--config.evaluate.prompts=5", *small
    )
    assert "false resets" in output
    measures = json.loads((dpo / "evaluation.json").read_text())["dpo"]["measures"]
    assert measures["useful"]["count"] == 5 and 0 <= measures["unsafe_prefilled"]["value"] <= 1


def test_compare_runs_the_stages_and_goes_on_behind_those_that_are_done(base, tmp_path):
    recipe = tmp_path / "stages.py"
    recipe.write_text(
        f"""
from configs import demo

def get_config():
    config = demo.get_config()
    for stage in config.stages.values():
        if "workdir" not in stage.model.path:
            stage.model.path = {str(base)!r}
        stage.data.limit = 12
        stage.train.steps = min(stage.train.steps, 2)
        stage.evaluate.prompts = 4
        stage.sample.batch_rows = 4
    return config
"""
    )
    arguments = [f"--config={recipe}", f"--workdir={tmp_path / 'w'}", "--mode=compare"]
    output = output_of(*arguments)
    assert "95 % intervals" in output
    results = json.loads((tmp_path / "w" / "comparison.json").read_text())
    assert list(results) == ["untrained", "SFT", "backtracking SFT", "backtracking SFT + DPO"]
    assert results["SFT"]["measures"]["resets"]["value"] == 0
    again = output_of(*arguments)
    assert "steps" not in again
    assert json.loads((tmp_path / "w" / "comparison.json").read_text()) == results
