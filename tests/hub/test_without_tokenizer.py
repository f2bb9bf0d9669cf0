"""Models whose tokenizers cannot be used: their weights are loaded without one."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from jax_backtrack.errors import InputError
from jax_backtrack.hub.load import load
from tests import gguf_files
from tests.chat_tokenizers import CHATML, small_tokenizer
from tests.checkpoints import TOLERANCE, random_tokens, relative_error, tiny_llama, torch_logits

TOKENS = random_tokens((2, 24), vocabulary=300)


def save_word_level(folder, special=("w0", "w1")) -> None:
    """A tokenizer whose special tokens are ordinary words."""
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(512)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1], unk_token="w2", chat_template=CHATML
    )
    hf.save_pretrained(folder)


def save_broken(folder) -> None:
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text("no JSON either")


def save_nothing(folder) -> None:
    pass


def save_one_without_a_template(folder) -> None:
    small_tokenizer().hf.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()


def save_one_of_another_model(folder) -> None:
    small_tokenizer(ordinary=[f"word{number}" for number in range(2000)]).hf.save_pretrained(folder)


@pytest.mark.parametrize(
    "save,refused",
    [
        (
            save_word_level,
            r"reads 'w\d' in plain text as its special token; load\(\.\.\., tokenizer=False\) gives the mo",
        ),
        (save_broken, "tokenizer cannot be loaded"),
        (save_nothing, "has no tokenizer.json"),
        (save_one_without_a_template, "has no chat template"),
        (save_one_of_another_model, "the embedding has 512 rows"),
    ],
)
def test_a_model_is_loaded_without_its_tokenizer(written, tmp_path, save, refused):
    folder = shutil.copytree(written / "Llama-3.1-8B", tmp_path / "model")
    save(folder)
    with pytest.raises(InputError, match=refused):
        load(folder)
    model, tokenizer = load(folder, tokenizer=False)
    assert tokenizer is None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative_error(model(TOKENS), torch_logits(theirs, TOKENS)) < TOLERANCE


def test_a_gguf_file_is_loaded_without_its_tokenizer(tmp_path):
    theirs = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    path = gguf_files.write(tmp_path / "x.gguf", theirs, tokenizer__ggml__model="llama")
    with pytest.raises(InputError, match=r"tokenizer .* is not supported"):
        load(path)
    model, tokenizer = load(path, tokenizer=False)
    assert tokenizer is None and relative_error(model(TOKENS), torch_logits(theirs, TOKENS)) < TOLERANCE


def test_a_folder_with_a_gguf_file_is_answered_with_the_file(tmp_path):
    gguf_files.write(tmp_path / "x.gguf", tiny_llama())
    with pytest.raises(InputError, match=r"no config.json.*it holds x\.gguf: give that file's own path"):
        load(tmp_path)


def test_two_models_in_one_folder_are_refused(written, tmp_path):
    folder = shutil.copytree(written / "Llama-3.1-8B", tmp_path / "model")
    shutil.copytree(written / "Llama-3.2-1B", folder / "export")
    with pytest.raises(
        InputError, match=r"holds a model and another one in export/: give .*export, or take export/ away"
    ):
        load(folder, tokenizer=False)
    model = load(folder / "export", tokenizer=False)[0]
    assert model.config.tie_word_embeddings
    (folder / "config.json").rename(folder / "recipe.json")  # as a workdir has one
    np.testing.assert_array_equal(load(folder, tokenizer=False)[0](TOKENS), model(TOKENS))
