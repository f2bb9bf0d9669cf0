"""A GPU computes what a CPU and transformers compute, in the form that recipes choose for it."""

import dataclasses
import json
import statistics
import time

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from configs import dpo_llama, sft_llama
from jax_backtrack.aot.compile import programs
from jax_backtrack.aot.hlo import HloProgram
from jax_backtrack.backtracking.trees import Example, TreeSpec, build_tree, draw_cuts, pack, stack
from jax_backtrack.distributed.mesh import param_shardings, rows_sharding
from jax_backtrack.models.families.published import PUBLISHED
from jax_backtrack.models.lora import split
from jax_backtrack.models.transformer import Compute, Transformer
from jax_backtrack.sampling.batching import ContinuousBatch, Request
from jax_backtrack.training.step import Batch, TrainConfig, compile_step, init_state
from tests import tiny
from tests.checkpoints import TOLERANCE, port, random_model, random_tokens, relative_error, torch_logits
from tests.decoding import GREEDY, SAMPLED, both, engine, forced_at, requests, traced
from tests.published_models import config_of

pytestmark = pytest.mark.gpu
CHOSEN = Compute.suited_to("gpu")
FORM = dict(attention=CHOSEN.attention, skip_unscored=CHOSEN.skip_unscored)
TOKENS = random_tokens((1, 700))  # more than a chunk of attention
BFLOAT16 = 0.05  # largest difference of a logit in bfloat16, in units of the largest logit

every_shape = pytest.mark.parametrize("shape", ["SmolLM2-135M", "Llama-3.1-8B", "Gemma-2-2B"])
every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@pytest.fixture
def written(tmp_path, shape):
    """A folder that transformers wrote, and its logits on the CPU in float32."""
    theirs = random_model(shape, max_position_embeddings=1024)
    theirs.save_pretrained(tmp_path)
    return tmp_path, theirs, torch_logits(theirs, TOKENS)


@every_shape
def test_logits_are_those_of_transformers_in_float32(written, mesh):
    folder, _, exact = written
    assert relative_error(port(folder, mesh=mesh, **FORM)(TOKENS), exact) < TOLERANCE


@every_shape
def test_logits_in_bfloat16_are_as_close_as_those_of_transformers(written, mesh):
    folder, theirs, exact = written
    ours = port(folder, "bfloat16", mesh=mesh, **FORM)(TOKENS)
    half = torch_logits(type(theirs).from_pretrained(folder, dtype=torch.bfloat16), TOKENS)
    assert relative_error(ours, exact) < max(BFLOAT16, 1.5 * relative_error(half, exact))


# ------------------------------------------------------------------------------------------------------- training

ROWS, LENGTH = 2, 700


def batch_of(objective: str) -> Batch:
    """Rows of as many trees as they hold."""
    rng = np.random.default_rng(0)
    recipe = TreeSpec(objective, True, "rewind", tiny.RESET_ID)
    rows = []
    for _ in range(ROWS):
        packed = []
        while sum(tree.length for tree in packed) < LENGTH - 60:
            prompt, chosen, rejected = (rng.integers(5, 60, rng.integers(2, 13)).astype(np.int32) for _ in range(3))
            rejected[0] = 5 + (chosen[0] - 4) % 50
            example = Example(prompt, chosen, rejected, True)
            packed.append(build_tree(example, recipe, draw_cuts(example, rng)))
        rows.append(pack(packed, LENGTH))
    return ContinuousBatch(stack(rows), rng.standard_normal((ROWS, LENGTH, 2)).astype(np.float32))


def one_step(mesh, objective: str, family: str, dtype: str = "float32", **form):
    """Metrics of a step, and the moments of the gradient that it leaves."""
    model = tiny.model(compute=Compute(dtype, mesh=mesh, **form), **tiny.FAMILIES[family])
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.device_put(params, param_shardings(model, mesh)))
    graph, trained, frozen = split(model)
    plan = TrainConfig(objective, 0.1, 0.5, 4, 1e-3, 1, 0.0, 1.0, 64, tiny.RESET_ID)
    state = init_state(trained, plan)
    batch = jax.device_put(batch_of(objective), rows_sharding(mesh))
    state, metrics = compile_step(graph, plan, state)(state, frozen, batch)
    return jax.device_get((metrics, state.opt_state))


@every_family
@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_training_step_is_that_of_a_cpu(family, objective, mesh, cpu_mesh):
    ours, right = (
        one_step(mesh, objective, family, **FORM),
        one_step(cpu_mesh, objective, family, attention="dot_product"),
    )
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(right), strict=True):
        scale = max(np.abs(other).max(), 1e-6)
        np.testing.assert_allclose(one, other, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))


def test_a_training_step_in_bfloat16_is_near_that_in_float32(mesh, cpu_mesh):
    low, _ = one_step(mesh, "sft", "llama", "bfloat16", **FORM)
    exact, _ = one_step(cpu_mesh, "sft", "llama", attention="dot_product")
    for name in ("loss", "grad_norm"):
        assert low[name] == pytest.approx(exact[name], rel=BFLOAT16), name


@pytest.mark.parametrize("recipe", [sft_llama, dpo_llama])
def test_no_program_waits_for_the_host_but_at_the_samplers_loop(recipe, mesh, tmp_path):
    """As it is compiled; and every state is overwritten where it lies."""
    small = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    shape = PUBLISHED["meta-llama/Meta-Llama-3-8B"] | small | dict(num_key_value_heads=2, head_dim=16)
    (tmp_path / "config.json").write_text(json.dumps(shape))
    for name, trace in programs(config_of(recipe, tmp_path), mesh, platform="gpu").items():
        compiled = trace().lower().compile()
        assert not list(HloProgram(compiled.as_text()).instructions("conditional")), name
        assert (compiled.memory_analysis().alias_size_in_bytes > 0) == (name in ("training step", "sampler")), name


# ------------------------------------------------------------------------------------------------------- sampling


@every_family
@pytest.mark.parametrize("mode", ["keep", "rewind", "resample"])
def test_replies_equal_naive_recomputation(family, mode):
    for plan, turned in (
        (GREEDY, traced(bias=forced_at([3], [2, 4], []))),
        (SAMPLED, traced(bias=3.0, temperature=1.7)),
    ):
        written, expected = both(
            requests(), dataclasses.replace(plan, reset_mode=mode), turned, family, unstacked=False
        )
        assert written == expected


def test_what_a_reset_costs(mesh, capsys):
    """No verdict: a figure. A batch writes the same number of tokens, without a reset and with one in every row."""
    rows, prompt, new, rounds = 16, 16, 65, 5
    config = tiny.config(hidden_size=256, intermediate_size=768, num_hidden_layers=4, head_dim=64)
    model = Transformer(config, nnx.Rngs(0), compute=Compute(mesh=mesh))
    plan = dataclasses.replace(GREEDY, reset_mode="rewind", stop_ids=(-1,), steps=new)
    ids = np.random.default_rng(0).integers(5, config.vocab_size, (rows, prompt), dtype=np.int32)
    asked = [Request(number, row, row[:0], number) for number, row in enumerate(ids)]
    biases = {"plain": [-1e9], "reset": [*[-1e9] * (new // 2), 1e9, -1e9]}
    taken = {name: [] for name in biases}
    for number in range(rounds + 1):
        for name, bias in biases.items():
            batch = ContinuousBatch(engine(model, plan, traced(1, bias), unstacked=False), rows, prompt, new)
            starts = []

            def start(state, starts=starts):
                jax.block_until_ready(state)
                starts.append(time.perf_counter())

            updates = next(batch.run(asked, steps=new, before=start))
            taken[name] += [time.perf_counter() - starts[0]] if number else []  # the first one compiles
            resets = sum(int((update.ids == tiny.RESET_ID).sum()) for update in updates)
            assert resets == (rows if name == "reset" else 0)
    # Rounds are compared each for itself: a machine's speed may drift by more than a reset could cost.
    costs = [(reset - plain) / plain * new for plain, reset in zip(*taken.values(), strict=True)]
    step = 1e3 * statistics.median(taken["plain"]) / new
    with capsys.disabled():
        print(
            f"\n{jax.devices()[0].device_kind}: {rows} rows, {step:.3f} ms a step; a reset in every row costs "
            f"{statistics.median(costs):+.2f} steps ({min(costs):+.2f} to {max(costs):+.2f} in {rounds} rounds)"
        )
