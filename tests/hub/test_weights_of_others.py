"""Weights as people have them: beside each other, under other names, with buffers, with a head that is tied or not."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from jax_backtrack.errors import InputError
from jax_backtrack.hub.safetensors_folder import INDEX_FILE, SINGLE_FILE
from tests.checkpoints import TOLERANCE, port, random_model, random_tokens, relative_error, rewrite_config, torch_logits

TOKENS = random_tokens((2, 40))
LLAMA, TIED, GEMMA = "Llama-3.1-8B", "Llama-3.2-1B", "Gemma-2-2B"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(written, tmp_path):
    """Copies a checkpoint of this shape, to be changed."""
    return lambda shape: shutil.copytree(written / shape, tmp_path / "model")


def their_logits(folder) -> np.ndarray:
    return torch_logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), TOKENS)


def rewrite(folder, change) -> None:
    """Changes the dict of a folder's tensors, those of torch."""
    tensors = load_torch(folder / SINGLE_FILE)
    changed = change(tensors) or tensors
    save_torch({name: each.contiguous() for name, each in changed.items()}, folder / SINGLE_FILE, {"format": "pt"})


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------------------ an index beside a file


def shards_beside(folder, change=lambda tensors: None) -> dict:
    """Puts the folder's weights, changed, into two shards with an index beside the single file; returns the index."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return index


def test_an_index_beside_the_same_weights_changes_nothing(folder, capsys):
    path = folder(LLAMA)
    alone = port(path)(TOKENS)
    shards_beside(path)
    np.testing.assert_array_equal(port(path)(TOKENS), alone)
    assert said(capsys) == ""


def test_an_index_that_names_the_single_file_changes_nothing(folder, capsys):
    path = folder(LLAMA)
    names = load_file(path / SINGLE_FILE)
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE_FILE)}))
    assert relative_error(port(path)(TOKENS), their_logits(path)) < TOLERANCE
    assert said(capsys) == ""


def double_a_value(tensors):
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] *= 2


def half(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)


def fewer_columns(tensors):
    tensors[HEAD] = tensors[HEAD][:, :100].copy()


@pytest.mark.parametrize("change", [double_a_value, half, fewer_columns])
def test_an_index_beside_other_weights_is_refused(folder, change):
    path = folder(LLAMA)
    shards_beside(path, change)
    with pytest.raises(InputError, match=rf"{SINGLE_FILE} and the shards of {INDEX_FILE} beside it hold different"):
        port(path)
    (path / INDEX_FILE).unlink()
    assert relative_error(port(path)(TOKENS), their_logits(path)) < TOLERANCE


def without_shards(path):
    shards_beside(path)
    for file in path.glob("model-*"):
        file.unlink()


def without_one_shard(path):
    shards_beside(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def of_other_tensors(path):
    shards_beside(path, lambda tensors: tensors.update(other=tensors.pop("model.norm.weight")))


def of_shards_that_were_written_anew(path):
    shards_beside(path)
    for file in path.glob("model-*"):
        save_file({"other": np.zeros(3, np.float32)}, file)


def of_the_single_file_before(path):
    names = [*load_file(path / SINGLE_FILE), "model.layers.9.mlp.up_proj.weight"]
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE_FILE)}))


@pytest.mark.parametrize(
    "stale",
    [without_shards, without_one_shard, of_other_tensors, of_shards_that_were_written_anew, of_the_single_file_before],
)
def test_a_stale_index_does_not_stop_a_good_file(folder, stale, capsys):
    path = folder(LLAMA)
    stale(path)
    assert relative_error(port(path)(TOKENS), their_logits(path)) < TOLERANCE
    assert re.search(rf"{SINGLE_FILE} is read, as in transformers, and not the index: delete", said(capsys))


def test_shards_that_no_index_names_are_said(folder, capsys):
    path = folder(LLAMA)
    alone = port(path)(TOKENS)
    shards_beside(path, double_a_value)
    (path / INDEX_FILE).unlink()
    np.testing.assert_array_equal(port(path)(TOKENS), alone)
    assert f"{SINGLE_FILE} is read, and not model-00001-of-00002.safetensors, which no index names" in said(capsys)


def test_weights_of_another_name_are_answered_with_the_name(folder):
    path = folder(LLAMA)
    (path / SINGLE_FILE).rename(path / "consolidated.safetensors")
    with pytest.raises(InputError, match=f"only .*consolidated.safetensors.* Weights in one file .* {SINGLE_FILE}"):
        port(path)


# ------------------------------------------------------------------------------------------------- heads and ties


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_gemma2_with_a_head_of_its_own(folder, tmp_path, fields):
    """By its configuration; a head beside a configuration that ties is refused with advice that ends."""
    random_model(GEMMA, tie_word_embeddings=False).save_pretrained(path := tmp_path / "apart")
    assert relative_error(port(path)(TOKENS), their_logits(path)) < TOLERANCE
    rewrite_config(path, **{"tie_word_embeddings": ...} | fields)
    if not fields:
        with pytest.raises(InputError, match="set tie_word_embeddings to false to keep both"):
            port(path)
        rewrite_config(path, tie_word_embeddings=False)
    model = port(path)
    assert not model.config.tie_word_embeddings
    assert relative_error(model(TOKENS), their_logits(path)) < TOLERANCE


def test_gemma2_with_an_equal_head_that_is_not_tied(folder):
    path = folder(GEMMA)
    rewrite(path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    rewrite_config(path, tie_word_embeddings=False)
    assert relative_error(port(path)(TOKENS), their_logits(path)) < TOLERANCE


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", [TIED, GEMMA])
@pytest.mark.parametrize("head", DTYPES, ids=str)
@pytest.mark.parametrize("embedding", DTYPES, ids=str)
def test_a_tied_head_in_another_dtype_is_tied(folder, shape, head, embedding):
    path = folder(shape)

    def cast(tensors):
        tensors[HEAD] = tensors[EMBEDDING].to(head, copy=True)
        tensors[EMBEDDING] = tensors[EMBEDDING].to(embedding)

    rewrite(path, cast)
    tied = port(path)
    rewrite(path, lambda tensors: {name: each for name, each in tensors.items() if name != HEAD})
    np.testing.assert_array_equal(tied(TOKENS), port(path)(TOKENS))


@pytest.mark.parametrize("head", DTYPES, ids=str)
def test_a_head_that_differs_by_more_than_rounding_is_not_tied(folder, head):
    path = folder(TIED)

    def spoil(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][300, 7] *= 1.02
        tensors[HEAD] = tensors[HEAD].to(head)

    rewrite(path, spoil)
    with pytest.raises(InputError, match=rf"{HEAD} and .* differ: set tie_word_embeddings to false"):
        port(path)
    rewrite_config(path, tie_word_embeddings=False)
    port(path)


@pytest.mark.parametrize("tie", [..., False], ids=["absent", "false"])
def test_a_tied_model_that_does_not_say_so_is_answered_with_the_field(folder, tie):
    path = folder(TIED)
    rewrite_config(path, tie_word_embeddings=tie)
    with pytest.raises(InputError, match=r"lm_head\.weight\. Models whose head is the embedding .* to true in config"):
        port(path)
    rewrite_config(path, tie_word_embeddings=True)
    assert relative_error(port(path)(TOKENS), their_logits(path)) < TOLERANCE


# -------------------------------------------------------------------------------------------------- other names


def renamed(prefix):
    return lambda tensors: {prefix + name: each for name, each in tensors.items()}


def inside(tensors):
    return {name.replace("model.", "model.language_model.", 1): each for name, each in tensors.items()}


def without_head(tensors):
    return {name.removeprefix("model."): each for name, each in tensors.items() if name != HEAD}


def of_meta(tensors):
    return {"tok_embeddings.weight": tensors[EMBEDDING], "layers.0.attention.wq.weight": tensors[EMBEDDING].clone()} | {
        f"layers.{number}.x": tensors["model.norm.weight"].clone() for number in range(3)
    }


def of_peft(tensors):
    return {f"base_model.model.{name}": each for name, each in tensors.items() if "q_proj" not in name} | {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.{part}.weight": torch.zeros(2, 2)
        for layer in range(3)
        for part in ("base_layer", "lora_A.default", "lora_B.default")
    }


@pytest.mark.parametrize(
    "change,advice",
    [
        (renamed("base_model.model."), "'base_model.model.' .*PEFT writes it: save the result of merge_and_unload"),
        (renamed("module."), "'module.' stands before the names: DataParallel"),
        (renamed("_orig_mod."), "'_orig_mod.' .*torch.compile writes it"),
        (renamed("module._orig_mod."), "'module.' .*DataParallel.*'_orig_mod.' .*torch.compile"),
        (renamed("_orig_mod.module."), "'_orig_mod.' .*torch.compile.*'module.' .*DataParallel"),
        (renamed("_fsdp_wrapped_module."), "'_fsdp_wrapped_module.' .*FSDP writes it"),
        (renamed("_orig_mod.base_model.model."), "'_orig_mod.' .*torch.compile.*'base_model.model.' .*PEFT"),
        (renamed("nobody.knows."), "'nobody.knows.' stands before the names$"),
        (inside, "'language_model.' .*images and text"),
        (without_head, r"They lack 'model\.': this is a model without its head"),
        (of_meta, "Meta's own format: convert_llama_weights_to_hf.py"),
        (of_peft, "'base_model.model.' .*PEFT writes it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_names_are_listed_with_who_writes_them(folder, change, advice):
    path = folder(LLAMA)
    rewrite(path, change)
    with pytest.raises(InputError, match=rf"tensors are missing .*In their place are \d+ others: .*{advice}") as raised:
        port(path)
    listed = str(raised.value).partition("others: ")[2].partition(",")[0]
    assert listed in load_file(path / SINGLE_FILE)


# ---------------------------------------------------------------------------------------------------- buffers

BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.0.self_attn.rotary_emb.sin_cached",
    "model.layers.0.self_attn.bias",
    "model.layers.0.self_attn.masked_bias",
    "model.layers.0.attn.bias",
    "model.layers.0.attn.masked_bias",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "model.causal_mask",
    "model.rotary_emb.cos_sin_cache",
    "model.normalizer",
    "model.position_ids",
]
STORED = [torch.float64, torch.float32, torch.float16, torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
def test_buffers_of_any_dtype_are_left_out(folder, dtype, sharded):
    path = folder(LLAMA)
    plain = port(path)(TOKENS)
    rewrite(path, lambda tensors: tensors.update({name: torch.ones(1, 1, 4, 4).to(dtype) for name in BUFFERS}))
    if sharded:
        shards = {"a.safetensors": BUFFERS, "b.safetensors": load_torch(path / SINGLE_FILE).keys() - set(BUFFERS)}
        tensors = load_torch(path / SINGLE_FILE)
        for file, names in shards.items():
            save_torch({name: tensors[name] for name in names}, path / file)
        index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
        (path / INDEX_FILE).write_text(json.dumps(index))
        (path / SINGLE_FILE).unlink()
    np.testing.assert_array_equal(port(path)(TOKENS), plain)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.up_proj.bias", "lm_head.bias", "bias"]
)
def test_a_bias_is_no_buffer(folder, name):
    path = folder(LLAMA)
    rewrite(path, lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(InputError, match=f"no place in the model: {name}"):
        port(path)


# ----------------------------------------------------------------------------------------- the same by another name


@pytest.mark.parametrize(
    "shape,fields",
    [
        (LLAMA, {"hidden_act": "swish"}),
        (GEMMA, {"hidden_activation": "gelu_new"}),
        (GEMMA, {"hidden_activation": "gelu_fast"}),
        (GEMMA, {"hidden_activation": "gelu_accurate"}),
        (GEMMA, {"hidden_act": "relu"}),
        (LLAMA, {"sliding_window": 10**6}),
        (LLAMA, {"layer_types": ["full_attention"] * 3}),
        (LLAMA, {"use_cache": False, "attention_dropout": 0.5, "is_decoder": True, "initializer_range": 0.3}),
    ],
    ids=str,
)
def test_other_names_of_the_same_model_are_loaded(folder, shape, fields):
    path = folder(shape)
    rewrite_config(path, **fields)
    assert relative_error(port(path)(TOKENS), their_logits(path)) < TOLERANCE
