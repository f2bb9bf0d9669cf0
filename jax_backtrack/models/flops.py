"""What a model has to compute, counted by its formulas: no recomputation, no padding, no block skipped or half used."""

from jax_backtrack.models.transformer import TransformerConfig


def forward_flops(config: TransformerConfig, rows: int, length: int) -> tuple[float, float]:
    """Returns the floating-point operations of one forward pass over plain rows: of products with weights, and of
    attention.

    A multiplication and an addition count as two. Attention is causal, within each layer's window; every token is
    scored. Trees need less of both.
    """
    width, dim = config.hidden_size, config.head_dim
    per_layer = 2 * width * dim * (config.num_attention_heads + config.num_key_value_heads)
    per_layer += 3 * width * config.intermediate_size
    weights = config.num_hidden_layers * per_layer + config.vocab_size * width
    pairs = sum(_pairs(length, window) for window in config.windows) / len(config.windows)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * dim * pairs
    return 2 * rows * length * weights, rows * attention


def step_flops(config: TransformerConfig, rows: int, length: int, adapter_params: int = 0) -> float:
    """Returns the floating-point operations of a training step.

    The backward pass costs twice the forward pass: gradients of inputs and of weights. With adapters those of the
    frozen weights are not computed.
    """
    weights, attention = forward_flops(config, rows, length)
    if not adapter_params:
        return 3 * (weights + attention)
    return 2 * weights + 3 * attention + 6 * rows * length * adapter_params


def _pairs(length: int, window: int | None) -> float:
    """Pairs of a query and a key that it sees, in a plain row."""
    visible = length if window is None else min(length, window)
    return visible * (visible + 1) / 2 + (length - visible) * visible
