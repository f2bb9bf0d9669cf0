"""Flax NNX ports of decoder-only transformers, with token trees in place of the causal mask.

Letters at the end of names are axes, as in `query_BxTxNxD`, in the whole package:

    B  sequences of a batch, or slots of the decode batch      S  tokens of a sequence, or slots of a cache
    T  tokens that are computed now: queries                   O  output features of a matrix
    M  model width                                             F  feed-forward width; in the probe, features
    N  query heads; in evaluation, replies or prompts          K  key-value heads
    G  query heads of a key-value head                         H  heads of either kind
    D  head dimension                                          V  vocabulary
    R  rank of an adapter; slots of the ring; B * K rows       C  tokens of a chunk or key block; steps of a call
    Q  tokens of a query block; G * T queries                  I, J  query blocks (or input features), key blocks
    P  slots of a prompt                                       Z  parts of the batch over the mesh
    E, Y  pairs of blocks, and those that a kernel visits      W  words

Parameters of all layers are stacked along a first axis, L, which their names leave out.
"""
