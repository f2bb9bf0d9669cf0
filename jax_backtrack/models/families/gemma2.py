"""Gemma-2 (arXiv 2408.00118): its Hugging Face configuration and weight names. The 2B, 9B and 27B models."""

import reprlib

from jax_backtrack.errors import InputError
from jax_backtrack.models.families.hf_config import (
    read_common,
    read_flag,
    read_number,
    read_size,
    refuse_unknown,
    write_common,
)
from jax_backtrack.models.families.llama import WEIGHT_NAMES as LLAMA_WEIGHT_NAMES
from jax_backtrack.models.transformer import TransformerConfig

# Llama's, but for the four norms of a block.
WEIGHT_NAMES = LLAMA_WEIGHT_NAMES | {
    "blocks.attention_norm.scale_M": ("model.layers.{layer}.input_layernorm.weight", 0),
    "blocks.attention_post_norm.scale_M": ("model.layers.{layer}.post_attention_layernorm.weight", 0),
    "blocks.feed_forward_norm.scale_M": ("model.layers.{layer}.pre_feedforward_layernorm.weight", 0),
    "blocks.feed_forward_post_norm.scale_M": ("model.layers.{layer}.post_feedforward_layernorm.weight", 0),
}

# `hidden_act` is not here: the published files have it beside `hidden_activation`, which is the one that counts.
_KNOWN = {
    # The others are the same function, written otherwise.
    "hidden_activation": ("gelu_pytorch_tanh", None, "gelu_new", "gelu_fast", "gelu_accurate"),
    "attention_bias": (False, None),
    "use_bidirectional_attention": (False, None),
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def from_hf_config(config: dict) -> TransformerConfig:
    """Reads a Gemma-2 `config.json` given as a dict. Refuses by name whatever would change the model unseen."""
    refuse_unknown(config, _KNOWN)
    return TransformerConfig(
        model_type="gemma2",
        **read_common(config),
        num_key_value_heads=read_size(config, "num_key_value_heads"),
        head_dim=read_size(config, "head_dim"),
        tie_word_embeddings=read_flag(config, "tie_word_embeddings", True),  # the default of transformers
        query_pre_attn_scalar=read_number(config, "query_pre_attn_scalar"),
        hidden_activation="gelu_pytorch_tanh",
        attn_logit_softcapping=_nullable(config, "attn_logit_softcapping"),
        final_logit_softcapping=_nullable(config, "final_logit_softcapping"),
        windows=_windows(config),
        norms_around=True,
        unit_offset=True,
        scale_embedding=True,
    )


def to_hf_config(config: TransformerConfig) -> dict:
    """Returns the fields of a Gemma-2 `config.json` that `from_hf_config` reads back to the same configuration."""
    windows = config.windows * (config.num_hidden_layers // len(config.windows))
    return {
        "architectures": ["Gemma2ForCausalLM"],
        **write_common(config),
        "hidden_act": config.hidden_activation,
        "hidden_activation": config.hidden_activation,
        "attention_bias": False,
        "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": [_GLOBAL if window is None else _LOCAL for window in windows],
    }


def _nullable(config: dict, field: str):
    """Returns a field that may be null but must be there: no value and no field are not the same."""
    if field not in config:
        raise InputError(f"config.json: the field {field!r} is missing; write null for none")
    return None if config[field] is None else read_number(config, field)


def _windows(config: dict) -> tuple[int | None, ...]:
    """Returns the windows of the shortest run of layers that the model repeats: local and global in turn."""
    layers = read_size(config, "num_hidden_layers")
    types = config.get("layer_types") or [(_LOCAL, _GLOBAL)[layer % 2] for layer in range(layers)]
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise InputError(f"config.json: layer_types = {reprlib.repr(types)} is not a list of names")
    if len(types) != layers:
        raise InputError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
    if unknown := sorted(set(types) - {_LOCAL, _GLOBAL}):
        raise InputError(f"config.json: layer_types has {unknown[0]!r}; known are {_LOCAL!r} and {_GLOBAL!r}")
    window = read_size(config, "sliding_window") if _LOCAL in types else None
    size = next(
        size for size in range(1, layers + 1) if layers % size == 0 and types == types[:size] * (layers // size)
    )
    return tuple(window if kind == _LOCAL else None for kind in types[:size])
