"""Models in .gguf files: rope of Llama-3.1, metadata that changes the model, the reset mode, base and licence.

The files are written as llama.cpp's converter does it, from models of transformers.
"""

import math
import re

import numpy as np
import pytest
import transformers
import yaml

from configs import sft_smollm
from jax_backtrack import Sampler, SamplingParams
from jax_backtrack.errors import InputError
from jax_backtrack.hub.export import save
from jax_backtrack.hub.gguf import GGUFFile
from jax_backtrack.hub.load import load
from jax_backtrack.models.rope import rope_frequencies
from jax_backtrack.sampling.build import recipe_sampler
from tests import gguf_files
from tests.checkpoints import (
    LLAMA3_ROPE,
    TOLERANCE,
    random_tokens,
    relative_error,
    tiny_llama,
    torch_logits,
)

TOKENS = random_tokens((2, 40), vocabulary=250)


def factors(model) -> np.ndarray:
    """As llama.cpp's converter writes them (conversion/llama.py): what each frequency is divided by."""
    rope, dim = model.config.rope_parameters, model.config.head_dim
    low, high, original = (rope[name] for name in
                           ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))  # fmt: skip
    found = []
    for place in range(0, dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (place / dim)
        smooth = min(1.0, max(0.0, (original / wave - low) / (high - low)))
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, np.float32)


def loaded(path):
    return load(path)[0]


# ------------------------------------------------------------------------------------------------ rope of Llama-3.1


@pytest.mark.parametrize(
    "factor,original,low,high",
    [(8.0, 32, 1.0, 4.0), (32.0, 32, 1.0, 4.0), (8.0, 8192, 1.0, 4.0), (16.0, 100, 1.0, 4.0), (8.0, 64, 2.0, 8.0)],
)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_the_factors_of_rope_are_honoured(tmp_path, factor, original, low, high, head_dim):
    rope = LLAMA3_ROPE | dict(
        factor=factor, original_max_position_embeddings=original, low_freq_factor=low, high_freq_factor=high
    )
    theirs = tiny_llama(rope_parameters=rope, head_dim=head_dim)
    path = gguf_files.write(tmp_path / "x.gguf", theirs, rope_factors=factors(theirs))
    model = loaded(path)
    read = model.config
    ours = rope_frequencies(read.head_dim, read.rope_theta, read.rope_scaling)
    np.testing.assert_allclose(ours, theirs.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert relative_error(model(TOKENS), torch_logits(theirs, TOKENS)) < TOLERANCE


def test_without_the_factors_the_logits_would_be_others(tmp_path):
    theirs = tiny_llama()
    with_them, without = tmp_path / "with.gguf", tmp_path / "without.gguf"
    gguf_files.write(with_them, theirs, rope_factors=factors(theirs))
    gguf_files.write(without, theirs)
    assert relative_error(loaded(without)(TOKENS), torch_logits(theirs, TOKENS)) > 100 * TOLERANCE
    assert relative_error(loaded(with_them)(TOKENS), torch_logits(theirs, TOKENS)) < TOLERANCE


def test_an_export_of_them_is_the_same_to_transformers(tmp_path):
    theirs = tiny_llama()
    model, tokenizer = load(gguf_files.write(tmp_path / "x.gguf", theirs, rope_factors=factors(theirs)))
    save(model, tokenizer, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative_error(torch_logits(again, TOKENS), torch_logits(theirs, TOKENS)) < TOLERANCE


def test_factors_of_one_are_no_scaling(tmp_path):
    plain = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    model = loaded(gguf_files.write(tmp_path / "x.gguf", plain, rope_factors=np.ones(32)))
    assert model.config.rope_scaling is None
    assert relative_error(model(TOKENS), torch_logits(plain, TOKENS)) < TOLERANCE


@pytest.mark.parametrize(
    "wrong,message",
    [
        (np.linspace(1, 8, 32), "are not those of Llama-3.1's rope scaling; use the model's Hugging Face folder"),
        (np.linspace(0.5, 8, 32), "are not those of Llama-3.1's"),
        (np.ones(16), r"has shape \(16,\), not \(32,\)"),
    ],
    ids=["long", "below 1", "short"],
)
def test_other_factors_are_refused(tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        load(gguf_files.write(tmp_path / "x.gguf", tiny_llama(), rope_factors=wrong))


# --------------------------------------------------------------------------------- metadata that changes the model


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(llama__rope__scaling__type="yarn"), "rope scaling 'yarn' is not supported"),
        (dict(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0), "rope scaling 'linear'"),
        (dict(llama__rope__scaling__factor=4.0), "rope scaling 'linear' is not supported"),
        (dict(llama__rope__scale_linear=4.0), "rope scaling 'linear' is not supported"),
        (dict(llama__rope__scaling__attn_factor=1.5), "llama.rope.scaling.attn_factor = 1.5 is not supported"),
        (dict(llama__expert_count=8), "llama.expert_count = 8 is not supported; only 0 is"),
        (dict(llama__attention__sliding_window=16), "llama.attention.sliding_window = 16"),
        (dict(llama__attention__causal=False), "llama.attention.causal = False is not supported; only True is"),
        (dict(llama__attention__scale=0.5), "llama.attention.scale = 0.5"),
        (dict(llama__logit_scale=2.0), "llama.logit_scale = 2.0"),
        (dict(llama__rope__dimension_count=32), "llama.rope.dimension_count = 32 is not supported; heads have 64"),
        (dict(llama__attention__value_length=32), "llama.attention.value_length = 32 is not supported"),
        (dict(llama__rope__freq_base=...), "'llama.rope.freq_base' is missing"),
        (dict(llama__attention__layer_norm_rms_epsilon=...), "layer_norm_rms_epsilon' is missing"),
        (dict(llama__context_length=...), "'llama.context_length' is missing"),
    ],
)
def test_metadata_that_changes_the_model_is_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load(gguf_files.write(tmp_path / "x.gguf", tiny_llama(), **fields))


@pytest.mark.parametrize(
    "fields",
    [
        dict(llama__rope__scaling__type="linear", llama__rope__scaling__factor=1.0),
        dict(llama__rope__scaling__type="none", llama__attention__causal=True, llama__logit_scale=1.0),
        dict(llama__rope__dimension_count=..., llama__attention__value_length=...),
        dict(llama__attention__key_length=..., llama__attention__value_length=..., llama__rope__dimension_count=...),
    ],
)
def test_metadata_that_changes_nothing_is_loaded(tmp_path, fields):
    plain = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4}, num_attention_heads=1, head_dim=64)
    model = loaded(gguf_files.write(tmp_path / "x.gguf", plain, **fields))
    assert relative_error(model(TOKENS), torch_logits(plain, TOKENS)) < TOLERANCE


def test_what_fills_the_vocabulary_up_is_no_token(tmp_path):
    model, tokenizer = load(gguf_files.write(tmp_path / "x.gguf", tiny_llama()))
    assert tokenizer.unused_ids(model.config.vocab_size) == ((260, 320),)
    settings = SamplingParams(temperature=5.0, max_new_tokens=32, logprobs=True)
    replies = Sampler(model, tokenizer, settings)(["a"], n=8)
    assert max(max(reply.trace.token_ids) for reply in replies) < 260


# ----------------------------------------------------------------------------------------------------- reset mode


@pytest.mark.parametrize("mode", ["keep", "rewind", "resample"])
def test_the_reset_mode_goes_through_the_tags_of_the_card(tmp_path, mode):
    """Converters copy the card's tags to `general.tags`, and the kind of task behind them."""
    theirs = tiny_llama()
    unknown = gguf_files.write(tmp_path / "unknown.gguf", theirs, with_reset=True)
    model, tokenizer = load(unknown)
    tokenizer.reset_mode = mode
    save(model, tokenizer, tmp_path / "out")
    _, front, _ = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    tags = yaml.safe_load(front)["tags"]
    path = gguf_files.write(tmp_path / "x.gguf", theirs, with_reset=True, general__tags=[*tags, "text-generation"])
    again = load(path)[1]
    assert again.reset_mode == mode and again.reset_id == tokenizer.reset_id
    assert load(tmp_path / "out")[1].reset_mode == mode


def test_where_the_reset_mode_is_unknown_the_sampler_asks(tmp_path, capsys):
    path = gguf_files.write(tmp_path / "x.gguf", tiny_llama(), with_reset=True, general__tags=["backtracking"])
    model, tokenizer = load(path)
    assert tokenizer.reset_id == 3 and tokenizer.reset_mode is None
    assert "has [RESET], but does not say which reset mode" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(
        InputError, match=r"does not say which reset mode .* reset\.mode, in Python Sampler\(reset_mode"
    ):
        Sampler(model, tokenizer)
    assert Sampler(model, tokenizer, SamplingParams(max_resets=0, max_new_tokens=4))(["a"])[0].drafts == ()
    capsys.readouterr()
    for mode in ("keep", "rewind"):
        assert Sampler(model, tokenizer, reset_mode=mode)._engine.static.reset_mode == mode
        said = " ".join(capsys.readouterr().out.split())
        assert f"does not say which reset mode it was trained with; {mode!r} is taken" in said
    config = sft_smollm.get_config()
    config.reset.mode = "keep"
    assert recipe_sampler(config, model, tokenizer)._engine.static.reset_mode == "keep"
    assert "'keep' is taken" in " ".join(capsys.readouterr().out.split())


def test_a_folder_with_reset_that_says_nothing_of_it_asks_too(tmp_path):
    model, tokenizer = load(gguf_files.write(tmp_path / "x.gguf", tiny_llama(), with_reset=True))
    save(model, tokenizer, tmp_path / "said")
    Sampler(*load(tmp_path / "said"))  # it says that it was not trained to reset
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "said")
    del theirs.config.backtracking
    theirs.save_pretrained(tmp_path / "other")
    tokenizer.hf.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="does not say which reset mode"):
        Sampler(*load(tmp_path / "other"))


def test_a_file_of_two_reset_modes_is_refused(tmp_path):
    tags = ["reset-mode-keep", "reset-mode-rewind"]
    with pytest.raises(InputError, match="names several reset modes, keep, rewind: keep one"):
        load(gguf_files.write(tmp_path / "x.gguf", tiny_llama(), with_reset=True, general__tags=tags))
    with pytest.raises(InputError, match="'rewnd' is none of keep, rewind, resample"):
        load(gguf_files.write(tmp_path / "y.gguf", tiny_llama(), with_reset=True, general__tags=["reset-mode-rewnd"]))


# ------------------------------------------------------------------------------------------- where it came from


@pytest.mark.parametrize(
    "fields,base,license",
    [
        (dict(general__license="apache-2.0"), None, "apache-2.0"),
        (
            dict(general__license="llama3.1", general__base_model__0__repo_url="https://huggingface.co/meta-llama/Llama-3.1-8B"),
            "meta-llama/Llama-3.1-8B",
            "llama3.1",
        ),
        (dict(general__repo_url="https://huggingface.co/owner/name/"), "owner/name", None),
        (dict(general__source__huggingface__repository="owner/name"), "owner/name", None),
        (dict(general__url="https://example.com/a/b"), None, None),
        (dict(general__name="Smollm2 135M"), None, None),
    ],
)  # fmt: skip
def test_a_card_names_base_and_licence_as_the_file_knows_them(tmp_path, fields, base, license):
    path = gguf_files.write(tmp_path / "x.gguf", tiny_llama(), **fields)
    assert GGUFFile(path).origin() == {
        name: text for name, text in (("base_model", base), ("license", license)) if text
    }
    save(*load(path), tmp_path / "run" / "export", recipe={"model": {"path": str(path)}})
    save(*load(path), tmp_path / "later", recipe={"model": {"path": str(tmp_path / "run")}})
    for folder in (tmp_path / "run" / "export", tmp_path / "later"):
        _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
        card = yaml.safe_load(front)
        assert (card.get("base_model"), card.get("license")) == (base, license)


@pytest.mark.parametrize("fields", [dict(general__license=["a", "b"]), dict(general__license=3, general__tags="x")])
def test_descriptions_of_the_wrong_kind_stop_nothing(tmp_path, fields):
    path = gguf_files.write(tmp_path / "x.gguf", tiny_llama(), **fields)
    save(*load(path), tmp_path / "out", recipe={"model": {"path": str(path)}})
    assert "license:" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "front,licence",
    [
        ("license: mit\n", "mit"),
        ("license: [a, b]\n", None),
        ("license: {\n", None),
        ("- 1\n", None),
        ("a: [1\n", None),
    ],
)
def test_a_card_written_by_hand_stops_nothing(tmp_path, front, licence):
    model, tokenizer = load(gguf_files.write(tmp_path / "x.gguf", tiny_llama()))
    save(model, tokenizer, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(f"---\n{front}---\n\n# A model\n")
    save(model, tokenizer, tmp_path / "out", recipe={"model": {"path": str(tmp_path / "base")}})
    front = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)[1]
    assert yaml.safe_load(front).get("license") == licence


def test_smollm2_has_a_licence(smollm_file):
    assert smollm_file.origin() == {"license": "apache-2.0"}
