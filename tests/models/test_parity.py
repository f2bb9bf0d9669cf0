"""The ports compute what transformers computes: block by block, whole, in float32 and bfloat16, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jax_backtrack.backtracking import trees
from jax_backtrack.hub import weights
from jax_backtrack.hub.safetensors_folder import SafetensorsFolder
from jax_backtrack.hub.settings import BFLOAT16_ON_CPU
from jax_backtrack.models.attention.dense import attend
from jax_backtrack.models.rope import Llama3Scaling, rope_angles, rope_frequencies
from tests.checkpoints import SHAPES, TOLERANCE, port, random_model, random_tokens, relative_error, torch_logits

TOKENS = random_tokens((2, 60))

computes_bfloat16 = pytest.mark.skipif(
    jax.__version_info__ < BFLOAT16_ON_CPU, reason=f"jax {jax.__version__} does not multiply bfloat16 on a CPU"
)


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request, tmp_path_factory):
    """Of every shape: a folder that transformers wrote, transformers' model, and ours."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = random_model(request.param)
    theirs.save_pretrained(folder)
    return folder, theirs, port(folder)


def block_outputs(model, inputs) -> list[jax.Array]:
    """What each of our blocks makes of the given input streams, one per layer."""
    config = model.config
    position = np.broadcast_to(np.arange(inputs[0].shape[1]), inputs[0].shape[:2])
    end = np.full_like(position, inputs[0].shape[1])
    angles = rope_angles(position, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
    graph, stacked = nnx.split(model.blocks)
    outputs = []
    for layer, x in enumerate(inputs):
        window = config.windows[layer % len(config.windows)]
        visible = trees.tree_attention_mask(position, end, window)
        block = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[layer], stacked))  # noqa: B023
        outputs.append(block(x, angles, lambda *qkv: (attend(*qkv, visible, **model._scores()), None))[0])  # noqa: B023
    return outputs


def test_every_block_equals_transformers(checkpoint, record_property):
    _, theirs, ours = checkpoint
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, given, made: seen.append((given[0].numpy(), made.numpy())))
        for layer in theirs.model.layers
    ]
    torch_logits(theirs, TOKENS)
    for hook in hooks:
        hook.remove()
    outputs = block_outputs(ours, [given for given, _ in seen])
    errors = [relative_error(output, made) for output, (_, made) in zip(outputs, seen, strict=True)]
    record_property("largest_error", max(errors))
    assert max(errors) < TOLERANCE, errors


def test_logits_equal_transformers(checkpoint, record_property):
    _, theirs, ours = checkpoint
    error = relative_error(ours(TOKENS), torch_logits(theirs, TOKENS))
    record_property("largest_error", error)
    assert error < TOLERANCE


@computes_bfloat16
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(checkpoint, record_property):
    folder, theirs, _ = checkpoint
    exact = torch_logits(theirs, TOKENS)
    half = type(theirs).from_pretrained(folder, dtype=torch.bfloat16)
    deviation, their_deviation = (
        float(np.sqrt(np.mean((np.asarray(logits, np.float32) - exact) ** 2) / np.mean(exact**2)))
        for logits in (port(folder, "bfloat16")(TOKENS), torch_logits(half, TOKENS))
    )
    record_property("deviation", (deviation, their_deviation))
    assert deviation < 1.1 * their_deviation


@computes_bfloat16
@pytest.mark.parametrize("shape", ["Llama-3.1-8B", "Gemma-2-2B"])
def test_bfloat16_stays_as_close_on_long_texts(shape, tmp_path, record_property):
    """Positions many times the window and the length before scaling."""
    tokens = random_tokens((1, 800))
    theirs = random_model(shape, num_hidden_layers=2, max_position_embeddings=1024)
    theirs.save_pretrained(tmp_path)
    exact = torch_logits(theirs, tokens)
    half = type(theirs).from_pretrained(tmp_path, dtype=torch.bfloat16)
    deviations = [
        float(np.sqrt(np.mean((np.asarray(logits, np.float32) - exact)[:, -100:] ** 2)))
        for logits in (port(tmp_path, "bfloat16")(tokens), torch_logits(half, tokens))
    ]
    record_property("deviations", deviations)
    assert deviations[0] < 1.1 * deviations[1]


def test_gradients_equal_transformers(checkpoint, tmp_path, record_property):
    _, theirs, ours = checkpoint
    theirs.zero_grad()
    theirs(torch.tensor(TOKENS), labels=torch.tensor(TOKENS).long()).loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    graph, params = nnx.split(ours)

    def loss(params):
        log_p = jax.nn.log_softmax(nnx.merge(graph, params)(TOKENS))[:, :-1]
        return -jnp.take_along_axis(log_p, TOKENS[:, 1:, None], axis=-1).mean()

    weights.save(nnx.merge(graph, jax.jit(jax.grad(loss))(params)), tmp_path)
    gradient = SafetensorsFolder(tmp_path)
    assert gradient.shapes().keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        whole = tuple(slice(0, size) for size in value.shape)
        errors[name] = relative_error(gradient.read(name, whole), value)
    record_property("largest_error", max(errors.values()))
    assert max(errors.values()) < TOLERANCE, max(errors, key=errors.get)


@pytest.mark.parametrize(
    "setting",
    [
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"sliding_window": 60},
        {"query_pre_attn_scalar": 100},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_every_setting_of_gemma2_matters_here(setting):
    """Parity would not notice a setting that these checkpoints and texts do not exercise."""
    plain, changed = (torch_logits(random_model("Gemma-2-2B", **fields), TOKENS) for fields in ({}, setting))
    assert relative_error(changed, plain) > 100 * TOLERANCE


@pytest.mark.parametrize("factor,head_dim", [(8.0, 128), (32.0, 64)], ids=["Llama-3.1-8B", "Llama-3.2-1B"])
def test_scaled_rope_frequencies_are_those_of_transformers(factor, head_dim):
    scaling = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    config = transformers.LlamaConfig(
        hidden_size=16 * head_dim,
        num_attention_heads=16,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling},
        max_position_embeddings=131072,
    )
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    ours = rope_frequencies(head_dim, 5e5, Llama3Scaling(**scaling))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    plain = rope_frequencies(head_dim, 5e5)
    assert (ours == plain).any() and np.isclose(ours, plain / factor).any()
    assert ((ours < plain * 0.99) & (ours > plain / factor * 1.01)).any()
