"""Parity of the Llama port with transformers: random tiny checkpoints, and SmolLM2's real weights on real text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import jax_backtrack
from jax_backtrack.errors import InputError
from jax_backtrack.hub import weights
from jax_backtrack.hub.gguf import GGUFFile
from jax_backtrack.hub.load import load
from jax_backtrack.models import llama
from jax_backtrack.models.transformer import Transformer
from tests import tiny


def torch_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.float().numpy()


@pytest.fixture
def tiny_folder(tmp_path, reset_tokenizer):
    """A function that writes a random Llama checkpoint by transformers, and gives the folder and the model."""

    def write(**changes):
        torch.manual_seed(0)
        fields = dict(
            vocab_size=49152,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            rope_theta=5e4,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(fields | changes)))
        model.save_pretrained(tmp_path / "tiny")
        reset_tokenizer.hf.save_pretrained(tmp_path / "tiny")
        return tmp_path / "tiny", model

    return write


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 6}, {"num_key_value_heads": 1}, {"head_dim": 32}],
    ids=str,
)
def test_logits_equal_transformers(tiny_folder, changes):
    folder, theirs = tiny_folder(**changes)
    ours, _ = load(str(folder))
    tokens = np.random.default_rng(0).integers(0, 49152, (2, 50), dtype=np.int32)
    expected = torch_logits(theirs, tokens)
    np.testing.assert_allclose(ours(tokens), expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_gradients_equal_transformers(tiny_folder):
    folder, theirs = tiny_folder()
    ours, _ = load(str(folder))
    tokens = np.random.default_rng(0).integers(0, 49152, (2, 20), dtype=np.int32)
    theirs(torch.tensor(tokens), labels=torch.tensor(tokens).long()).loss.backward()
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    graph, params = nnx.split(ours)

    def loss(params):
        log_p = jax.nn.log_softmax(nnx.merge(graph, params)(tokens))[:, :-1]
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    nnx.update(ours, jax.grad(loss)(params))
    weights.save(ours, folder)
    gradient = weights.SafetensorsFolder(folder)
    for name, value in expected.items():
        np.testing.assert_allclose(gradient.tensor(name), value, atol=1e-4 * np.abs(value).max(), rtol=0, err_msg=name)


def test_saved_model_is_the_same_to_transformers_and_to_us(tiny_folder, tmp_path):
    folder, theirs = tiny_folder()
    ours, tokenizer = load(str(folder))
    jax_backtrack.save(ours, tokenizer, tmp_path / "out")
    again, _ = load(str(tmp_path / "out"))
    for one, other in zip(*(jax.tree.leaves(nnx.state(model)) for model in (ours, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    reloaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for (name, one), (_, other) in zip(theirs.named_parameters(), reloaded.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_saving_refuses_to_overwrite(tiny_folder, tmp_path):
    ours, tokenizer = load(str(tiny_folder()[0]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(InputError, match="would be overwritten"):
        jax_backtrack.save(ours, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()


def test_remat_changes_nothing(tiny_folder):
    folder, _ = tiny_folder()
    tokens = np.arange(40, dtype=np.int32)[None]

    def gradient(remat):
        model, _ = load(str(folder), remat=remat)
        graph, params = nnx.split(model)
        return jax.jit(jax.grad(lambda params: (nnx.merge(graph, params)(tokens) ** 2).mean()))(params)

    for one, other in zip(*(jax.tree.leaves(gradient(remat)) for remat in (False, True)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def real_tokens(shared, tokenizer) -> np.ndarray:
    text = (shared / "METHOD.md").read_text()
    return tokenizer.encode(text)[None, :512]


def test_smollm2_equals_transformers_on_real_text(smollm_gguf, shared, tmp_path, tokenizer):
    """Logits within 1e-3 on 512 tokens, argmax equal everywhere; by our export and by transformers' own reader."""
    model, loaded_tokenizer = load(smollm_gguf)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 134_515_008
    tokens = real_tokens(shared, tokenizer)
    assert tokens.shape == (1, 512)
    ours = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, tokens))
    jax_backtrack.save(model, loaded_tokenizer, tmp_path / "out")
    folder, file = smollm_gguf.parent, smollm_gguf.name
    for theirs in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32),
        transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32),
    ):
        expected = torch_logits(theirs, tokens)
        assert np.abs(ours - expected).max() < 1e-3
        assert (ours.argmax(-1) == expected.argmax(-1)).all()


def test_smollm2_knows_the_capital_of_france(smollm_gguf):
    model, tokenizer = load(smollm_gguf)
    logits = model(tokenizer.encode("The capital of France is")[None])
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


@pytest.fixture
def tensors(tiny_folder):
    folder, _ = tiny_folder()
    source = weights.SafetensorsFolder(folder)
    return folder, {name: source.tensor(name) for name in source.tensor_names()}


def rewrite(folder, tensors):
    weights.save_file(tensors, folder / weights.SINGLE_FILE, metadata={"format": "pt"})


def test_a_missing_tensor_is_named(tensors):
    folder, tensors = tensors
    del tensors["model.layers.1.mlp.up_proj.weight"]
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=r"1 tensors are missing.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(folder))


def test_an_extra_tensor_is_named(tensors):
    folder, tensors = tensors
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=r"no place in the model: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(str(folder))


def test_a_misshapen_tensor_is_named(tensors):
    folder, tensors = tensors
    tensors["model.norm.weight"] = np.zeros(47, np.float32)
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=r"model\.norm\.weight has shape \(47,\).*\(48,\)"):
        load(str(folder))


def test_a_truncated_file_is_named(tensors):
    folder, _ = tensors
    file = folder / weights.SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        load(str(folder))


def test_pickled_weights_are_refused(tensors):
    folder, _ = tensors
    (folder / weights.SINGLE_FILE).rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="never loaded"):
        load(str(folder))


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("attention_bias", True, "attention_bias"),
        ("hidden_act", "gelu", "hidden_act"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "yarn"),
        ("model_type", "mistral", "mistral"),
        ("hidden_size", None, "hidden_size"),
    ],
)
def test_a_configuration_that_we_do_not_have_is_refused_by_name(tensors, field, value, message):
    folder, _ = tensors
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    if value is None:
        del config[field]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load(str(folder))


def test_both_spellings_of_the_rope_settings_are_read():
    old = llama.to_hf_config(tiny.config())
    new = dict(old)
    del old["rope_parameters"], new["rope_theta"]
    assert llama.from_hf_config(old) == llama.from_hf_config(new) == tiny.config()
    del old["rope_theta"]
    with pytest.raises(InputError, match="rope_theta"):
        llama.from_hf_config(old)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_folder):
    folder, _ = tiny_folder(vocab_size=49000)
    with pytest.raises(InputError, match="ids up to 49151, the embedding has 49000 rows"):
        load(str(folder))


@pytest.mark.parametrize("path", ["./nothing", "nothing", "/nothing/at/all", "no/such.gguf"])
def test_a_path_to_nothing_is_named(path):
    with pytest.raises(InputError, match="no such file"):
        load(path)


def test_a_file_that_is_no_gguf_is_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(InputError, match="cannot be read as gguf"):
        load(str(tmp_path / "x.gguf"))


def test_gguf_configuration_is_that_of_the_export(smollm_gguf):
    config = llama.from_hf_config(GGUFFile(smollm_gguf).hf_config())
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (30, 576, 9)
    assert (config.num_key_value_heads, config.intermediate_size, config.vocab_size) == (3, 1536, 49152)
    assert config.tie_word_embeddings and config.rope_theta == 1e5
    assert isinstance(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))), Transformer)
