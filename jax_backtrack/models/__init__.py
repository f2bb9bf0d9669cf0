"""Flax NNX ports of decoder-only transformers, with token trees in place of the causal mask."""
