"""Attention of token trees: dense, in chunks, by blocks, and as a Pallas kernel for TPU."""
