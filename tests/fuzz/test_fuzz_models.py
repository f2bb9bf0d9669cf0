"""Files of models: headers of weights, and configurations."""

import functools
import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

from jax_backtrack.hub.gguf import GGUFFile
from jax_backtrack.hub.load import _backtracking, _open
from jax_backtrack.hub.safetensors_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from jax_backtrack.models import families
from jax_backtrack.models.families import gemma2, llama
from jax_backtrack.models.families.published import PUBLISHED
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from tests import tiny
from tests.fuzz.odd import TEXT, changed, dumps, mangled
from tests.fuzz.trials import fuzz

# ------------------------------------------------------------------------------------------------- safetensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = {
    "model.norm.weight": np.arange(4, dtype=np.float32),
    "model.layers.0.mlp.gate_proj.weight": np.ones((3, 4), np.float16),
    "lm_head.weight": np.zeros((2, 4), np.float32),
}
FILE = save(WEIGHTS)
HEADER_BYTES = int.from_bytes(FILE[:8], "little")
HEADER, TENSORS = json.loads(FILE[8 : 8 + HEADER_BYTES]), FILE[8 + HEADER_BYTES :]


def with_header(text: str) -> bytes:
    header = text.encode(errors="surrogatepass")
    return len(header).to_bytes(8, "little") + header + TENSORS


safetensors_files = st.one_of(
    mangled(st.just(FILE), kinds=TEXT), mangled(st.just(FILE)), changed(st.just(HEADER)).map(dumps).map(with_header)
)


def read_all(folder) -> None:
    source = SafetensorsFolder(folder)
    for name, shape in source.shapes().items():
        read = source.read(name, tuple(slice(0, size) for size in shape))
        assert read.shape == shape


@fuzz("safetensors headers", content=safetensors_files)
def test_safetensors(content, tmp_path):
    (tmp_path / SINGLE_FILE).write_bytes(content)
    read_all(tmp_path)


INDEX = {
    "metadata": {"total_size": 68},
    "weight_map": {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(WEIGHTS)},
}


indices = st.one_of(
    changed(st.just(INDEX), most=1).map(dumps).map(str.encode), mangled(st.just(dumps(INDEX).encode()), kinds=TEXT)
)


@fuzz("safetensors indices", index=indices)
def test_safetensors_index(index, tmp_path):
    for file in set(INDEX["weight_map"].values()):
        held = {name: WEIGHTS[name] for name, place in INDEX["weight_map"].items() if place == file}
        (tmp_path / file).write_bytes(save(held))
    (tmp_path / INDEX_FILE).write_bytes(index)
    read_all(tmp_path)


# -------------------------------------------------------------------------------------------------------- gguf


@functools.cache
def small_gguf() -> tuple[bytes, bytes]:
    """A Llama of one layer in some kilobytes, with a tokenizer and a quantised tensor: its header, and the weights."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 97)), "AB"]
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(path := Path(folder) / "small.gguf", "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(64)
        writer.add_block_count(1)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_rope_dimension_count(8)
        writer.add_rope_freq_base(1e4)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges(["A B"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(2)
        writer.add_chat_template(
            "{% for message in messages %}<|im_start|>{{ message.role }}{{ message.content }}<|im_end|>{% endfor %}"
        )
        quantised, rng = gguf.GGMLQuantizationType.Q8_0, np.random.default_rng(0)
        embedding = gguf.quants.quantize(rng.normal(size=(len(tokens), 32)).astype(np.float32), quantised)
        writer.add_tensor("token_embd.weight", embedding, raw_dtype=quantised)
        for name, shape in (("output_norm", (32,)), ("blk.0.attn_q", (32, 32)), ("blk.0.attn_k", (16, 32))):
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        content, begin = path.read_bytes(), gguf.GGUFReader(path).data_offset
    return content[:begin], content[begin:]


gguf_headers = st.deferred(lambda: st.just(small_gguf()[0]))


@fuzz("gguf files", header=st.one_of(mangled(gguf_headers, most=2), mangled(gguf_headers, most=2, kinds=TEXT)))
def test_gguf(header, tmp_path):
    (path := tmp_path / "model.gguf").write_bytes(header + small_gguf()[1])
    file = GGUFFile(path)
    families.from_hf_config(file.hf_config())
    ChatTokenizer(file.tokenizer())
    for name, shape in file.shapes().items():
        assert file.read(name, tuple(slice(0, size) for size in shape)).shape == shape


# -------------------------------------------------------------------------------------------------- adapters of PEFT

ADAPTER = dict(
    peft_type="LORA",
    base_model_name_or_path="base",
    r=2,
    lora_alpha=4,
    rank_pattern={"k_proj": 2},
    alpha_pattern={"v_proj": 3},
    use_rslora=False,
    use_dora=False,
    modules_to_save=None,
    trainable_token_indices=None,
    init_lora_weights=True,
    bias="none",
    target_modules=["q_proj"],
)
adapters = changed(st.just(ADAPTER)).map(dumps).map(lambda text: text.encode())


def adapter_files() -> dict[str, bytes]:
    """A tiny Llama of two weights, and an adapter of one of them and of its norm."""
    ones = functools.partial(np.ones, dtype=np.float32)
    query, prefix = "model.layers.0.self_attn.q_proj", "base_model.model."
    model = {
        f"{query}.weight": ones((32, 24)),
        "model.norm.weight": ones(24),
        "model.embed_tokens.weight": ones((61, 24)),
    }
    matrices = {f"{prefix}{query}.lora_A.weight": ones((2, 24)), f"{prefix}{query}.lora_B.weight": ones((32, 2))}
    return {
        "base/config.json": dumps(llama.to_hf_config(tiny.config(num_hidden_layers=1))).encode(),
        f"base/{SINGLE_FILE}": save(model),
        ADAPTER_WEIGHTS: save(matrices | {f"{prefix}model.norm.weight": ones(24)}),
    }


@fuzz("adapter_config.json", content=st.one_of(adapters, mangled(adapters, most=1, kinds=TEXT)))
def test_adapters(content, tmp_path):
    (tmp_path / "base").mkdir(exist_ok=True)
    for name, held in adapter_files().items():
        (tmp_path / name).write_bytes(held)
    (tmp_path / "adapter_config.json").write_bytes(content)
    open_source, said, _ = _open(str(tmp_path), None, None)
    families.from_hf_config(said)
    source = open_source()
    for name, shape in source.shapes().items():
        assert source.read(name, tuple(slice(0, size) for size in shape)).shape == shape


# ----------------------------------------------------------------------------------------------- configurations

CONFIGURATIONS = [
    llama.to_hf_config(tiny.config()),
    gemma2.to_hf_config(tiny.config(**tiny.GEMMA2)),
    *PUBLISHED.values(),
    llama.to_hf_config(tiny.config()) | {"backtracking": {"reset_mode": "rewind", "reset_token_id": 3}},
]
configurations = changed(st.sampled_from(CONFIGURATIONS)).map(dumps).map(lambda text: text.encode())


@fuzz("config.json", content=st.one_of(configurations, mangled(configurations, most=1, kinds=TEXT)))
def test_configurations(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    _, said, _ = _open(str(tmp_path), None, None)
    config = families.from_hf_config(said)
    _backtracking(said)
    assert families.from_hf_config(families.to_hf_config(config)) == config
