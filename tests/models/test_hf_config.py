"""Configurations of Hugging Face: read as they are meant, written back, and refused by name."""

import shutil

import jax
import pytest
import transformers
from flax import nnx

from jax_backtrack.errors import InputError
from jax_backtrack.models import families
from jax_backtrack.models.families import gemma2, llama
from jax_backtrack.models.families.hf_config import read_rope
from jax_backtrack.models.transformer import Transformer
from tests import tiny
from tests.checkpoints import port, rewrite_config


@pytest.mark.parametrize(
    "shape,field,value,message",
    [
        ("Llama-3.1-8B", "attention_bias", True, "attention_bias = True"),
        ("Llama-3.1-8B", "mlp_bias", True, "mlp_bias = True"),
        ("Llama-3.1-8B", "hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("Llama-3.1-8B", "pretraining_tp", 2, "pretraining_tp = 2"),
        ("Llama-3.1-8B", "per_layer_config", {"0": {"rms_norm_eps": 0.5}}, "per_layer_config is not supported"),
        ("Llama-3.1-8B", "is_causal", False, "is_causal = False is not supported"),
        ("Llama-3.1-8B", "sliding_window", 8, "sliding_window = 8 is not supported in a Llama"),
        ("Llama-3.1-8B", "attention_chunk_size", 8, "attention_chunk_size = 8 is not supported in a Llama"),
        ("Llama-3.1-8B", "layer_types", ["sliding_attention"] * 3, "a Llama's layers are all of the type 'full_attent"),
        ("Llama-3.1-8B", "layer_types", 3, "layer_types = 3; a Llama's layers"),
        ("Gemma-2-2B", "per_layer_config", {"0": {"rms_norm_eps": 0.5}}, "per_layer_config is not supported"),
        ("Llama-3.1-8B", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "rope type 'yarn'"),
        ("Llama-3.1-8B", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "has no factor, low_freq"),
        ("Llama-3.1-8B", "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("Llama-3.1-8B", "rope_parameters", ..., "base of the rotary embedding"),
        ("Llama-3.1-8B", "hidden_size", ..., "'hidden_size' is missing"),
        ("Llama-3.1-8B", "rms_norm_eps", ..., "'rms_norm_eps' is missing"),
        ("Llama-3.1-8B", "model_type", [1], r"model_type \[1\] is not supported"),
        ("Llama-3.1-8B", "num_attention_heads", "8", "num_attention_heads = '8' is not a whole number above 0"),
        ("Llama-3.1-8B", "num_attention_heads", 0, "num_attention_heads = 0"),
        ("Llama-3.1-8B", "num_key_value_heads", 3, "8 attention heads do not divide by 3"),
        ("Llama-3.1-8B", "head_dim", 7, "head_dim = 7 is odd"),
        ("Llama-3.1-8B", "num_hidden_layers", 10**9, "num_hidden_layers = 1000000000 is more than"),
        ("Llama-3.1-8B", "num_hidden_layers", 9999, "says num_hidden_layers 9999; the weights have 30 tensors"),
        ("Llama-3.1-8B", "num_hidden_layers", 2.0, "num_hidden_layers = 2.0"),
        ("Llama-3.1-8B", "vocab_size", 10**9, "has shape"),
        ("Llama-3.1-8B", "vocab_size", 10**12, "vocab_size = 1000000000000 is more than 2147483647"),
        ("Llama-3.1-8B", "rope_parameters", {"rope_theta": 10**400}, "rope_theta = 1000.*is more than 1e"),
        ("Llama-3.1-8B", "rms_norm_eps", 1e300, r"rms_norm_eps = 1e\+300 is more than 1e"),
        ("Llama-3.1-8B", "rms_norm_eps", "1e-5", "rms_norm_eps = '1e-5' is not a number above 0"),
        ("Llama-3.1-8B", "tie_word_embeddings", "false", "tie_word_embeddings = 'false' is neither true nor false"),
        ("Llama-3.1-8B", "rope_scaling", {"rope_type": "linear", "factor": 8.0}, "rope type 'linear'"),
        ("Llama-3.1-8B", "rope_scaling", {"rope_type": "default", "rope_theta": 5e5}, "do not say the same: keep one"),
        ("Llama-3.1-8B", "rope_parameters", {"rope_theta": 1, "rope_type": "default", "type": "linear"}, "not say the"),
        ("Llama-3.1-8B", "rope_parameters", {"rope_theta": -1}, "rope_theta = -1"),
        ("Llama-3.1-8B", "rope_parameters", "linear", "the rope settings are 'linear'"),
        ("Gemma-2-2B", "num_hidden_layers", 0, "num_hidden_layers = 0"),
        ("Gemma-2-2B", "sliding_window", "4", "sliding_window = '4'"),
        ("Gemma-2-2B", "attn_logit_softcapping", 0, "attn_logit_softcapping = 0"),
        ("Gemma-2-2B", "query_pre_attn_scalar", -1, "query_pre_attn_scalar = -1"),
        ("Gemma-2-2B", "layer_types", [["a"], 1], "is not a list of names"),
        ("Gemma-2-2B", "hidden_activation", "relu", "hidden_activation = 'relu'"),
        ("Gemma-2-2B", "attention_bias", True, "attention_bias = True"),
        ("Gemma-2-2B", "tie_word_embeddings", 0, "tie_word_embeddings = 0 is neither true nor false"),
        ("Gemma-2-2B", "hidden_activation", "gelu", "hidden_activation = 'gelu'"),
        ("Gemma-2-2B", "use_bidirectional_attention", True, "use_bidirectional_attention"),
        ("Gemma-2-2B", "final_logit_softcapping", ..., "'final_logit_softcapping' is missing; write null"),
        ("Gemma-2-2B", "query_pre_attn_scalar", ..., "'query_pre_attn_scalar' is missing"),
        ("Gemma-2-2B", "sliding_window", None, "'sliding_window' is missing"),
        ("Gemma-2-2B", "layer_types", ["full_attention"], "1 entries for 4 layers"),
        ("Gemma-2-2B", "layer_types", ["chunked_attention"] * 4, "'chunked_attention'"),
    ],
)  # fmt: skip
def test_a_configuration_that_we_do_not_have_is_refused_by_name(written, tmp_path, shape, field, value, message):
    folder = shutil.copytree(written / shape, tmp_path / "model")
    rewrite_config(folder, **{field: value})
    with pytest.raises(InputError, match=message):
        port(folder)


@pytest.mark.parametrize(
    "model_type", "gemma gemma3 gemma3_text llama4 llama4_text qwen2 mistral mixtral phi3 Llama llama2 gemma-2".split()
)
def test_a_family_that_is_not_here_is_not_taken_for_another(written, tmp_path, model_type):
    folder = shutil.copytree(written / "Llama-3.1-8B", tmp_path / "model")
    rewrite_config(folder, model_type=model_type)
    with pytest.raises(InputError) as raised:
        port(folder)
    message = f"model_type {model_type!r} is not supported; known families are gemma2, llama. docs/FAMILIES.md says how"
    assert message in str(raised.value) and "did you mean" not in str(raised.value)


@pytest.mark.parametrize(
    "fields,said",
    [
        (dict(quant_method="bitsandbytes", load_in_4bit=True), r"\('bitsandbytes'\).*model\.dequantize\(\)"),
        (dict(load_in_8bit=True), r"\('bitsandbytes'\).*model\.dequantize\(\)"),
        (dict(quant_method="fp8"), r"\('fp8'\).*FineGrainedFP8Config\(dequantize=True\)"),
        (dict(quant_method="compressed-tensors"), r"CompressedTensorsConfig\(dequantize=True\)"),
        (
            dict(quant_method="gptq", bits=4),
            r"\('gptq'\).*made from, in 16 bits: transformers does not dequantise GPTQ",
        ),
        (dict(quant_method="awq"), r"\('awq'\).*made from, in 16 bits: transformers does not dequantise AWQ"),
        (dict(quant_method="new"), r"\('new'\).*Load the model that they were made from"),
        (dict(quant_algo="NVFP4"), r"\('NVFP4'\).*Load the model that they were made from"),
        (dict(quant_method=["x"]), r"Load the model that they were made from"),
        (True, r"\(True\).*Load the model that they were made from"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("field", ["quantization_config", "quantization"])
@pytest.mark.parametrize("family", [llama, gemma2])
def test_quantised_weights_are_refused_with_what_to_load(fields, said, field, family):
    config = family.to_hf_config(tiny.config(**(tiny.GEMMA2 if family is gemma2 else {})))
    with pytest.raises(InputError, match=f"{field}: the weights are quantised .*{said}"):
        families.from_hf_config(config | {field: fields})


@pytest.mark.parametrize("scaling", [None, read_rope({"rope_parameters": {
    "rope_type": "llama3", "rope_theta": 1.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192}})[1]], ids=["default", "llama3"])  # fmt: skip
def test_both_spellings_of_the_rope_settings_are_read(scaling):
    config = tiny.config(rope_scaling=scaling)
    both = llama.to_hf_config(config)
    old = {name: value for name, value in both.items() if name != "rope_parameters"}
    new = {name: value for name, value in both.items() if name not in ("rope_theta", "rope_scaling")}
    assert llama.from_hf_config(old) == llama.from_hf_config(new) == llama.from_hf_config(both) == config
    if scaling:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")  # as before transformers 4.43
        assert llama.from_hf_config(old) == config
    del old["rope_theta"]
    with pytest.raises(InputError, match="rope_theta"):
        llama.from_hf_config(old)


def published_gemma2(**fields) -> dict:
    """A configuration with the fields that the published Gemma-2 files have; no layer_types, no tie_word_embeddings."""
    return (
        dict(
            model_type="gemma2",
            attention_bias=False,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            max_position_embeddings=8192,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            sliding_window=4096,
            vocab_size=256000,
        )
        | fields
    )


@pytest.mark.parametrize(
    "fields,parameters",
    [
        (dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
              num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256), 2_614_341_888),
        (dict(hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
              num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256), 9_241_705_984),
        (dict(hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
              num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144), 27_227_128_320),
    ],
    ids=["2B", "9B", "27B"],
)  # fmt: skip
def test_the_published_gemma2_configurations(fields, parameters):
    """Local and global layers in pairs, local first; as many parameters as the published models have."""
    config = gemma2.from_hf_config(published_gemma2(**fields))
    assert config.windows == (4096, None)
    assert gemma2.from_hf_config(gemma2.to_hf_config(config)) == config
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters
    theirs = transformers.Gemma2Config(**gemma2.to_hf_config(config))
    assert theirs.layer_types == ["sliding_attention", "full_attention"] * (config.num_hidden_layers // 2)
    assert (theirs.final_logit_softcapping, theirs.rope_parameters["rope_theta"]) == (30.0, 10000.0)


def test_other_orders_of_local_and_global_layers_are_kept():
    fields = dict(hidden_size=24, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                  query_pre_attn_scalar=8, num_hidden_layers=6)  # fmt: skip
    local, full = "sliding_attention", "full_attention"
    for kinds, windows in (
        ([local, local, full] * 2, (4096, 4096, None)),
        ([full] * 6, (None,)),
        ([local] * 5 + [full], (4096,) * 5 + (None,)),
    ):
        assert gemma2.from_hf_config(published_gemma2(**fields, layer_types=kinds)).windows == windows
