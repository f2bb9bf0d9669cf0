"""Tokenizer, embedding and configuration agree on [RESET]."""

import numpy as np
import pytest

from jax_backtrack.errors import InputError
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import check_agreement, load
from jax_backtrack.hub.reset import UNDOING_WORDS, add_reset, row_beyond
from tests import tiny
from tests.chat_tokenizers import small_tokenizer


def started(tokenizer, tied: bool):
    """The tables of a tiny model before and behind `add_reset`, with the ids of [RESET] and of the words."""
    model = tiny.model(vocab_size=49152, tie_word_embeddings=tied)
    tables = ["embedding_VxM"] if tied else ["embedding_VxM", "head_VxM"]
    before = {name: np.array(getattr(model, name)[...]) for name in tables}
    made = add_reset(model, tokenizer)
    assert add_reset(model, made) is made
    after = {name: np.asarray(getattr(model, name)[...]) for name in tables}
    return before, after, made.reset_id, [tokenizer.encode(word) for word in UNDOING_WORDS]


@pytest.mark.parametrize("tied", [True, False])
def test_the_row_starts_twice_as_far_out_as_the_words_in_their_direction(tokenizer, tied):
    before, after, reset_id, words = started(tokenizer, tied)
    for name, table in before.items():
        middle = table.mean(axis=0)
        away = np.stack([table[ids].mean(axis=0) for ids in words]) - middle
        row = after[name][reset_id] - middle
        direction = away.mean(axis=0) / np.linalg.norm(away.mean(axis=0))
        np.testing.assert_allclose(row / np.linalg.norm(row), direction, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(row), 2 * (away @ direction).max(), rtol=1e-4)
        others = np.arange(49152) != reset_id
        np.testing.assert_array_equal(after[name][others], table[others])


@pytest.mark.parametrize("tied", [True, False])
def test_what_makes_the_token_likely_makes_none_of_the_words_as_likely(tokenizer, tied):
    """Moves a hidden state up the likelihood of [RESET], as training does, from where all is equally likely. From the
    words' mean one of them stays as likely, whatever the hidden state."""
    _, after, reset_id, words = started(tokenizer, tied)
    table = after["embedding_VxM" if tied else "head_VxM"]
    of_words = np.concatenate(words)
    hidden = np.zeros(table.shape[1])
    for _ in range(20):
        logits = table @ hidden
        chances = np.exp(logits - logits.max())
        hidden += 0.1 * (table[reset_id] - chances @ table / chances.sum())
        assert (table[reset_id] @ hidden > table[of_words] @ hidden).all()


def test_words_without_a_direction_give_the_mean_of_all_rows():
    np.testing.assert_array_equal(row_beyond(np.ones((5, 3), np.float32), np.ones(3, np.float32)), np.ones(3))


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_without_a_spare_token_grows_everywhere(tmp_path, tied):
    tokenizer = small_tokenizer()
    size = len(tokenizer.hf)
    model = tiny.model(vocab_size=size, tie_word_embeddings=tied)
    made = add_reset(model, tokenizer)
    assert made.reset_id == size < model.config.vocab_size == model.embedding_VxM.shape[0]
    assert model.config.vocab_size % 64 == 0
    assert tied or model.head_VxM.shape == model.embedding_VxM.shape
    save(model, made, tmp_path / "out")
    again, loaded = load(tmp_path / "out")
    assert loaded.reset_id == made.reset_id and again.config == model.config


def test_what_is_saved_is_what_is_loaded(tokenizer, tmp_path):
    model = tiny.model(vocab_size=49152)
    made = add_reset(model, tokenizer)
    made.reset_mode = "keep"
    save(model, made, tmp_path / "out")
    again, loaded = load(str(tmp_path / "out"))
    assert (loaded.reset_id, loaded.reset_mode) == (made.reset_id, "keep")
    assert again.config == model.config


def test_disagreement_is_named(reset_tokenizer):
    model = tiny.model(vocab_size=49152)
    with pytest.raises(InputError, match=r"says \[RESET\] is id 9, the tokenizer says 4"):
        check_agreement(model, reset_tokenizer, {"backtracking": {"reset_token_id": 9}})
    with pytest.raises(InputError, match="ids up to 49151, the embedding has 40000 rows"):
        check_agreement(tiny.model(vocab_size=40000), reset_tokenizer, {})
