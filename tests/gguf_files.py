"""Small .gguf files as llama.cpp's converter writes them: its names, its order of rows, its metadata."""

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from jax_backtrack.hub.gguf import _HF_NAMES
from jax_backtrack.tokenizer.chat_tokenizer import RESET
from tests.chat_tokenizers import CHATML

CONTROL, NORMAL, UNUSED = 3, 1, 5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ORDINARY = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]


def vocabulary(rows: int, with_reset: bool = False) -> tuple[list[str], list[int]]:
    """Tokens and their types, filled up as the converter does it."""
    tokens = [*SPECIAL, *[RESET] * with_reset, *ORDINARY]
    types = [CONTROL] * (len(SPECIAL) + with_reset) + [NORMAL] * len(ORDINARY)
    filled = range(len(tokens), rows)
    return [*tokens, *(f"[PAD{index}]" for index in filled)], [*types, *[UNUSED] * len(filled)]


def write(path: Path, model, *, with_reset: bool = False, rope_factors=None, **metadata) -> Path:
    """Writes a Llama of transformers. `metadata` is added to the usual, or takes its place; `...` leaves a field out.
    Dots in names are written as two underscores."""
    config, state = model.config, {name: each.float().numpy() for name, each in model.state_dict().items()}
    tokens, types = vocabulary(config.vocab_size, with_reset)
    fields = {
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": CHATML,
    } | {name.replace("__", "."): value for name, value in metadata.items()}
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        if value is not ...:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for hf_name, tensor in state.items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for kind, count in heads.items():
            if kind in hf_name:
                tensor = interleaved(tensor, count)
        writer.add_tensor(gguf_name(hf_name), tensor)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows in llama.cpp's order, in which the two features that rope turns together are neighbours."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_name(hf_name: str) -> str:
    parts = hf_name.split(".")
    layer = parts[2] if parts[1] == "layers" else ""
    pattern = hf_name.replace(f"layers.{layer}.", "layers.{layer}.", 1)
    return next(name for name, hf in _HF_NAMES.items() if hf == pattern).format(layer=layer)
