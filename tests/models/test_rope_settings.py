"""Settings of the rotary embedding, in every place where people have them: as in transformers, or refused."""

import copy

import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jax_backtrack.errors import InputError
from jax_backtrack.models.families import llama
from jax_backtrack.models.rope import rope_frequencies
from tests import tiny

LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
WITHOUT_LENGTH = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}


def with_rope(**fields) -> dict:
    """A Llama's configuration with these rope settings and no others."""
    config = llama.to_hf_config(tiny.config(head_dim=32))
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        del config[name]
    return config | copy.deepcopy(fields)


def their_frequencies(config: dict) -> np.ndarray:
    rope = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(copy.deepcopy(config)))
    assert rope.attention_scaling == 1.0
    return rope.inv_freq.numpy()


def our_frequencies(config: dict) -> np.ndarray:
    read = llama.from_hf_config(config)
    assert llama.from_hf_config(llama.to_hf_config(read)) == read
    return rope_frequencies(read.head_dim, read.rope_theta, read.rope_scaling)


HONOURED = {
    "plain": dict(rope_theta=1e4),
    "plain, in parameters": dict(rope_parameters=dict(rope_theta=1e4, rope_type="default")),
    "llama3, old": dict(rope_theta=1e4, rope_scaling=LLAMA3),
    "llama3, older": dict(rope_theta=1e4, rope_scaling=WITHOUT_LENGTH | dict(type="llama3", rope_type="llama3"),
                          original_max_position_embeddings=32),
    "llama3, new": dict(rope_parameters=LLAMA3 | dict(rope_theta=1e4)),
    "theta in scaling": dict(rope_scaling=LLAMA3 | dict(rope_theta=1e4)),
    "theta in both places": dict(rope_theta=1e4, rope_parameters=LLAMA3 | dict(rope_theta=1e4)),
    "length at the top too, scaling": dict(rope_theta=1e4, rope_scaling=LLAMA3, original_max_position_embeddings=64),
    "length at the top too, parameters": dict(rope_parameters=LLAMA3 | dict(rope_theta=1e4),
                                              original_max_position_embeddings=64),
    "length at the top too, both": dict(rope_theta=1e4, rope_scaling=LLAMA3, original_max_position_embeddings=128,
                                        rope_parameters=LLAMA3 | dict(rope_theta=1e4)),
    "length at the top alone": dict(rope_theta=1e4, rope_scaling=WITHOUT_LENGTH, original_max_position_embeddings=64),
    "length at the top, plain": dict(rope_theta=1e4, original_max_position_embeddings=64),
    "an empty scaling": dict(rope_theta=1e4, rope_scaling={}, rope_parameters=LLAMA3),
    "no scaling": dict(rope_theta=1e4, rope_scaling=None, rope_parameters=LLAMA3),
    "default with a factor": dict(rope_parameters=dict(rope_theta=1e4, rope_type="default", factor=8.0)),
    "default with all": dict(rope_theta=1e4, rope_scaling=LLAMA3 | dict(rope_type="default")),
    "default with nulls": dict(rope_theta=1e4, rope_scaling=dict(rope_type="default", factor=None)),
    "default with a neutral factor": dict(rope_theta=1e4, rope_scaling=dict(type="default", attention_factor=1.0)),
    "default with sections": dict(rope_theta=1e4, rope_scaling=dict(type="default", mrope_section=[4, 6, 6])),
    "a factor alone": dict(rope_parameters=dict(rope_theta=1e4, factor=2.0)),
    "llama3 with an attention factor": dict(rope_theta=1e4, rope_scaling=LLAMA3 | dict(attention_factor=1.0)),
    "linear by 1": dict(rope_theta=1e4, rope_scaling=dict(type="linear", factor=1.0)),
    "linear by a whole 1": dict(rope_parameters=dict(rope_theta=1e4, rope_type="linear", factor=1)),
    "yarn by 1": dict(rope_theta=1e4, rope_scaling=dict(type="yarn", factor=1.0, original_max_position_embeddings=256)),
    "the whole head": dict(rope_theta=1e4, partial_rotary_factor=1.0),
}  # fmt: skip


@pytest.mark.parametrize("fields", HONOURED.values(), ids=HONOURED)
def test_settings_are_read_as_transformers_reads_them(fields):
    config = with_rope(**fields)
    np.testing.assert_allclose(our_frequencies(config), their_frequencies(config), rtol=1e-6)


def test_the_length_at_the_top_matters_here():
    """Or the cases above would not notice that it is ignored."""
    one, other = (with_rope(**HONOURED[name]) for name in ("llama3, old", "length at the top too, scaling"))
    assert np.abs(their_frequencies(one) / their_frequencies(other) - 1).max() > 0.1


@pytest.mark.parametrize(
    "fields,said",
    [
        ("length at the top too, scaling", "64 at the top level and 32 in the rope settings; the first one counts"),
        ("default with a factor", "factor means nothing in rope settings of the type 'default'"),
        ("default with sections", "mrope_section means nothing"),
    ],
)
def test_what_is_chosen_or_ignored_is_said(fields, said, capsys):
    llama.from_hf_config(with_rope(**HONOURED[fields]))
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "fields", ["llama3, new", "default with a neutral factor", "linear by 1", "default with nulls"]
)
def test_what_changes_nothing_is_not_said(fields, capsys):
    llama.from_hf_config(with_rope(**HONOURED[fields]))
    assert capsys.readouterr().out == ""


NESTED = {"rope_theta": 1e4, "full_attention": {"rope_theta": 1e6, "rope_type": "default"}}


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(rope_theta=1e3, rope_parameters=dict(rope_theta=1e4)), "rope_theta is 10000.0 in one place and 1000.0"),
        (dict(rope_scaling=LLAMA3 | dict(rope_theta=1e3), rope_parameters=LLAMA3 | dict(rope_theta=1e4)), "keep one"),
        (dict(rope_theta=1e4, rope_scaling=LLAMA3, rope_parameters=LLAMA3 | dict(factor=4.0)), "do not say the same"),
        (dict(rope_theta=1e4, rope_scaling=WITHOUT_LENGTH), "'llama3' has no original_max_position_embeddings"),
        (dict(rope_theta=1e4, factor=8.0, rope_scaling=dict(type="llama3")), "'llama3' has no factor"),
        (dict(rope_theta=1e4, rope_scaling=dict(type="linear", factor=4.0)), "rope type 'linear' is not supported"),
        (dict(rope_theta=1e4, rope_scaling=dict(type="linear")), "rope type 'linear' is not supported"),
        (dict(rope_theta=1e4, rope_scaling=dict(type="yarn", factor=1.0, attention_factor=1.5)), "rope type 'yarn'"),
        (dict(rope_theta=1e4, rope_scaling=dict(type="dynamic", factor=2.0)), "rope type 'dynamic'"),
        (
            dict(rope_theta=1e4, rope_scaling=dict(type="linear", rope_type="default", factor=4.0)),
            "type do not say the",
        ),
        (dict(rope_theta=1e4, rope_scaling=dict(rope_type=None)), "rope type None is not a name"),
        (dict(rope_theta=1e4, partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(rope_theta=1e4, rope_scaling=dict(type="default", partial_rotary_factor=0.25)), "partial_rotary_factor"),
        (dict(rope_parameters=NESTED), "others for full_attention; one for all layers"),
        (dict(rope_theta=1e4, rope_scaling=LLAMA3, original_max_position_embeddings="64"), "= '64' is not a number"),
        (dict(), "base of the rotary embedding"),
    ],
)
def test_settings_that_are_not_clear_or_not_here_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        llama.from_hf_config(with_rope(**fields))
