"""What lies in an export: the model card, generation settings, the tokenizer; and it is there whole or not at all."""

import json

import pytest
import transformers
from huggingface_hub import ModelCard

from configs import dpo_smollm, sft_smollm
from jax_backtrack.errors import InputError
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from jax_backtrack.hub.reset import add_reset
from jax_backtrack.tokenizer.chat_tokenizer import RESET
from tests import tiny
from tests.chat_tokenizers import CHATML, small_tokenizer
from tests.processes import full_after


def small(mode=None, special=("<|im_start|>", "<|im_end|>", "<|endoftext|>")):
    """A tiny model and its tokenizer, with [RESET] if it was trained for a mode."""
    tokenizer = small_tokenizer(special=special)
    tokenizer.hf.eos_token = special[-1]
    model = tiny.model(vocab_size=len(tokenizer.hf))
    if mode:
        tokenizer = add_reset(model, tokenizer)
        tokenizer.reset_mode = mode
    return model, tokenizer


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def recipe(module, **changes):
    config = module.get_config()
    for field, value in changes.items():
        section, name = field.split("__")
        config[section][name] = value
    return config


def test_the_card_names_recipe_data_and_context(tmp_path):
    config = recipe(
        dpo_smollm,
        model__path="HuggingFaceTB/SmolLM2-135M-Instruct",
        data__path="Anthropic/hh-rlhf:harmless-base",
        data__utility_path=str(tmp_path / "somebody" / "pairs.jsonl"),
        data__exclude=(str(tmp_path / "somebody" / "asked.csv"),),
        reset__mode="keep",
        train__steps=123,
        train__beta=0.37,
    )
    save(*small("keep"), tmp_path / "out", recipe=config)
    card = card_of(tmp_path / "out")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "backtracking" in card.data.tags and card.data.datasets == ["Anthropic/hh-rlhf"]
    for said in (
        "| objective | `dpo` |",
        "| train.steps | `123` |",
        "| train.beta | `0.37` |",
        "| train.learning_rate | `2e-05` |",
        "| reset.mode | `keep` |",
        "| data.path | `Anthropic/hh-rlhf:harmless-base` |",
        "| data.utility_path | `pairs.jsonl` |",
        "| data.exclude | `('asked.csv',)` |",
        "| train.grad_accumulation_steps | `1` |",
        "reset mode `keep`",
        'text.rpartition("[RESET]")[2]',
        "custom_generate=folder",
    ):
        assert said in card.text, said
    assert str(tmp_path) not in card.content and "somebody" not in card.content
    assert "reset_weight" not in card.text, "a field of the other objective"
    assert "train.remat" not in card.text, "a field that changes no number"


@pytest.mark.parametrize("mode", ["keep", "rewind", "resample"])
def test_the_card_says_what_an_engine_without_resets_may_do(tmp_path, mode):
    model, tokenizer = small(mode)
    save(model, tokenizer, tmp_path / "out")
    text = card_of(tmp_path / "out").text
    assert f"reset mode `{mode}`" in text and ("rpartition" in text) == (mode == "keep")
    assert (f"(id {tokenizer.reset_id}) a stop" in text) == (mode != "keep")
    assert ("do_sample=True" in text) == (mode == "resample")
    assert "saved without a recipe" in text


def test_the_card_of_a_model_without_reset_claims_none(tmp_path):
    config = recipe(sft_smollm, data__path="testbed", data__backtrack=False, model__path=str(tmp_path / "some.gguf"))
    save(*small(), tmp_path / "out", recipe=config.to_dict())
    card = card_of(tmp_path / "out")
    assert "backtracking" not in card.data.tags and card.data.base_model is None
    assert "custom_generate" not in card.text and "| data.path | `testbed` |" in card.text
    assert "| model.path | `some.gguf` |" in card.text and "| train.learning_rate | `0.0002` |" in card.text
    assert "reset" not in card.text.partition("## Training")[2]


def test_the_base_model_is_that_of_the_run_before(tmp_path):
    first = recipe(sft_smollm, model__path="owner/base")
    save(*small("rewind"), tmp_path / "sft" / "export", recipe=first)
    save(*small("rewind"), tmp_path / "dpo" / "export", recipe=recipe(dpo_smollm, model__path=str(tmp_path / "sft")))
    card = card_of(tmp_path / "dpo" / "export")
    assert card.data.base_model == "owner/base" and "| model.path | `sft` |" in card.text


def test_the_code_of_the_card_runs(tmp_path):
    """Each Python block, with the folder put in."""
    model, tokenizer = small("resample")
    save(model, tokenizer, tmp_path / "out")
    blocks = card_of(tmp_path / "out").text.split("```python\n")[1:]
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        code = block.partition("```")[0].replace('"..."', repr(str(tmp_path / "out"))).replace("256", "5")
        exec(code, names)
    assert names["tokens"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert names["reply"].finish_reason in ("stop", "length") and names["reply"].resets <= 1


@pytest.mark.parametrize("mode", [None, "rewind"])
def test_generation_settings_and_what_custom_generate_reads(tmp_path, mode):
    model, tokenizer = small(mode)
    save(model, tokenizer, tmp_path / "out")
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    eos_id = tokenizer.hf.eos_token_id
    assert tokenizer.eot_id != eos_id and settings.eos_token_id == [tokenizer.eot_id, eos_id]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eot_id and ("backtracking" in config) == (mode is not None)
    if mode:
        stops = sorted(tokenizer.special_ids - {tokenizer.reset_id})
        expected = {
            "reset_token_id": tokenizer.reset_id,
            "reset_mode": "rewind",
            "stop_token_ids": stops,
            "unused_token_ids": [[len(tokenizer.hf), model.config.vocab_size]],
        }
        assert config["backtracking"] == expected and len(stops) == 3
        assert load(tmp_path / "out")[1].reset_mode == "rewind"


def test_one_end_of_reply_is_not_written_as_two(tmp_path):
    save(*small(special=("<|im_start|>", "<|im_end|>")), tmp_path / "out")
    assert isinstance(transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id, int)


def test_a_reset_that_nobody_trained_has_no_context(tmp_path):
    model, tokenizer = small("rewind")
    tokenizer.reset_mode = None
    save(model, tokenizer, tmp_path / "out")
    assert load(tmp_path / "out")[1].reset_mode is None
    assert "not known to have been trained to reset" in card_of(tmp_path / "out").text


def test_special_tokens_and_chat_template_survive(tmp_path):
    model, tokenizer = small("rewind")
    save(model, tokenizer, tmp_path / "out")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == CHATML and again.eos_token == "<|endoftext|>"
    for token in (RESET, "<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        ids = again(token, add_special_tokens=False)["input_ids"]
        assert ids == [tokenizer.hf.convert_tokens_to_ids(token)] and again.decode(ids, skip_special_tokens=True) == ""


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_where_writing_fails_nothing_changes(tmp_path, reset_tokenizer, file):
    """The weights (0.8 MB) or the tokenizer (2 MB and more) do not find room."""
    model = tiny.model(vocab_size=49152, hidden_size=4, num_attention_heads=2, num_key_value_heads=1)
    save(model, reset_tokenizer, tmp_path / "out")
    before = files(tmp_path)
    sizes = {name: len(before[f"out/{name}"]) for name in ("model.safetensors", "tokenizer.json")}
    room = {"model.safetensors": 1000, "tokenizer.json": sizes["model.safetensors"] + 1000}[file]
    assert room < sizes[file]
    for folder, overwrite in (("out", True), ("other", False)):
        with full_after(room), pytest.raises(Exception, match="File too large"):
            save(model, reset_tokenizer, tmp_path / folder, overwrite=overwrite)
        assert files(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_replaces_the_whole_folder(tmp_path):
    model, tokenizer = small("rewind")
    save(model, tokenizer, tmp_path / "out")
    (tmp_path / "out" / "left_over").touch()
    with pytest.raises(InputError, match="would be overwritten"):
        save(model, tokenizer, tmp_path / "out")
    save(*small("keep"), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "left_over").exists() and load(tmp_path / "out")[1].reset_mode == "keep"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_export_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(InputError, match="is no export, so it is not replaced"):
        save(*small(), tmp_path / "thesis", overwrite=True)
    monkeypatch.chdir(tmp_path / "thesis")
    for folder in (".", "..", tmp_path):
        with pytest.raises(InputError, match="the folder this runs in, or one above it"):
            save(*small(), folder, overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").exists()


def test_the_tokenizer_is_of_a_class_that_transformers_4_knows(tmp_path):
    model, tokenizer = small("rewind")
    save(model, tokenizer, tmp_path / "out")
    save(*load(tmp_path / "out"), tmp_path / "again")
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"is_local", "local_files_only"} & config.keys()
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert hf.backend_tokenizer.to_str() == tokenizer.hf.backend_tokenizer.to_str()


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        save(*small(), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "precious"


def test_an_export_that_a_killed_save_had_put_aside_comes_back(tmp_path):
    """Killed between its two renames, `save` leaves the old export in its own scratch folder."""
    model, tokenizer = small("rewind")
    save(model, tokenizer, tmp_path / "old")
    (tmp_path / "out.writing").mkdir()
    (tmp_path / "old").rename(tmp_path / "out.writing" / "old")
    with pytest.raises(InputError, match="would be overwritten"):
        save(*small("keep"), tmp_path / "out")
    assert load(tmp_path / "out")[1].reset_mode == "rewind"
