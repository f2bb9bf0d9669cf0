"""Tokenizer, embedding and configuration agree on [RESET]."""

import numpy as np
import pytest

from jax_backtrack.errors import InputError
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import check_agreement, load
from jax_backtrack.hub.reset import UNDOING_WORDS, add_reset
from tests import tiny
from tests.test_tokenizer import small_tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_the_row_starts_at_the_mean_of_words_of_undoing(tokenizer, tied):
    model = tiny.model(vocab_size=49152, tie_word_embeddings=tied)
    tables = ["embedding_VxM"] if tied else ["embedding_VxM", "head_VxM"]
    before = {name: np.array(getattr(model, name)[...]) for name in tables}
    made = add_reset(model, tokenizer)
    for name in tables:
        after = np.asarray(getattr(model, name)[...])
        words = [before[name][tokenizer.encode(word)].mean(axis=0) for word in UNDOING_WORDS]
        np.testing.assert_allclose(after[made.reset_id], np.mean(words, axis=0), rtol=1e-5)
        others = np.arange(49152) != made.reset_id
        np.testing.assert_array_equal(after[others], before[name][others])
    assert add_reset(model, made) is made


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
    made.reset_context = "keep"
    save(model, made, tmp_path / "out")
    again, loaded = load(str(tmp_path / "out"))
    assert (loaded.reset_id, loaded.reset_context) == (made.reset_id, "keep")
    assert again.config == model.config


def test_disagreement_is_named(reset_tokenizer):
    model = tiny.model(vocab_size=49152)
    with pytest.raises(InputError, match=r"says \[RESET\] is id 9, the tokenizer says 4"):
        check_agreement(model, reset_tokenizer, {"backtracking": {"reset_token_id": 9}})
    with pytest.raises(InputError, match="ids up to 49151, the embedding has 40000 rows"):
        check_agreement(tiny.model(vocab_size=40000), reset_tokenizer, {})
