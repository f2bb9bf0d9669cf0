"""Losses against numbers worked out by hand, and margins against the published DPO loss on whole sequences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from hypothesis import given, settings

from jax_backtrack.losses import dpo_loss, pair_margins, pair_slots, sft_loss
from jax_backtrack.training.step import margins
from jax_backtrack.trees import Recipe, build_tree, draw_cuts, pack, stack
from tests import tiny


def test_sft_loss_by_hand():
    score = jnp.asarray([[-1.0, -2.0, -3.0, -9.0]])
    weight = jnp.asarray([[1.0, 1.0, 4.0, 0.0]])
    assert math.isclose(sft_loss(score, weight), (1 + 2 + 12) / 6, rel_tol=1e-6)


def test_margins_by_hand():
    score = jnp.asarray([[-1.0, -2.0, -4.0, -8.0, 7.0]])
    weight = jnp.asarray([[1.0, -1.0, 1.0, -1.0, 0.0]])
    pair = jnp.asarray([[0, 0, 3, 3, -1]])
    margin, is_pair = pair_margins(score, pair, weight), pair_slots(pair, weight)
    np.testing.assert_allclose(margin, [[1.0, 0.0, 0.0, 4.0, 0.0]])
    assert is_pair.tolist() == [[True, False, False, True, False]]


def test_dpo_loss_by_hand():
    """beta 0.5: rewards 0.5 * (3 - 1) = 1 and 0.5 * (-2 - 0) = -1; the third slot holds no pair."""
    loss, metrics = dpo_loss(
        jnp.asarray([3.0, -2.0, 99.0]), jnp.asarray([1.0, 0.0, 0.0]), jnp.asarray([True, True, False]), beta=0.5
    )
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2
    assert math.isclose(loss, expected, rel_tol=1e-6)
    assert metrics["reward_margin"] == 0.0 and metrics["reward_accuracy"] == 0.5


def test_dpo_starts_at_log_2():
    margin = jnp.asarray([5.0, -17.25, 0.125])
    loss, _ = dpo_loss(margin, margin, jnp.ones(3, bool), beta=0.3)
    assert loss == np.float32(math.log(2))


graph, _ = nnx.split(tiny.model())
causal_logits = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens)[0])


def sequence_log_p(params, context: list[int], reply: list[int]) -> float:
    """Summed log-probability of a reply behind its context, as DPO implementations for whole sequences take it."""
    tokens = [*context, *reply]
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    log_p = torch.log_softmax(torch.tensor(np.asarray(causal_logits(params, padded))), dim=-1)
    return sum(float(log_p[at - 1, tokens[at]]) for at in range(len(context), len(tokens)))


@settings(max_examples=6, deadline=None)
@given(tiny.examples())
def test_margins_are_those_of_the_published_loss_on_whole_sequences(example):
    """Chosen and rejected as whole sequences behind the prompt, drafts included: the shared prefix cancels."""
    policy, reference = (nnx.state(tiny.model(seed=seed)) for seed in (1, 2))
    cuts = draw_cuts(example, np.random.default_rng(0))
    x, yes, no = example.prompt.tolist(), [*example.chosen, tiny.EOT_ID], [*example.rejected, tiny.EOT_ID]
    reset = tiny.RESET_ID
    sides = [
        ([*no[: cuts.draft], reset, *yes], no) if example.backtracks else (yes, no),
        (yes, [*yes[: cuts.guard], reset, *no]),
    ]
    expected = [
        [sequence_log_p(params, x, chosen) - sequence_log_p(params, x, rejected) for chosen, rejected in sides]
        for params in (policy, reference)
    ]
    row = pack([build_tree(example, Recipe("dpo", True, "keep", reset, tiny.EOT_ID), cuts)], 64)
    ours = [np.asarray(margins(graph, params, stack([row]), 16))[0, :2] for params in (policy, reference)]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-3)

    beta = 0.1
    log_ratio = beta * (torch.tensor(expected[0]) - torch.tensor(expected[1]))
    published = -torch.nn.functional.logsigmoid(log_ratio).mean()
    loss, _ = dpo_loss(jnp.asarray(ours[0]), jnp.asarray(ours[1]), jnp.ones(2, bool), beta)
    assert math.isclose(loss, published, rel_tol=1e-4)
