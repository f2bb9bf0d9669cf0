"""Reads a llama-architecture `.gguf` file as if it were a Hugging Face folder: configuration, weights, tokenizer."""

import functools
import re
import reprlib
from pathlib import Path

import gguf
import numpy as np
import transformers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jax_backtrack.errors import InputError
from jax_backtrack.models.rope import Llama3Scaling, rope_frequencies

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
_CONTROL, _UNUSED = 3, 5  # types of tokens
# Metadata that changes the model, and the values at which it does not.
_CHANGES = {
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "rope.scaling.attn_factor": (1, 0),
    "logit_scale": (1, 0),
    "residual_scale": (1, 0),
    "embedding_scale": (1, 0),
}
# Tag of an export's model card, before the reset mode that the model was trained with.
MODE_TAG = "reset-mode-"
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
        tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._rope_factors = tensors.pop("rope_freqs.weight", None)
        self._tensors = {self._hf_name(name): tensor for name, tensor in tensors.items()}
        # The file counts axes from the last one.
        self._shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in self._tensors.items()}
        # Devices ask for their parts of one tensor in a row.
        self._dequantised = functools.lru_cache(maxsize=1)(self._dequantise)

    def hf_config(self) -> dict:
        """Returns the file's metadata in the field names of a Hugging Face `config.json`."""
        self._refuse_what_a_llama_has_not()
        config = {
            "model_type": "llama",
            "vocab_size": len(self._list("tokenizer.ggml.tokens", str)),
            "hidden_size": self._field("llama.embedding_length", int),
            "intermediate_size": self._field("llama.feed_forward_length", int),
            "num_hidden_layers": self._field("llama.block_count", int),
            "num_attention_heads": self._heads,
            "num_key_value_heads": self._kv_heads,
            "head_dim": self._head_dim(),
            "rope_theta": self._field("llama.rope.freq_base", float),
            "rope_scaling": None,
            "rms_norm_eps": self._field("llama.attention.layer_norm_rms_epsilon", float),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "max_position_embeddings": self._field("llama.context_length", int),
        }
        if self._rope_factors is not None:
            config["rope_scaling"] = self._rope_scaling(config["head_dim"], config["rope_theta"])
        if mode := self._reset_mode():
            config["backtracking"] = {"reset_mode": mode}
        return config

    def _refuse_what_a_llama_has_not(self) -> None:
        """Raises InputError for metadata that changes the model and has no field in a Llama's configuration."""
        scaling = self._field("llama.rope.scaling.type", str, "none")
        stretched = [self._number(f"llama.rope.{name}") for name in ("scaling.factor", "scale_linear")]
        if scaling not in ("none", "linear") or any(number not in (None, 0, 1) for number in stretched):
            shown = "linear" if scaling == "none" else scaling
            raise InputError(f"{self.path}: rope scaling {shown!r} is not supported; 'none' and Llama-3.1's are")
        for name, nothing in _CHANGES.items():
            if (value := self._number(f"llama.{name}")) not in (None, *nothing):
                raise InputError(f"{self.path}: llama.{name} = {value} is not supported; only {nothing[0]} is")

    def _head_dim(self) -> int:
        hidden, heads = self._field("llama.embedding_length", int), self._heads
        default = hidden // heads if heads > 0 else 0
        key = self._field("llama.attention.key_length", int, default)
        for name in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if (length := self._field(name, int, key)) != key:
                raise InputError(
                    f"{self.path}: {name} = {length} is not supported; heads have {key} features in all, all rotated"
                )
        return key

    def _rope_scaling(self, head_dim: int, theta: float) -> dict | None:
        """Returns the settings of Llama-3.1's rope; .gguf files have its factors only, one for each frequency."""
        factor_D = np.array(gguf.quants.dequantize(self._rope_factors.data, self._rope_factors.tensor_type), np.float32)
        if factor_D.shape != (head_dim // 2,) or theta <= 0:
            raise InputError(f"{self.path}: rope_freqs.weight has shape {factor_D.shape}, not ({head_dim // 2},)")
        if (factor_D == 1).all():
            return None
        scaling = Llama3Scaling.from_factors(factor_D, rope_frequencies(head_dim, theta))
        if scaling is None:
            raise InputError(
                f"{self.path}: the factors in rope_freqs.weight are not those of Llama-3.1's rope scaling; use the "
                "model's Hugging Face folder, whose config.json has their settings"
            )
        return {"rope_type": "llama3", **vars(scaling)}

    def _reset_mode(self) -> str | None:
        """Returns the reset mode of the training, from the tags of an export's model card, which converters
        copy; None where the file does not say."""
        field = self._reader.fields.get("general.tags")
        tags = field.contents() if field is not None else []
        tags = tags if isinstance(tags, list) else [tags]
        modes = sorted(
            {tag.removeprefix(MODE_TAG) for tag in tags if isinstance(tag, str) and tag.startswith(MODE_TAG)}
        )
        if len(modes) > 1:
            raise InputError(f"{self.path}: general.tags names several reset modes, {', '.join(modes)}: keep one")
        return modes[0] if modes else None

    def origin(self) -> dict[str, str]:
        """Returns `base_model`, a Hub id, and `license`, as far as the file's metadata knows them."""
        names = "source.huggingface.repository source.repo_url source.url repo_url url base_model.0.repo_url".split()
        values = (self._text(f"general.{name}") for name in names)
        origin = {
            "base_model": next(
                (text.rpartition("huggingface.co/")[2].strip("/") for text in values if is_hub(text)), ""
            ),
            "license": self._text("general.license"),
            "license_name": self._text("general.license.name"),
            "license_link": self._text("general.license.link"),
        }
        return {name: text for name, text in origin.items() if text}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor, by its Hugging Face name."""
        return self._shapes

    def read(self, hf_name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of one tensor, dequantised to float32, in the Hugging Face layout."""
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
        """Returns the byte-level BPE tokenizer and the chat template inside the file."""
        kind = self._field("tokenizer.ggml.model", str), self._field("tokenizer.ggml.pre", str, "default")
        if kind != ("gpt2", "smollm"):
            raise InputError(
                f"{self.path}: tokenizer {kind} is not supported; use the model's Hugging Face folder, or "
                "load(..., tokenizer=False) for the model alone"
            )
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
        texts = set(tokens)
        merges = [tuple(merge.split(" ")) for merge in self._list("tokenizer.ggml.merges", str)]
        # Of one whose result is no token tokenizers may end in a panic, which is no Exception.
        if wrong := [merge for merge in merges if len(merge) != 2 or not {*merge, "".join(merge)} <= texts]:
            raise InputError(f"{self.path}: its tokenizer has the merge {wrong[0]}, whose parts or result are no token")
        types = self._list("tokenizer.ggml.token_type", int)
        # What converters fill the list up with, where the embedding has more rows than there are tokens.
        pairs = zip(tokens, types, strict=True)
        filled = {token for token, kind in pairs if kind == _UNUSED and re.fullmatch(r"\[PAD\d+\]", token)}
        vocabulary = {token: index for index, token in enumerate(tokens) if token not in filled}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
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
        """Returns a field of the metadata, which must be of this kind; the default where it is missing."""
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

    def _text(self, name: str) -> str:
        """Returns a text of the metadata, which only describes: "" where it is missing or something else."""
        field = self._reader.fields.get(name)
        try:
            value = "" if field is None else field.contents()
        except ValueError:  # no UTF-8
            return ""
        return value if isinstance(value, str) else ""

    def _number(self, name: str) -> int | float | bool | None:
        """Returns a number of the metadata, or None."""
        field = self._reader.fields.get(name)
        return None if field is None else self._field(name, type(field.contents()))

    def _list(self, name: str, kind: type) -> list:
        """Returns a field of the metadata that is a list of this kind."""
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


def is_hub(text: str) -> bool:
    """Returns whether a text is a model's Hub id or its address there."""
    name = text.partition("huggingface.co/")[2].strip("/") if "://" in text else text
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of query and key rows, which interleaves the halves that rope turns together."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
