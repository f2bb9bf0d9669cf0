"""Reads a llama-architecture `.gguf` file as if it were a Hugging Face folder: configuration, weights, tokenizer."""

import functools
import reprlib
from pathlib import Path

import gguf
import numpy as np
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jax_backtrack.errors import InputError

# gguf name -> Hugging Face name; `{layer}` on both sides.
_HF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{layer}.attn_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "blk.{layer}.attn_q.weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "blk.{layer}.attn_k.weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "blk.{layer}.attn_v.weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "blk.{layer}.attn_output.weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "blk.{layer}.ffn_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "blk.{layer}.ffn_gate.weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "blk.{layer}.ffn_up.weight": "model.layers.{layer}.mlp.up_proj.weight",
    "blk.{layer}.ffn_down.weight": "model.layers.{layer}.mlp.down_proj.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL = 3  # token types that are special: control tokens
# Numbers and texts of a header, each of which takes some 300 bytes of memory: Llama-3's has a million.
_MOST_PARTS = 2_000_000


class _Reader(gguf.GGUFReader):
    """Refuses a header whose counts reach behind the end of the file, where GGUFReader would read on for ever."""

    _parts = 0

    def _get(self, offset, dtype, count=1, override_order=None):
        if isinstance(self.data, np.memmap):
            self.data = np.asarray(self.data)  # the same bytes; views of it are smaller and made faster
        self._parts += 1
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it ends before its header says so")
        if self._parts > _MOST_PARTS:
            raise ValueError(f"its header has more than {_MOST_PARTS:,} parts")
        return super()._get(offset, dtype, count, override_order)


class GGUFFile:
    """An open `.gguf` file. Raises InputError for other architectures and for files that cannot be read."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = _Reader(path)
        except Exception as error:
            raise InputError(f"{path} cannot be read as gguf: {error}") from error
        architecture = self._field("general.architecture", str)
        if architecture != "llama":
            raise InputError(f"{path}: architecture {architecture!r} is not supported; only 'llama' is")
        self._tensors = {self._hf_name(tensor.name): tensor for tensor in self._reader.tensors}
        # The file counts axes from the last one.
        self._shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}
        # Devices ask for their parts of one tensor in a row.
        self._dequantised = functools.lru_cache(maxsize=1)(self._dequantise)

    def hf_config(self) -> dict:
        """The file's metadata in the field names of a Hugging Face `config.json`."""
        if (rope_scaling := self._field("llama.rope.scaling.type", str, "none")) != "none":
            raise InputError(f"{self.path}: rope scaling {rope_scaling!r} is not supported")
        return {
            "model_type": "llama",
            "vocab_size": len(self._list("tokenizer.ggml.tokens", str)),
            "hidden_size": self._field("llama.embedding_length", int),
            "intermediate_size": self._field("llama.feed_forward_length", int),
            "num_hidden_layers": self._field("llama.block_count", int),
            "num_attention_heads": self._heads,
            "num_key_value_heads": self._kv_heads,
            "head_dim": self._field("llama.rope.dimension_count", int),
            "rope_theta": self._field("llama.rope.freq_base", float),
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon", float),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "max_position_embeddings": self._field("llama.context_length", int),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by its Hugging Face name."""
        return self._shapes

    def read(self, hf_name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of one tensor, dequantised to float32, in the Hugging Face layout."""
        # A copy: what is not quantised is a view of the mapped file, and the parameter must not change when that does.
        return np.array(self._dequantised(hf_name)[index])

    def _dequantise(self, hf_name: str) -> np.ndarray:
        tensor = self._tensors[hf_name]
        try:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            if "q_proj" in hf_name:
                return _unpermute(weight, self._heads)
            if "k_proj" in hf_name:
                return _unpermute(weight, self._kv_heads)
            return weight
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{self.path}: {tensor.name} cannot be read: {error}") from error

    def tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        """The byte-level BPE tokenizer and the chat template inside the file."""
        kind = self._field("tokenizer.ggml.model", str), self._field("tokenizer.ggml.pre", str, "default")
        if kind != ("gpt2", "smollm"):
            raise InputError(f"{self.path}: tokenizer {kind} is not supported; use the model's Hugging Face folder")
        try:
            return self._tokenizer()
        except InputError:
            raise
        except Exception as error:  # tokenizers raises nothing more special
            raise InputError(f"{self.path}: its tokenizer cannot be built: {error}") from error

    def _tokenizer(self) -> transformers.PreTrainedTokenizerFast:
        tokens = self._list("tokenizer.ggml.tokens", str)
        if len(set(tokens)) < len(tokens):
            raise InputError(f"{self.path}: its tokenizer has a token twice")
        known, merges = set(tokens), [tuple(merge.split(" ")) for merge in self._list("tokenizer.ggml.merges", str)]
        # Of one whose result is no token tokenizers may end in a panic, which is no Exception.
        if wrong := [merge for merge in merges if len(merge) != 2 or not {*merge, "".join(merge)} <= known]:
            raise InputError(f"{self.path}: its tokenizer has the merge {wrong[0]}, whose parts or result are no token")
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        types = self._list("tokenizer.ggml.token_type", int)
        special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])

        def token_at(field):
            return tokens[self._field(field, int)]

        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=token_at("tokenizer.ggml.bos_token_id"),
            eos_token=token_at("tokenizer.ggml.eos_token_id"),
            unk_token=token_at("tokenizer.ggml.unknown_token_id"),
            pad_token=token_at("tokenizer.ggml.padding_token_id"),
            chat_template=self._field("tokenizer.chat_template", str),
            model_max_length=self._field("llama.context_length", int),
            clean_up_tokenization_spaces=False,
        )

    @property
    def _heads(self) -> int:
        return self._field("llama.attention.head_count", int)

    @property
    def _kv_heads(self) -> int:
        return self._field("llama.attention.head_count_kv", int, self._heads)

    def _field(self, name: str, kind: type, *default):
        """A field of the metadata, which must be of this kind; the default where it is missing."""
        field = self._reader.fields.get(name)
        if field is None:
            if default:
                return default[0]
            raise InputError(f"{self.path}: the metadata field {name!r} is missing")
        try:
            value = field.contents()
        except ValueError as error:  # a text that is not UTF-8
            raise InputError(f"{self.path}: the metadata field {name!r} cannot be read: {error}") from None
        if type(value) is not kind:
            raise InputError(f"{self.path}: the metadata field {name!r} is {reprlib.repr(value)}, no {kind.__name__}")
        return value

    def _list(self, name: str, kind: type) -> list:
        """A field of the metadata that is a list of this kind."""
        values = self._field(name, list)
        if wrong := [value for value in values if type(value) is not kind]:
            raise InputError(
                f"{self.path}: the metadata field {name!r} holds {reprlib.repr(wrong[0])}, no {kind.__name__}"
            )
        return values

    def _hf_name(self, name: str) -> str:
        parts = name.split(".")
        layer = parts[1] if parts[0] == "blk" else ""
        pattern = name.replace(f"blk.{layer}.", "blk.{layer}.", 1)
        if pattern not in _HF_NAMES:
            raise InputError(f"{self.path}: the tensor {name!r} has no place in a Llama")
        return _HF_NAMES[pattern].format(layer=layer)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of query and key rows, which interleaves the halves that rope turns together."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
