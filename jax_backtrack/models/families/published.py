"""Shapes of well-known models, as their published `config.json` have them: enough to plan a run without the Hub.

The models are gated; their weights and tokenizers are not here. Tokens and dtypes are left out.
"""

_LLAMA_3_8B = dict(
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
_LLAMA_3_1 = dict(
    max_position_embeddings=131072,
    rope_scaling=dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)
_GEMMA_2_2B = dict(
    model_type="gemma2",
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    query_pre_attn_scalar=256,
    hidden_activation="gelu_pytorch_tanh",
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    sliding_window=4096,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=8192,
)
_GEMMA_2_9B = _GEMMA_2_2B | dict(
    hidden_size=3584,
    intermediate_size=14336,
    num_hidden_layers=42,
    num_attention_heads=16,
    num_key_value_heads=8,
)

# Hub id -> the fields of its config.json that shape the model
PUBLISHED: dict[str, dict] = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_3_8B | _LLAMA_3_1,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_8B | _LLAMA_3_1,
    "google/gemma-2-2b": _GEMMA_2_2B,
    "google/gemma-2-2b-it": _GEMMA_2_2B,
    "google/gemma-2-9b": _GEMMA_2_9B,
    "google/gemma-2-9b-it": _GEMMA_2_9B,
}
