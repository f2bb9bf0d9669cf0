"""SmolLM2's real weights: the same as in transformers on real text, from gguf and from our export."""

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import jax_backtrack
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.judges.pairwise import PairwiseJudge, question
from jax_backtrack.evaluation.win_rate import win_rate
from jax_backtrack.hub.load import load
from jax_backtrack.models.families import llama
from jax_backtrack.models.transformer import Transformer
from tests.checkpoints import torch_logits


@pytest.fixture(scope="module")
def smollm(smollm_gguf):
    return load(smollm_gguf)


@pytest.fixture(scope="module")
def exported(smollm, tmp_path_factory):
    """Our export of it, read by transformers, and its tokenizer there."""
    jax_backtrack.save(*smollm, folder := tmp_path_factory.mktemp("exported") / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_logits_equal_transformers_on_real_text(smollm, exported, smollm_gguf, shared):
    """Within 1e-3 on 512 tokens, argmax equal everywhere; by our export and by transformers' own reader."""
    model, tokenizer = smollm
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 134_515_008
    tokens = tokenizer.encode((shared / "METHOD.md").read_text())[None, :512]
    assert tokens.shape == (1, 512)
    ours = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, tokens))
    folder, file = smollm_gguf.parent, smollm_gguf.name
    for theirs in (
        exported[0],
        transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32),
    ):
        expected = torch_logits(theirs, tokens)
        assert np.abs(ours - expected).max() < 1e-3
        assert (ours.argmax(-1) == expected.argmax(-1)).all()


def test_a_judge_of_pairs_weighs_both_letters_as_transformers_does(smollm, exported):
    """In both orders, and with the replies exchanged all is turned round."""
    judge = PairwiseJudge(*smollm, name="SmolLM2", rows=4)
    prompts = [[{"role": "user", "content": text}] for text in ("What is the capital of France?", "Name a colour.")]
    ours, others = ["Paris.", "Green, like grass in spring."], ["I like trains.", "Seven."]
    found, turned = win_rate(judge, prompts, ours, others), win_rate(judge, prompts, others, ours)
    theirs, hf = exported
    for number, (prompt, one, other) in enumerate(zip(prompts, ours, others, strict=True)):
        for place, pair in enumerate([(one, other), (other, one)]):
            asked = [{"role": "user", "content": question(prompt, *pair)}]
            ids = hf.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
            logits = torch_logits(theirs, np.array([ids]))[0, -1]
            chance = jax.nn.softmax(logits[[hf.encode(letter)[0] for letter in "AB"]])[place]
            assert found.chances[number][place] == pytest.approx(float(chance), abs=1e-3)
    assert (turned.wins, turned.losses) == (found.losses, found.wins)
    np.testing.assert_allclose(turned.chances, 1 - np.array(found.chances)[:, ::-1], atol=1e-5)
    assert len(set(np.round(found.chances, 3).flat)) == 4


def test_it_knows_the_capital_of_france(smollm):
    model, tokenizer = smollm
    logits = model(tokenizer.encode("The capital of France is")[None])
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


def test_gguf_configuration_is_that_of_the_export(smollm_file):
    config = llama.from_hf_config(smollm_file.hf_config())
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (30, 576, 9)
    assert (config.num_key_value_heads, config.intermediate_size, config.vocab_size) == (3, 1536, 49152)
    assert config.tie_word_embeddings and config.rope_theta == 1e5
    assert isinstance(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))), Transformer)


def test_parameters_are_no_view_of_a_gguf_file(smollm_file):
    """What is not quantised is mapped as it stands; JAX would take the mapping itself for the parameter."""
    weight = smollm_file.read("model.norm.weight", (slice(0, 576),))
    assert weight.flags.owndata and weight.flags.writeable


def test_a_file_that_is_no_gguf_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(InputError, match="cannot be read as gguf"):
        load(str(tmp_path / "x.gguf"))
