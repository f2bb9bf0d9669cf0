"""Vocabularies and embeddings of different sizes: rows that no token has, and tokens that have no row."""

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken

from jax_backtrack import Sampler, SamplingParams
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.attacks.gcg import Attack, Objective, Settings
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from jax_backtrack.hub.reset import add_reset
from tests.chat_tokenizers import CHATML, small_tokenizer
from tests.checkpoints import TOLERANCE, relative_error, torch_logits

ORDINARY = ("Ġthe", "Ġcat")
WITH_MORE = CHATML + "{% if messages[0].role == 'system' %}<image>{% endif %}"


def folder_of(tmp_path, rows: int, tokenizer, **fields):
    """A folder as transformers writes it, whose embedding has so many rows."""
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.hf.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --------------------------------------------------------------------------------------------- rows without a token


def test_runs_of_ids_without_a_token():
    tokenizer = small_tokenizer()
    size = len(tokenizer.hf)
    assert tokenizer.unused_ids(size) == ()
    assert tokenizer.unused_ids(size + 1) == ((size, size + 1),)
    assert tokenizer.unused_ids(2 * size) == ((size, 2 * size),)
    assert tokenizer.unused_ids(size - 1) == ()


@pytest.mark.parametrize("mode", ["keep", "rewind", "resample"])
@pytest.mark.parametrize("with_reset", [False, True])
def test_a_padded_vocabulary_gives_no_reply_with_an_id_that_no_token_has(tmp_path, mode, with_reset):
    tokenizer = small_tokenizer()
    size = len(tokenizer.hf)
    model, tokenizer = load(folder_of(tmp_path, 512, tokenizer))
    if with_reset:
        tokenizer = add_reset(model, tokenizer)
    settings = SamplingParams(temperature=3.0, max_new_tokens=32, logprobs=True, max_resets=2, top_k=500)
    replies = Sampler(model, tokenizer, settings, reset_mode=mode)(["a"], n=16)
    written = np.concatenate([reply.trace.token_ids for reply in replies])
    assert len(written) > 200 and written.max() < size + with_reset
    # Those rows are likely here: a third of the mass.
    logits = np.asarray(model(tokenizer.render([{"role": "user", "content": "a"}])[None]))[0, -1]
    mass = np.exp(logits / 3 - (logits / 3).max())
    assert mass[size + with_reset :].sum() > 0.2 * mass.sum()


def test_the_search_for_a_suffix_proposes_tokens_only(tmp_path):
    """Where rows without a token promise most."""
    model, tokenizer = load(folder_of(tmp_path, 512, small_tokenizer()))
    objective = Objective.of(tokenizer, [{"role": "user", "content": "a"}], "b")
    searching = Attack(model, tokenizer, objective, Settings(suffix="a b c", width=64, top_k=8))
    gradient = searching.gradients().copy()
    gradient[:, len(tokenizer.hf) :] = -1e9
    candidates = searching.candidates(gradient)
    assert len(candidates) > 10 and candidates.max() < len(tokenizer.hf)


# --------------------------------------------------------------------------------------------- tokens without a row


@pytest.fixture
def with_more_tokens(tmp_path):
    """A folder whose tokenizer has an ordinary, a control and a padding token that the embedding has no rows for."""
    tokenizer = small_tokenizer(template=WITH_MORE)
    rows = len(tokenizer.hf)
    tokenizer.hf.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.hf.add_tokens([AddedToken("<table>", special=False, normalized=False)])
    tokenizer.hf.add_special_tokens({"pad_token": "<pad>"})
    return folder_of(tmp_path, rows, tokenizer), rows


def test_a_tokenizer_with_more_tokens_is_loaded_and_said(with_more_tokens, capsys):
    folder, rows = with_more_tokens
    model, tokenizer = load(folder)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"3 tokens of the tokenizer have no row in the embedding of {rows} rows: '<image>', '<table>', '<pad>'" in said
    )
    assert sorted(tokenizer.without_row) == [rows, rows + 1, rows + 2]
    tokens = tokenizer.render([{"role": "user", "content": "a cat"}])[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert relative_error(model(tokens), torch_logits(theirs, tokens)) < TOLERANCE
    (reply,) = Sampler(model, tokenizer, SamplingParams(max_new_tokens=8))(["a cat"])
    assert reply.finish_reason


def test_a_token_without_a_row_is_refused_when_it_is_met(with_more_tokens):
    folder, rows = with_more_tokens
    model, tokenizer = load(folder)
    assert tokenizer.encode("an <image> and a <pad>").max() < rows  # spelt in a text they are text
    with pytest.raises(InputError, match=rf"'<image>' \(id {rows}\) has no row in the model's embedding"):
        tokenizer.render([{"role": "system", "content": "see"}])
    sampler = Sampler(model, tokenizer, SamplingParams(max_new_tokens=8))
    with pytest.raises(InputError, match="has no row"):
        sampler([[{"role": "system", "content": "see"}]])
    for wrong in (rows, -1):
        with pytest.raises(InputError, match=f"a prompt has the id {wrong}; the model's ids end before {rows}"):
            sampler([np.array([1, wrong, 2])])


def test_an_ordinary_token_without_a_row_is_refused_when_it_is_met(tmp_path):
    tokenizer = small_tokenizer(ordinary=("ab", "abc"), merges=[("a", "b"), ("ab", "c")], special=("<|im_end|>",),
                                template="{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")  # fmt: skip
    vocabulary = tokenizer.hf.get_vocab()
    parts = json.loads(tokenizer.hf.backend_tokenizer.to_str())
    # The last merge's token is the one of the largest id.
    swapped = {"abc": vocabulary["<|im_end|>"], "<|im_end|>": vocabulary["abc"]}
    parts["model"]["vocab"]["abc"] = swapped["abc"]
    parts["added_tokens"][0]["id"] = swapped["<|im_end|>"]
    parts["model"]["vocab"]["<|im_end|>"] = swapped["<|im_end|>"]
    tokenizer.hf._tokenizer = type(tokenizer.hf.backend_tokenizer).from_str(json.dumps(parts))
    _, loaded = load(folder_of(tmp_path, len(vocabulary) - 1, tokenizer))
    assert loaded.encode("ab").tolist() == [vocabulary["ab"]]
    with pytest.raises(InputError, match=r"'abc' .* has no row"):
        loaded.encode("an abc")


def test_reset_and_an_export_stand_beside_tokens_without_a_row(with_more_tokens, tmp_path):
    folder, rows = with_more_tokens
    model, tokenizer = load(folder)
    tokenizer = add_reset(model, tokenizer)
    assert tokenizer.reset_id == rows + 3 and sorted(tokenizer.without_row) == [rows, rows + 1, rows + 2]
    assert tokenizer.unused_ids(320) == ((rows, rows + 3), (rows + 4, 320))
    with pytest.raises(InputError, match=r"'<image>' .* has no row"):
        tokenizer.render([{"role": "system", "content": "see"}])
    save(model, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pad_token_id"] is None and config["backtracking"]["unused_token_ids"] == [
        [rows, rows + 3],
        [rows + 4, 320],
    ]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = tokenizer.render([{"role": "user", "content": "a cat"}])[None]
    assert relative_error(load(tmp_path / "out")[0](tokens), torch_logits(theirs, tokens)) < TOLERANCE


def test_an_export_of_a_model_with_too_few_rows_is_one_for_transformers(with_more_tokens, tmp_path):
    model, tokenizer = load(with_more_tokens[0])
    save(model, tokenizer, tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sorted(load(tmp_path / "out")[1].without_row) == sorted(tokenizer.without_row)


def test_what_every_reply_needs_must_have_a_row(tmp_path):
    with pytest.raises(
        InputError, match=r"'<\|im_end\|>', which ends the assistant's turn, has id 257; the embedding has"
    ):
        load(folder_of(tmp_path, 257, small_tokenizer()))


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match="ids up to 49151, the embedding has 512 rows"):
        load(folder_of(tmp_path, 512, tokenizer))
