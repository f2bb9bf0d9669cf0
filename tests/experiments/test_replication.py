"""The replication on a tiny model: every model for every seed, nothing done twice, and what is summed up."""

import json

import jax
import numpy as np
import pytest

from configs import base
from configs.replication import table
from jax_backtrack import load
from jax_backtrack.backtracking.trees import TreeSpec
from jax_backtrack.data import examples, held_out, sources
from jax_backtrack.data.preferences import Report
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.perplexity import held_out_perplexity
from jax_backtrack.experiments import replication
from jax_backtrack.hub.export import save
from tests import tiny


@pytest.fixture(scope="module")
def start(tmp_path_factory, short_tokenizer):
    folder = tmp_path_factory.mktemp("base") / "model"
    save(tiny.model(vocab_size=tiny.SHORT, max_position_embeddings=1024), short_tokenizer, folder)
    return folder


def small(start, shared):
    config = table.get_config()
    config.shared, config.seeds = str(shared / "data"), (0, 1)
    config.order = ("untrained", "keep SFT", "keep SFT + DPO")
    config.baselines = {"keep SFT": "untrained", "keep SFT + DPO": "keep SFT"}
    config.cuts.all.update({"sample": {"max_new_tokens": 4}, "evaluate": {"limit": 2}, "data": {"limit": 150}})
    config.cuts.sft.train.steps = config.cuts.dpo.train.steps = 2
    for stage in config.stages.values():
        if "{workdir}" not in stage.model.path:
            stage.model.path = str(start)
    return config


def test_all_seeds_are_trained_evaluated_and_summed_up_once(start, shared, tmp_path, capsys):
    config = small(start, shared)
    results = replication.replicate(config, tmp_path)
    assert list(results["sets"]) == [
        "AdvBench",
        "AdvBench, 10 tokens prefilled",
        "SimpleSafetyTests",
        "XSTest",
        "MT-Bench",
    ]
    assert results["seeds"] == 2 and list(results["sets"]["XSTest"]) == list(config.order)
    assert {kind: list(map(len, models.values())) for kind, models in results["perplexity"].items()} == {
        "safety": [1, 2, 2],
        "utility": [1, 2, 2],
    }
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["cuts"]["sft"] == {"train": {"steps": 2}} and kept["scale"] == "small"
    assert (tmp_path / "results.svg").read_text().startswith("<svg")
    assert json.loads((tmp_path / "seed1" / "keep_SFT" / "recipe.json").read_text())["data"]["seed"] == 1
    capsys.readouterr()

    (tmp_path / "seed1" / "keep_SFT" / "evaluation.json").unlink()
    assert replication.replicate(config, tmp_path) == results
    output = " ".join(capsys.readouterr().out.split())
    assert output.count("evaluated already") == 4 and output.count("trained already") == 1

    judged = tmp_path / "seed0" / "untrained" / "evaluation.json"
    kept = judged.read_text()
    judged.write_text(kept.replace('"judge": "refusals"', '"judge": "Llama Guard 1a2b3c4d"'))
    with pytest.raises(InputError, match="was judged by 'Llama Guard 1a2b3c4d', not by 'refusals'"):
        replication.replicate(config, tmp_path)
    judged.write_text(kept)

    config.cuts.all.evaluate.limit = 3
    with pytest.raises(InputError, match=r"untrained was begun with other settings \(evaluate.limit\)"):
        replication.replicate(config, tmp_path)
    (tmp_path / "seed0" / "untrained" / "evaluated.json").unlink()  # as older versions left it
    with pytest.raises(InputError, match=r"keep_SFT was begun with other settings \(evaluate.limit\)"):
        replication.replicate(config, tmp_path)
    config.judge = "refusals "
    with pytest.raises(InputError, match=r"evaluate.judge is 'refusals '"):
        replication.replicate(config, tmp_path)


def test_own_replies_are_sampled_once_and_trained_on(start, shared, tmp_path, capsys):
    config = small(start, shared)
    config.order, config.baselines = ("SFT on own replies",), {}
    config.own_replies.model.path = str(start)
    config.own_replies.sample.n, config.cuts.own_replies.sample.max_new_tokens = 1, 4
    config.stages["SFT on own replies"].data.limit = 150
    replication.own_replies(config, tmp_path)
    samples = tmp_path / "own_replies" / "samples.jsonl"
    questions, _ = sources.read(str(shared / "data/oasst/messages.jsonl.gz"), utility=True)
    assert len(samples.read_text().splitlines()) == len(questions)
    before = samples.stat().st_mtime_ns
    config.seeds = (0,)
    replication.replicate(config, tmp_path)
    assert samples.stat().st_mtime_ns == before
    assert "own_replies/samples.jsonl" in "".join(capsys.readouterr().out.split())
    used = json.loads((tmp_path / "seed0" / "SFT_on_own_replies" / "recipe.json").read_text())
    assert used["data"]["utility_path"] == str(samples)
    config.own_replies.sample.temperature = 0.5
    with pytest.raises(InputError, match=r"own_replies was begun with other settings \(sample.temperature\)"):
        replication.own_replies(config, tmp_path)
    config.order = ("SFT",)
    replication.own_replies(config, tmp_path / "not wanted")
    assert not (tmp_path / "not wanted").exists()


def test_a_scale_that_is_not_there_is_named(start, shared, tmp_path):
    config = small(start, shared)
    config.scale = "ful"
    with pytest.raises(InputError, match="did you mean 'full'"):
        replication.replicate(config, tmp_path)


def test_full_scale_is_the_same_recipe_without_the_cuts():
    config = table.get_config()
    small, config.scale = replication._stage(config, "keep SFT"), "full"
    full = replication._stage(config, "keep SFT")
    assert (small.train.steps, full.train.steps) == (30, 200)
    assert (small.evaluate.limit, full.evaluate.limit) == (80, 0)
    assert small.data.path == full.data.path and "{shared}" not in str(full)


def test_perplexity_is_that_of_each_reply_alone(start, shared):
    config = base.get_config()
    config.data.utility_path, config.data.held_out_fraction = str(shared / "data/oasst/messages.jsonl.gz"), 0.25
    config.data.max_response_length, config.train.max_seq_len, config.train.batch_size = 12, 512, 2
    model, tokenizer = load(start)
    found = held_out_perplexity(config, model, tokenizer)
    preferences, _ = sources.read(config.data.utility_path, utility=True)
    kept = [each for each in preferences if held_out.is_held_out(each.prompt, 0.25)]
    recipe = TreeSpec("sft", False, "keep", None)
    alone = examples.encode(kept, tokenizer, recipe, 512, Report(), 12)
    nats, tokens, forward = 0.0, 0, jax.jit(lambda model, tokens: model(tokens))
    for example in alone:
        reply = example.chosen
        ids = np.zeros((1, 512), int)  # of one length, for one compilation: nothing sees what is behind it
        ids[0, : (length := len(example.prompt) + len(reply))] = [*example.prompt, *reply]
        logits = np.asarray(forward(model, ids))[0, len(example.prompt) - 1 : length - 1]
        logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        nats -= logprobs[np.arange(len(reply)), reply].sum()
        tokens += len(reply)
    assert list(found) == ["utility"] and found["utility"].count == len(alone) >= 10
    assert found["utility"].value == pytest.approx(np.exp(nats / tokens), rel=1e-4)
