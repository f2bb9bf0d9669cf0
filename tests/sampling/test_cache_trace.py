"""The cache step by step: what a row sees is its context and nothing else, and a draft is not seen behind its reset."""

import dataclasses

import numpy as np
import pytest

from jax_backtrack import Sampler, SamplingParams
from jax_backtrack.sampling.batching import ContinuousBatch, Request
from jax_backtrack.sampling.cache_trace import NOTHING, CacheStep, trace_cache
from jax_backtrack.sampling.settings import StaticParams
from tests import tiny
from tests.decoding import engine, traced

RING, PROMPT, DRAFT = 7, 8, 4
PLAN = StaticParams(
    reset_mode="rewind", reset_id=tiny.RESET_ID, stop_ids=(tiny.EOT_ID,), used=frozenset({"temperature"}), steps=RING
)
REQUESTS = [
    Request(0, np.array([9, 8, 7], np.int32), np.array([], np.int32), seed=1),
    Request(1, np.array([9, 8, 6, 5], np.int32), np.array([11, 12], np.int32), seed=2),
]


def seen_in_order(look: CacheStep, row: int) -> list[int]:
    """The tokens that a row sees, by position: its prompt, then the ring from the oldest slot on."""
    ring = np.arange(look.prompt, look.sees.shape[1])
    by_age = ring[np.argsort((ring - look.slot - 1) % len(ring))]
    order = [*range(look.prompt), *by_age]
    return [int(look.holds[row, slot]) for slot in order if look.sees[row, slot]]


@pytest.mark.parametrize("mode", ["keep", "rewind", "resample"])
def test_a_row_sees_its_context_and_nothing_else(mode):
    bias = [-1000.0] * DRAFT + [1000.0]
    made = engine(tiny.model(), dataclasses.replace(PLAN, reset_mode=mode), traced(max_resets=1, bias=bias))
    contexts = [request.ids[:-1].tolist() for request in REQUESTS]
    resets, steps = [0, 0], 0
    for look in trace_cache(ContinuousBatch(made, len(REQUESTS), PROMPT, RING), REQUESTS):
        steps += 1
        for row, request in enumerate(REQUESTS):
            if look.done[row]:
                continue
            if look.resets[row] > resets[row] and mode != "keep":
                contexts[row] = request.prompt_ids.tolist()[: -1 if mode == "resample" else None]
            resets[row] = look.resets[row]
            contexts[row].append(int(look.fed[row]))
            assert look.holds[row, look.slot] == look.fed[row] and look.sees[row, look.slot]
            assert seen_in_order(look, row) == contexts[row]
    assert resets == [1, 1]
    assert steps == RING if mode == "keep" else steps > RING  # behind a reset the ring is written round


def test_a_sampler_looks_at_all_prompts_at_once(smollm_file, reset_tokenizer):
    model = tiny.model(vocab_size=smollm_file.hf_config()["vocab_size"])
    sampler = Sampler(model, reset_tokenizer, SamplingParams(max_new_tokens=3, reset_bias=1000.0))
    prompts = ["one", "two", "and three"]
    found = list(sampler.trace_cache(prompts, prefills=["", "it", ""]))
    replies = sampler(prompts, prefills=["", "it", ""])
    assert [reply.resets for reply in replies] == found[-1].resets.tolist() == [1, 1, 1]
    assert found[0].sees.shape == found[0].holds.shape == (3, found[0].prompt + 3)
    assert (
        found[0].fed == [ids[-1] for ids in map(reset_tokenizer.encode, ["assistant\n", "it", "assistant\n"])]
    ).all()
    assert (found[0].holds[found[0].sees] != NOTHING).all()
