"""Replies are kept as they are finished: a run that was stopped takes them up, and ends as if it had not been."""

import json
import signal

import pytest

from jax_backtrack import Sampler, SamplingParams
from jax_backtrack.distributed.preemption import Interrupted
from jax_backtrack.sampling.files import Asked, write_samples
from jax_backtrack.sampling.replies import Reply
from jax_backtrack.utils.resume_cache import ResumeCache, key_of, resume_cache_of
from tests import tiny

PROMPTS = ["hello", "there", "you", "all", "of", "them"]


@pytest.fixture(scope="module")
def sampler(reset_tokenizer):
    """Of a model that takes each first draft back behind its third token."""
    return Sampler(
        tiny.model(vocab_size=49152),
        reset_tokenizer,
        SamplingParams(reset_bias=[-1e9] * 3 + [1e9], max_new_tokens=6, temperature=1.0, max_num_seqs=2),
    )


def stop_after(finished: int):
    """Progress that asks for an end, as Ctrl-C does, once so many replies are finished."""
    left = finished

    def progress(count: int) -> None:
        nonlocal left
        left -= count
        if left <= 0:
            raise Interrupted(signal.SIGINT)

    return progress


def test_a_stopped_run_goes_on_with_what_it_had(sampler, tmp_path):
    undisturbed = sampler(PROMPTS)
    assert all(reply.resets == 1 for reply in undisturbed)
    with pytest.raises(Interrupted):
        sampler(PROMPTS, resume_cache=ResumeCache(tmp_path / "kept"), progress=stop_after(2))
    resume_cache, seen = ResumeCache(tmp_path / "kept"), []
    assert 2 <= len(resume_cache) < len(PROMPTS)
    assert sampler(PROMPTS, resume_cache=resume_cache, progress=seen.append) == undisturbed
    assert seen[0] >= 2 and sum(seen) == len(PROMPTS)


def test_nothing_is_taken_from_other_settings_seeds_or_prompts(sampler, tmp_path):
    resume_cache = ResumeCache(tmp_path / "kept")
    sampler(PROMPTS[:2], seeds=[0, 1], resume_cache=resume_cache)
    seen = []
    sampler(PROMPTS[:2], seeds=[0, 2], resume_cache=resume_cache, progress=seen.append)
    assert seen[0] == 1 and len(resume_cache) == 3
    without = sampler.with_resets(max_resets=0)
    assert not any(reply.resets for reply in without(PROMPTS[:2], seeds=[0, 1], resume_cache=resume_cache))
    assert len(resume_cache) == 5
    other = Sampler(
        tiny.model(seed=1, vocab_size=49152), sampler.tokenizer, SamplingParams(max_new_tokens=6, max_num_seqs=2)
    )
    seen.clear()
    other(PROMPTS[:2], seeds=[0, 1], resume_cache=resume_cache, progress=seen.append)
    assert seen[0] == 0 and len(resume_cache) == 7


def test_a_reply_comes_back_from_json(sampler):
    with_trace = Sampler(
        sampler.model, sampler.tokenizer, SamplingParams(max_new_tokens=2, logprobs=True, max_num_seqs=2)
    )
    for reply in with_trace(["hello"]) + sampler(["hello"]):
        assert Reply.from_json(json.loads(json.dumps(reply.to_json()))) == reply


def test_samples_that_were_begun_are_finished(sampler, tmp_path, capsys):
    asked = [Asked(prompt) for prompt in PROMPTS]
    write_samples(sampler, asked, tmp_path / "undisturbed" / "samples.jsonl")
    path = tmp_path / "w" / "samples.jsonl"
    with pytest.raises(Interrupted), resume_cache_of(path) as resume_cache:
        sampler(PROMPTS, resume_cache=resume_cache, progress=stop_after(2))
    assert [file.name for file in path.parent.iterdir()] == ["samples.jsonl.partial"]
    write_samples(sampler, asked, path)
    assert f"{len(resume_cache)} parts of it are taken from there" in " ".join(capsys.readouterr().out.split())
    assert path.read_text() == (tmp_path / "undisturbed" / "samples.jsonl").read_text()
    assert [file.name for file in path.parent.iterdir()] == ["samples.jsonl"]
    write_samples(sampler, asked[:1], path)
    assert "instead of those that were there" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("damage", ['{"key": "c", "res', "[1, 2]\n", '{"key": "c"}\n', "\n", "\x00\n"])
def test_a_line_that_is_cut_short_counts_as_not_there(tmp_path, damage):
    path = tmp_path / "kept"
    whole = "".join(json.dumps({"key": key, "result": key}) + "\n" for key in "ab")
    path.write_text(whole + damage)
    resume_cache = ResumeCache(path)
    assert [resume_cache.get(key) for key in "abc"] == ["a", "b", None]
    resume_cache.add("c", [1])
    resume_cache.close()
    assert path.read_text() == whole + json.dumps({"key": "c", "result": [1]}) + "\n"


def test_the_resume_cache_goes_when_its_work_is_done(tmp_path):
    with resume_cache_of(tmp_path / "new" / "result.json") as resume_cache:
        resume_cache.add("a", 1)
        assert (tmp_path / "new" / "result.json.partial").exists()
    assert not list((tmp_path / "new").iterdir())


def test_keys_tell_facts_apart():
    facts = [("a", 1), ("a", 2), ("a", [1]), ({"a": 1},), ("a", None), ("a1",)]
    assert len({key_of(*each) for each in facts}) == len(facts)
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
