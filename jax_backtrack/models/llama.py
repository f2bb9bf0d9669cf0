"""Llama: its Hugging Face configuration, and the two-way table between Hugging Face weight names and our parameters."""

from jax_backtrack.errors import InputError
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
_KNOWN = {"hidden_act": ("silu",), "attention_bias": (False, None), "mlp_bias": (False, None)}


def from_hf_config(config: dict) -> TransformerConfig:
    """Reads a Llama `config.json` given as a dict. Refuses by name whatever would change the model unseen."""
    for field, known in _KNOWN.items():
        if field in config and config[field] not in known:
            raise InputError(f"config.json: {field} = {config[field]!r} is not supported; only {known[0]!r} is")
    # transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta"),
        **(config.get("rope_scaling") or {}),
    }
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise InputError(f"config.json: rope type {rope_type!r} is not supported; only 'default' is")
    if rope.get("rope_theta") is None:
        raise InputError("config.json: neither rope_parameters nor rope_theta gives the base of the rotary embedding")
    try:
        return TransformerConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            rope_theta=float(rope["rope_theta"]),
            rms_norm_eps=config["rms_norm_eps"],
            tie_word_embeddings=config["tie_word_embeddings"],
            max_position_embeddings=config["max_position_embeddings"],
        )
    except KeyError as missing:
        raise InputError(f"config.json: the field {missing} is missing") from None


def to_hf_config(config: TransformerConfig) -> dict:
    """The fields of a Llama `config.json` that `from_hf_config` reads back to the same configuration."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
    }
