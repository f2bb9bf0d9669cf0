"""Losses against numbers worked out by hand, and margins against the published DPO loss on whole sequences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from hypothesis import given, settings

from jax_backtrack.backtracking.losses import dpo_loss, pair_logps, pair_margins, pair_slots, sft_loss
from jax_backtrack.backtracking.trees import TreeSpec, build_tree, draw_cuts, pack, stack
from jax_backtrack.training.step import logps
from tests import tiny


def test_sft_loss_by_hand():
    logprob = jnp.asarray([[-1.0, -2.0, -3.0, -9.0]])
    weight = jnp.asarray([[1.0, 1.0, 4.0, 0.0]])
    assert math.isclose(sft_loss(logprob, weight), (1 + 2 + 12) / 6, rel_tol=1e-6)


def test_margins_by_hand():
    logprob = jnp.asarray([[-1.0, -2.0, -4.0, -8.0, 7.0]])
    weight = jnp.asarray([[1.0, -1.0, 1.0, -1.0, 0.0]])
    pair = jnp.asarray([[0, 0, 3, 3, -1]])
    margin, is_pair = pair_margins(logprob, pair, weight), pair_slots(pair, weight)
    np.testing.assert_allclose(margin, [[1.0, 0.0, 0.0, 4.0, 0.0]])
    assert is_pair.tolist() == [[True, False, False, True, False]]
    np.testing.assert_allclose(pair_logps(logprob, pair, weight)[0, [0, 3]], [[-1.0, -2.0], [-4.0, -8.0]])


def test_dpo_loss_by_hand():
    """beta 0.5. Rewards of the first pair: 0.5 * (-4 + 6) = 1 and 0.5 * (-9 + 5) = -2, margin 3; of the second 0.5 *
    (-8 + 7) = -0.5 and 0.5 * (-3 + 4) = 0.5, margin -1. The third slot holds no pair."""
    loss, metrics = dpo_loss(
        jnp.asarray([[-4.0, -9.0], [-8.0, -3.0], [99.0, 0.0]]),
        jnp.asarray([[-6.0, -5.0], [-7.0, -4.0], [0.0, 0.0]]),
        jnp.asarray([True, True, False]),
        beta=0.5,
    )
    expected = (math.log(1 + math.exp(-3)) + math.log(1 + math.exp(1))) / 2
    assert math.isclose(loss, expected, rel_tol=1e-6)
    assert metrics == {
        "rewards/chosen": 0.25,
        "rewards/rejected": -0.75,
        "rewards/margins": 1.0,
        "rewards/accuracies": 0.5,
        "logps/chosen": -6.0,
        "logps/rejected": -6.0,
    }


def test_dpo_starts_at_log_2():
    logps = jnp.asarray([[-5.0, -7.5], [-17.25, -3.0], [-0.125, -9.0]])
    loss, _ = dpo_loss(logps, logps, jnp.ones(3, bool), beta=0.3)
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
def test_rewards_are_those_of_the_published_loss_on_whole_sequences(example):
    """Chosen and rejected as whole sequences behind the prompt, drafts included: what both share cancels in margins,
    and is left out of both sides."""
    policy, reference = (nnx.state(tiny.model(seed=seed)) for seed in (1, 2))
    cuts = draw_cuts(example, np.random.default_rng(0))
    x, yes, no = example.prompt.tolist(), example.chosen.tolist(), example.rejected.tolist()
    reset, draft, guard = tiny.RESET_ID, no[: cuts.draft], yes[: cuts.guard]
    # What both sides of a pair begin with, and the two sides behind it.
    pairs = [
        (draft, [reset, *yes], no[cuts.draft :]) if example.backtracks else ([], yes, no),
        (guard, yes[cuts.guard :], [reset, *no]),
    ]
    row = pack([build_tree(example, TreeSpec("dpo", True, "keep", reset), cuts)], 64)
    ours = [np.asarray(logps(graph, params, stack([row]), 16))[0, :2] for params in (policy, reference)]

    def log_p(of_pair) -> np.ndarray:
        return np.array([[of_pair(params, *pair) for pair in pairs] for params in (policy, reference)])

    whole = log_p(lambda params, begun, *two: [sequence_log_p(params, x, begun + side) for side in two])
    shared = log_p(lambda params, begun, *_: [sequence_log_p(params, x, begun)])
    np.testing.assert_allclose(ours, whole - shared, rtol=1e-4, atol=1e-3)

    beta = 0.1
    rewards = beta * torch.tensor(whole[0] - whole[1])
    margin = rewards[:, 0] - rewards[:, 1]
    loss, metrics = dpo_loss(jnp.asarray(ours[0]), jnp.asarray(ours[1]), jnp.ones(2, bool), beta)
    assert math.isclose(loss, -torch.nn.functional.logsigmoid(margin).mean(), rel_tol=1e-4)
    assert math.isclose(metrics["rewards/margins"], margin.mean(), rel_tol=1e-3, abs_tol=1e-4)
    assert metrics["rewards/accuracies"] == float((margin > 0).float().mean())
