"""Random checkpoints that transformers writes, in the shapes of real models scaled down, and our ports of them."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from jax_backtrack.distributed.mesh import make_mesh, param_shardings
from jax_backtrack.hub import weights
from jax_backtrack.hub.safetensors_folder import SafetensorsFolder
from jax_backtrack.models import families
from jax_backtrack.models.transformer import Compute, Transformer

TOLERANCE = 1e-4  # of the largest entry

LLAMA3_ROPE = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=5e5)
# Head dimensions, ratios of query to key-value heads, caps and rope are those of the real models; widths, layers and
# vocabulary are small, windows and original contexts shorter than the tests' texts.
_SMALL = dict(vocab_size=512, hidden_size=192, intermediate_size=320, num_hidden_layers=3, initializer_range=0.1)
_GEMMA2 = _SMALL | dict(num_hidden_layers=4, head_dim=256, sliding_window=16, query_pre_attn_scalar=256)
SHAPES = {
    "SmolLM2-135M": (
        "llama",
        dict(
            hidden_size=288,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            rope_theta=1e5,
            tie_word_embeddings=True,
        ),
    ),
    "Llama-3-8B": ("llama", dict(num_attention_heads=8, num_key_value_heads=2, head_dim=128, rope_theta=5e5)),
    "Llama-3.1-8B": (
        "llama",
        dict(
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=128,
            rope_parameters=LLAMA3_ROPE | dict(factor=8.0, original_max_position_embeddings=32),
        ),
    ),
    "Llama-3.2-1B": (
        "llama",
        dict(
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            rope_parameters=LLAMA3_ROPE | dict(factor=32.0, original_max_position_embeddings=32),
            tie_word_embeddings=True,
        ),
    ),
    "Gemma-2-2B": ("gemma2", dict(num_attention_heads=8, num_key_value_heads=4)),
    "Gemma-2-9B": ("gemma2", dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)),
    "Gemma-2-27B": (
        "gemma2",
        dict(num_attention_heads=4, num_key_value_heads=2, head_dim=128, query_pre_attn_scalar=144),
    ),
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, _SMALL | dict(rms_norm_eps=1e-5)),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, _GEMMA2),
}


def random_model(shape: str, **changes) -> transformers.PreTrainedModel:
    """transformers' own model of a shape, with random weights, norms included, in which every token matters."""
    family, fields = SHAPES[shape]
    make_config, make_model, common = _CLASSES[family]
    torch.manual_seed(0)
    # Some releases take another attention of their own, which leaves Gemma-2's soft-cap out.
    model = make_model(make_config(**(common | fields | changes), attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            if family == "gemma2" and "q_proj" in name:
                parameter.mul_(3)  # scores as large as the caps
    return model.eval()


def port(folder: Path, dtype: str = "float32", mesh=None, **compute) -> Transformer:
    """Our model of a folder that has weights and configuration, and needs no tokenizer."""
    config = families.from_hf_config(json.loads((folder / "config.json").read_text()))
    made = Compute(dtype=dtype, **compute)
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), param_dtype=jnp.dtype(dtype), compute=made))
    weights.fill(model, SafetensorsFolder(folder), param_shardings(model, mesh or make_mesh()))
    return model


def random_tokens(shape: tuple[int, ...], seed: int = 0, vocabulary: int = 512) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, shape, dtype=np.int32)


def torch_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


def relative_error(ours, theirs) -> float:
    """The largest difference, in units of the largest entry."""
    theirs = np.asarray(theirs, np.float32)
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())


def rewrite_config(folder, **fields) -> None:
    """Sets fields of a folder's configuration, and takes out those that are to be `...`."""
    config = json.loads((folder / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


SHAPE = "Llama-3.1-8B"


def tiny_llama(**changes):
    sizes = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    return random_model(SHAPE, **(sizes | dict(head_dim=64, vocab_size=320, max_position_embeddings=256) | changes))
