"""Random tiny models and token trees for them, for tests of properties that hold for any weights."""

import numpy as np
from flax import nnx
from hypothesis import strategies as st

from jax_backtrack.backtracking.trees import Branch, Example
from jax_backtrack.models.assign import assign
from jax_backtrack.models.transformer import Compute, Transformer, TransformerConfig

VOCAB = 61
SHORT = 4096  # entries of the fixture `short_tokenizer`
RESET_ID, EOT_ID = 3, 2


def config(**changes) -> TransformerConfig:
    fields = dict(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        query_pre_attn_scalar=8,
    )
    return TransformerConfig(**(fields | changes))


# What makes a tiny Llama a tiny Gemma-2. The window is shorter than most paths.
GEMMA2 = dict(
    model_type="gemma2",
    num_hidden_layers=4,
    query_pre_attn_scalar=16,
    hidden_activation="gelu_pytorch_tanh",
    attn_logit_softcapping=5.0,
    final_logit_softcapping=10.0,
    windows=(3, None),
    norms_around=True,
    unit_offset=True,
    scale_embedding=True,
)
FAMILIES = {"llama": {}, "gemma2": GEMMA2}


def model(seed: int = 0, compute: Compute = Compute(), **changes) -> Transformer:
    """A tiny model whose weights are large enough that every token matters to every later one."""
    made = Transformer(config(**changes), nnx.Rngs(seed), compute=compute)
    for path, param in nnx.to_flat_state(nnx.state(made, nnx.Param)):
        if path[-1] != "scale_M":
            assign(param, param[...] * 8)
    return made


token_ids = st.integers(5, VOCAB - 1)


def replies(longest: int = 6):
    return st.lists(token_ids, min_size=1, max_size=longest).map(lambda ids: np.asarray(ids, np.int32))


@st.composite
def examples(draw, backtracks=st.booleans()):
    """Whole replies of which a draft can be taken back: the rejected one is no prefix of the chosen one."""
    chosen, rejected = draw(replies()), draw(replies())
    shared = min(len(chosen), len(rejected))
    if (chosen[:shared] == rejected[:shared]).all():
        rejected = np.append(rejected[:shared], 5 if len(chosen) <= shared or chosen[shared] != 5 else 6)
        rejected = rejected.astype(np.int32)
    chosen, rejected = (np.append(reply, np.int32(EOT_ID)) for reply in (chosen, rejected))
    return Example(draw(replies()), chosen, rejected, draw(backtracks))


@st.composite
def branches(draw, depth: int = 3):
    """Random trees; every token that has a parent may carry weight."""
    tokens = draw(st.lists(token_ids, min_size=1, max_size=3))
    count = draw(st.integers(0, 3)) if depth else 0
    children = tuple(draw(branches(depth=depth - 1)) for _ in range(count))
    return Branch(tokens, pair_id=0, loss_weight=draw(st.sampled_from([0.0, 1.0, -1.0])), children=children)


@st.composite
def rooted_trees(draw):
    """Random trees with an unscored prompt, as every real one has."""
    children = tuple(draw(branches(depth=2)) for _ in range(draw(st.integers(1, 3))))
    return Branch(draw(st.lists(token_ids, min_size=1, max_size=4)), children=children)
