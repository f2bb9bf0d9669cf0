"""Llama (arXiv 2407.21783): its Hugging Face configuration and weight names. Llama-3 to 3.2, SmolLM2."""

import reprlib

from jax_backtrack.errors import InputError
from jax_backtrack.models.families.hf_config import read_common, read_flag, read_size, refuse_unknown, write_common
from jax_backtrack.models.transformer import TransformerConfig

# our path -> (Hugging Face name, how many leading axes of ours are inputs; 0 where the array is stored as it is).
# Linear layers stand there as [outputs, inputs]. `{layer}` marks parameters that are stacked along L here.
WEIGHT_NAMES = {
    "embedding_VxM": ("model.embed_tokens.weight", 0),
    "blocks.attention_norm.scale_M": ("model.layers.{layer}.input_layernorm.weight", 0),
    "blocks.query_MxNxD": ("model.layers.{layer}.self_attn.q_proj.weight", 1),
    "blocks.key_MxKxD": ("model.layers.{layer}.self_attn.k_proj.weight", 1),
    "blocks.value_MxKxD": ("model.layers.{layer}.self_attn.v_proj.weight", 1),
    "blocks.out_NxDxM": ("model.layers.{layer}.self_attn.o_proj.weight", 2),
    "blocks.feed_forward_norm.scale_M": ("model.layers.{layer}.post_attention_layernorm.weight", 0),
    "blocks.gate_MxF": ("model.layers.{layer}.mlp.gate_proj.weight", 1),
    "blocks.up_MxF": ("model.layers.{layer}.mlp.up_proj.weight", 1),
    "blocks.down_FxM": ("model.layers.{layer}.mlp.down_proj.weight", 1),
    "final_norm.scale_M": ("model.norm.weight", 0),
    "head_VxM": ("lm_head.weight", 0),
}

# Settings that change what the model computes, and the only values that this port knows.
_KNOWN = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
}


def from_hf_config(config: dict) -> TransformerConfig:
    """Reads a Llama `config.json` given as a dict. Refuses by name whatever would change the model unseen."""
    refuse_unknown(config, _KNOWN)
    common = read_common(config)
    _refuse_windows(config, common["max_position_embeddings"])
    # Both may be missing or null: what they are then is a rule of transformers.
    heads = common["num_attention_heads"]
    kv_heads, head_dim = heads, common["hidden_size"] // heads
    if config.get("num_key_value_heads") is not None:
        kv_heads = read_size(config, "num_key_value_heads")
    if config.get("head_dim") is not None:
        head_dim = read_size(config, "head_dim")
    return TransformerConfig(
        model_type="llama",
        **common,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=read_flag(config, "tie_word_embeddings", False),  # the default of transformers
        query_pre_attn_scalar=head_dim,
    )


def _refuse_windows(config: dict, positions: int) -> None:
    """Raises InputError for a window that a Llama in transformers has as soon as it has a cache."""
    for field in ("sliding_window", "attention_chunk_size"):
        if config.get(field) is not None and read_size(config, field) < positions:
            raise InputError(f"config.json: {field} = {config[field]} is not supported in a Llama; only null is")
    types = config.get("layer_types")
    if types and not (isinstance(types, list) and all(kind in ("full_attention", "attention") for kind in types)):
        raise InputError(
            f"config.json: layer_types = {reprlib.repr(types)}; a Llama's layers are all of the type 'full_attention'"
        )


def to_hf_config(config: TransformerConfig) -> dict:
    """Returns the fields of a Llama `config.json` that `from_hf_config` reads back to the same configuration."""
    return {
        "architectures": ["LlamaForCausalLM"],
        **write_common(config),
        "hidden_act": config.hidden_activation,
        "attention_bias": False,
        "mlp_bias": False,
    }
