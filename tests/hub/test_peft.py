"""Adapters of PEFT: merged on load as PEFT merges them, or refused by the setting that cannot be merged."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from jax_backtrack.errors import InputError
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from tests.chat_tokenizers import small_tokenizer
from tests.checkpoints import TOLERANCE, port, random_model, random_tokens, relative_error, rewrite_config, torch_logits

TOKENS = random_tokens((2, 24))
LLAMA, TIED, GEMMA = "Llama-3.1-8B", "Llama-3.2-1B", "Gemma-2-2B"
QUERY_VALUE = ["q_proj", "v_proj"]
ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(base: Path, folder: Path, rows: int | None = None, **settings):
    """Saves a random adapter of the base as PEFT does it; returns PEFT's model of both."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if rows:
        torch.manual_seed(2)
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = peft.get_peft_model(
        model, peft.LoraConfig(**dict(r=4, lora_alpha=7, target_modules=QUERY_VALUE) | settings)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.requires_grad and "magnitude" not in name:
                each.add_(0.1 * torch.randn_like(each))
            elif each.requires_grad:
                each.mul_(1 + 0.3 * torch.rand_like(each))
    model.eval().save_pretrained(folder)
    return model


def our_logits(path) -> np.ndarray:
    model, tokenizer = load(path, tokenizer=False)
    assert tokenizer is None
    return np.asarray(model(TOKENS))


def edit(folder, **fields) -> None:
    config = json.loads((folder / ADAPTER).read_text()) | fields
    (folder / ADAPTER).write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


SETTINGS = {
    "plain": {},
    "all": dict(target_modules=ALL, r=8),
    "rslora": dict(use_rslora=True),
    "patterns": dict(
        target_modules=ALL,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "^model.layers.2.self_attn.v_proj": 3},
        alpha_pattern={"v_proj": 16, "model.layers.0.self_attn.q_proj": 1},
    ),
    "patterns, rslora": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}, use_rslora=True),
    "some layers": dict(layers_to_transform=[1]),
    "a name as a pattern": dict(target_modules=r".*\.1\..*(q|o)_proj"),
    "dora": dict(target_modules=ALL, use_dora=True),
    "dora, rslora": dict(use_dora=True, use_rslora=True),
    "gaussian": dict(init_lora_weights="gaussian"),
    "bias": dict(bias="all"),
    "fan in": dict(fan_in_fan_out=True),
    "dropout": dict(lora_dropout=0.5),
    "norms": dict(modules_to_save=["norm", "input_layernorm"]),
    "a whole matrix": dict(modules_to_save=["up_proj"]),
}
OF_THE_VOCABULARY = {
    "head and embedding": dict(modules_to_save=["lm_head", "embed_tokens"]),
    "head": dict(modules_to_save=["lm_head"]),
    "embedding": dict(modules_to_save=["embed_tokens"]),
    "tokens": dict(trainable_token_indices=[3, 511, 17]),
    "tokens by name": dict(trainable_token_indices={"embed_tokens": [3, 5]}),
    "more rows": dict(rows=576),
    "more rows and tokens": dict(rows=576, trainable_token_indices=[3, 570]),
    "more rows, saved": dict(rows=576, modules_to_save=["lm_head", "embed_tokens"]),
}
UNTIED_ONLY = {
    "low rank embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "low rank head": dict(target_modules=["q_proj", "lm_head"]),
}


@pytest.mark.parametrize(
    "shape,settings",
    [(shape, name) for shape in (LLAMA, TIED, GEMMA) for name in (OF_THE_VOCABULARY if shape != GEMMA else ["head"])]
    + [(LLAMA, name) for name in SETTINGS | UNTIED_ONLY]
    + [(GEMMA, name) for name in ("plain", "all", "dora")],
)
def test_an_adapter_is_merged_as_peft_merges_it(written, tmp_path, shape, settings):
    fields = (SETTINGS | OF_THE_VOCABULARY | UNTIED_ONLY)[settings]
    theirs = adapted(written / shape, tmp_path / "adapter", **fields)
    unmerged = torch_logits(theirs, TOKENS)
    merged = torch_logits(theirs.merge_and_unload(), TOKENS)
    ours = our_logits(tmp_path / "adapter")
    assert relative_error(ours, merged) < TOLERANCE
    assert relative_error(ours, unmerged) < TOLERANCE
    if not fields.get("rows"):
        assert relative_error(ours, np.asarray(port(written / shape)(TOKENS))) > 100 * TOLERANCE


@pytest.mark.parametrize(
    "settings,tied", [("more rows", True), ("tokens", True), ("head", False), ("embedding", False)]
)
def test_a_tied_model_stays_tied_where_the_adapter_lets_it(written, tmp_path, settings, tied):
    adapted(written / TIED, tmp_path / "adapter", **OF_THE_VOCABULARY[settings])
    assert load(tmp_path / "adapter", tokenizer=False)[0].config.tie_word_embeddings == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_another_dtype_is_merged(written, tmp_path, dtype):
    theirs = adapted(written / LLAMA, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    save_file({name: each.to(dtype) for name, each in tensors.items()}, tmp_path / "adapter" / WEIGHTS)
    base = transformers.AutoModelForCausalLM.from_pretrained(written / LLAMA)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    assert relative_error(our_logits(tmp_path / "adapter"), torch_logits(theirs, TOKENS)) < TOLERANCE


# ------------------------------------------------------------------------------------------------ where the base is


@pytest.fixture
def pair(written, tmp_path):
    """A base and an adapter beside it, and the logits of both together."""
    base = shutil.copytree(written / LLAMA, tmp_path / "base")
    theirs = adapted(base, tmp_path / "adapter")
    return base, tmp_path / "adapter", torch_logits(theirs, TOKENS)


@pytest.mark.parametrize("name", ["base", "./base", "../base", "whole", "."])
def test_the_base_is_found_from_here_and_from_the_adapter(pair, tmp_path, monkeypatch, name):
    base, adapter, expected = pair
    monkeypatch.chdir(tmp_path)
    if name == "../base":
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        shutil.move(adapter, tmp_path / "deep" / "adapter")
        shutil.move(base, tmp_path / "deep" / "base")
        adapter = tmp_path / "deep" / "adapter"
    if name == ".":
        for file in base.iterdir():
            shutil.copy(file, adapter)
        shutil.rmtree(base)
        monkeypatch.chdir("/")
    edit(adapter, base_model_name_or_path=str(base) if name == "whole" else name)
    assert relative_error(our_logits(adapter), expected) < TOLERANCE


def test_the_base_is_a_hub_id(pair, tmp_path, monkeypatch):
    """In the cache, as a download leaves it."""
    base, adapter, expected = pair
    cache = tmp_path / "hub" / "models--owner--base"
    shutil.copytree(base, cache / "snapshots" / "0123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    edit(adapter, base_model_name_or_path="owner/base")
    assert relative_error(our_logits(adapter), expected) < TOLERANCE


def test_two_bases_of_one_relative_name_are_refused(pair, tmp_path, monkeypatch):
    base, adapter, _ = pair
    shutil.copytree(base, adapter / "base")
    monkeypatch.chdir(tmp_path)
    edit(adapter, base_model_name_or_path="base")
    with pytest.raises(InputError, match=r"both .* are there; make it one whole path"):
        load(adapter, tokenizer=False)


def test_a_configuration_beside_the_adapter_changes_nothing(pair):
    base, adapter, expected = pair
    shutil.copy(base / "config.json", adapter)
    assert relative_error(our_logits(adapter), expected) < TOLERANCE
    rewrite_config(adapter, rms_norm_eps=0.5)
    assert relative_error(our_logits(adapter), expected) < TOLERANCE


def beside(base, adapter):
    for file in base.iterdir():
        shutil.copy(file, adapter)


@pytest.mark.parametrize("name", [None, ".", ""])
def test_a_whole_model_beside_the_adapter_is_its_base_where_it_says_so(pair, name):
    base, adapter, expected = pair
    beside(base, adapter)
    edit(adapter, base_model_name_or_path=name)
    assert relative_error(our_logits(adapter), expected) < TOLERANCE


def test_a_whole_model_beside_the_adapter_is_not_read_where_the_base_is_another(pair, capsys):
    base, adapter, expected = pair
    random_model(LLAMA, rms_norm_eps=1e-3).save_pretrained(adapter)
    assert relative_error(our_logits(adapter), expected) < TOLERANCE
    assert "holds a whole model too, which is not read" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(base)
    with pytest.raises(InputError, match=r"where it is the base, set base_model_name_or_path to '\.'; where .* merged"):
        load(adapter, tokenizer=False)


def test_a_configuration_left_beside_a_merged_model_is_said(pair, capsys):
    base, adapter, _ = pair
    shutil.copy(adapter / ADAPTER, base)
    assert relative_error(our_logits(base), np.asarray(port(base)(TOKENS))) < TOLERANCE
    assert "is left aside: the weights beside it are those of a whole model" in " ".join(
        capsys.readouterr().out.split()
    )


def test_adapters_upon_adapters(pair, tmp_path):
    _, adapter, _ = pair
    middle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    middle = peft.PeftModel.from_pretrained(middle, adapter).merge_and_unload()
    middle.save_pretrained(tmp_path / "middle")
    theirs = adapted(tmp_path / "middle", tmp_path / "upper", target_modules=["k_proj"])
    edit(tmp_path / "upper", base_model_name_or_path=str(adapter))
    assert relative_error(our_logits(tmp_path / "upper"), torch_logits(theirs, TOKENS)) < TOLERANCE
    edit(adapter, base_model_name_or_path=str(tmp_path / "upper"))
    with pytest.raises(InputError, match="is an adapter of itself, by way of its base"):
        load(adapter, tokenizer=False)


def test_the_tokenizer_is_that_of_the_adapter_or_of_the_base(pair):
    base, adapter, _ = pair
    small_tokenizer().hf.save_pretrained(base)
    assert load(adapter)[1].reset_id is None
    small_tokenizer(special=("<|im_start|>", "<|im_end|>", "[RESET]")).hf.save_pretrained(adapter)
    assert load(adapter)[1].reset_id is not None


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "fields,message",
    [
        (
            dict(base_model_name_or_path="owner/name"),
            "is an adapter of owner/name, which cannot be read: .*merge_and_un",
        ),
        (dict(base_model_name_or_path="/nowhere/base"), "is an adapter of /nowhere/base, which cannot be read"),
        (dict(base_model_name_or_path=None), "of a base that it does not name, .* base_model_name_or_path is not set"),
        (dict(base_model_name_or_path=3), "base_model_name_or_path = 3 is no text"),
        (dict(peft_type="IA3"), "peft_type = 'IA3' is not supported; only 'LORA' is"),
        (dict(peft_type=...), "has no peft_type: only adapters of PEFT"),
        (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa' is not supported: it changes the base as well"),
        (dict(init_lora_weights="olora"), "init_lora_weights = 'olora'"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4'"),
        (dict(layer_replication=[[0, 2]]), r"layer_replication = \[\[0, 2\]\] is not supported"),
        (dict(lora_bias=True), "lora_bias = True is not supported"),
        (dict(use_qalora=True), "use_qalora = True is not supported"),
        (dict(alora_invocation_tokens=[1]), r"alora_invocation_tokens = \[1\] is not supported"),
        (dict(target_parameters=["x"]), r"target_parameters = \['x'\] is not supported"),
        (dict(a_setting_to_come=1), "a_setting_to_come = 1 is not supported"),
        (dict(r=8), "has rank 4, adapter_config.json says 8"),
        (dict(lora_alpha="16"), "lora_alpha = '16' of .* is no number"),
        (dict(use_dora=True), "has no lora_magnitude_vector, which use_dora needs"),
        (dict(alpha_pattern=[1]), r"alpha_pattern = \[1\] is no object"),
        (dict(alpha_pattern={"(": 1}), "a pattern of a module's name is none"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused_by_its_setting(pair, fields, message):
    _, adapter, _ = pair
    edit(adapter, **fields)
    with pytest.raises(InputError, match=message):
        load(adapter, tokenizer=False)


def test_low_rank_of_a_tensor_that_is_head_and_embedding_is_refused(written, tmp_path):
    adapted(written / TIED, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(InputError, match="changes the embedding or the head, which are one tensor in its base"):
        load(tmp_path / "adapter", tokenizer=False)


def test_a_quantised_base_is_named_with_what_to_do(pair):
    base, adapter, _ = pair
    rewrite_config(base, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(
        InputError, match=r"is an adapter of .*base, .*quantised.*Set base_model_name_or_path .* 16 or 32"
    ):
        load(adapter, tokenizer=False)


def test_an_adapter_of_another_model_is_refused(pair, written):
    _, adapter, _ = pair
    edit(adapter, base_model_name_or_path=str(written / GEMMA))
    with pytest.raises(InputError, match=r"do not fit .* Its base is another model"):
        load(adapter, tokenizer=False)
    shallow = adapter.parent / "shallow"
    random_model(LLAMA, num_hidden_layers=1).save_pretrained(shallow)
    edit(adapter, base_model_name_or_path=str(shallow))
    with pytest.raises(InputError, match=r"adapts what its base does not have: .*Its base is another model"):
        load(adapter, tokenizer=False)


@pytest.mark.parametrize("kept", [[], ["adapter_model.bin"]])
def test_pickled_and_missing_adapters_are_refused(pair, kept):
    _, adapter, _ = pair
    (adapter / WEIGHTS).unlink()
    for name in kept:
        (adapter / name).write_bytes(b"\x80\x04.")
    pickled = r" \(adapter_model\.bin is pickled, and never loaded\)" if kept else ""
    with pytest.raises(InputError, match=f"holds no {WEIGHTS}{pickled}: save it again with safetensors"):
        load(adapter, tokenizer=False)


def test_a_matrix_without_its_other_half_is_refused(pair):
    _, adapter, _ = pair
    tensors = load_file(adapter / WEIGHTS)
    tensors.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj\.weight has lora_A, and not both matrices"):
        load(adapter, tokenizer=False)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_configuration_that_is_none_is_named(pair, text):
    _, adapter, _ = pair
    (adapter / ADAPTER).write_text(text)
    with pytest.raises(InputError, match=f"{ADAPTER} (cannot be read as JSON|holds no object)"):
        load(adapter, tokenizer=False)


def test_the_card_of_an_export_names_the_base(pair, tmp_path):
    base, adapter, _ = pair
    small_tokenizer().hf.save_pretrained(base)
    assert (adapter / "README.md").is_file()  # PEFT's, with the path of the base
    model, tokenizer = load(adapter)
    for name, said in ((str(base), None), ("owner/name", "owner/name")):
        edit(adapter, base_model_name_or_path=name)
        save(model, tokenizer, tmp_path / "out", recipe={"model": {"path": str(adapter)}}, overwrite=True)
        card = tmp_path / "out" / "README.md"
        assert ModelCard.load(card).data.base_model == said and str(tmp_path) not in card.read_text()
