"""Recipes compiled for TPUs that are not here. The model has the proportions of a real one, made small."""

import json
import math

import jax
import pytest

from configs import dpo_llama
from jax_backtrack import cli
from jax_backtrack.aot.hlo import HloProgram
from jax_backtrack.models.families.published import PUBLISHED
from jax_backtrack.models.flops import forward_flops
from jax_backtrack.models.transformer import TransformerConfig
from jax_backtrack.utils.workdir import COMPILED
from tests import tiny
from tests.conftest import missing_libtpu

pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

SMALL = dict(
    vocab_size=16384,
    hidden_size=512,
    intermediate_size=4096,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
)


@pytest.fixture(autouse=True)
def compiler():
    missing_libtpu()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration on disk; compiling needs neither weights nor tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = PUBLISHED["meta-llama/Meta-Llama-3-8B"] | SMALL
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", autouse=True)
def hasty():
    """The TPU compiler takes half the time, and optimizes less."""
    names = "jax_optimization_level", "jax_memory_fitting_level"
    levels = {name: getattr(jax.config, name) for name in names}
    for name in levels:
        jax.config.update(name, "O0")
    yield
    for name, level in levels.items():
        jax.config.update(name, level)


def recipe(folder, base=dpo_llama, **fields):
    config = base.get_config()
    config.update_from_flattened_dict(
        {
            "model.path": str(folder),
            "train.batch_size": 8,
            "train.max_seq_len": 512,
            "train.logits_chunk_size": 64,
            "sample.max_num_seqs": 8,
            "sample.max_new_tokens": 16,
        }
        | fields
    )
    return config


def run(config, workdir, *topologies) -> int:
    return cli.run("compile", config, str(workdir), topology=topologies)


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    missing_libtpu()
    workdir = tmp_path_factory.mktemp("compiled")
    assert run(recipe(folder), workdir, "v5e:2x2") == 0
    return workdir


@pytest.fixture(scope="module")
def compiled(workdir):
    return json.loads((workdir / COMPILED).read_text())


def test_a_compilation_says_what_each_program_needs(compiled):
    assert (compiled["chips"], compiled["hbm_bytes"], compiled["fits"]) == (4, 16 * 2**30, True)
    assert compiled["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert set(compiled["programs"]) == {"training step", "reference pass", "sampler", "sampler's prompts"}
    for each in compiled["programs"].values():
        assert 0 < each["argument_bytes"] <= each["peak_bytes"] < compiled["hbm_bytes"]
        assert each["collective_bytes"]["all-gather"] > 0
    assert 0 < compiled["mfu_bound"] < 1


def test_arguments_are_the_state_that_the_recipe_keeps(compiled):
    """float32 parameters and second moment, bfloat16 first moment: ten bytes a parameter, over four chips."""
    width, layers = SMALL["hidden_size"], SMALL["num_hidden_layers"]
    per_layer = 2 * width * 64 * (8 + 4) + 3 * width * SMALL["intermediate_size"] + 2 * width
    params = layers * per_layer + 2 * SMALL["vocab_size"] * width + width
    assert compiled["argument_bytes"] == pytest.approx(10 * params / 4, rel=0.02)


def test_recomputing_costs_at_most_a_third(compiled):
    assert 1 < compiled["hardware_flops"] / compiled["model_flops"] <= 1.35


def test_formulas_count_what_the_compiler_counts(compiled):
    """The reference pass recomputes nothing: all that it does beyond the formula is in whole blocks of attention."""
    each = compiled["programs"]["reference pass"]
    config = TransformerConfig(
        model_type="llama", rope_theta=5e5, rms_norm_eps=1e-5, tie_word_embeddings=False,
        max_position_embeddings=8192, query_pre_attn_scalar=64, **SMALL,
    )  # fmt: skip
    weights, attention = forward_flops(config, 8, 512)
    assert each["model_flops"] == weights + attention
    # In blocks of 256 a row of 512 has 3 of 4 blocks, where 1/2 of the pairs are visible.
    assert each["hardware_flops"] == pytest.approx(weights + 1.5 * attention, rel=0.01)


def test_the_sampler_does_what_the_formulas_count_and_sends_no_weights(compiled):
    for name in ("sampler", "sampler's prompts"):
        each = compiled["programs"][name]
        assert each["hardware_flops"] == pytest.approx(each["model_flops"], rel=0.15)
    sent = sum(compiled["programs"]["sampler"]["collective_bytes"].values()) / 16  # of one token for every row
    assert sent < compiled["programs"]["sampler"]["argument_bytes"] / 4


def test_the_compiled_step_holds_neither_all_logits_nor_all_parameters(folder, workdir):
    config = recipe(folder)
    program = HloProgram((workdir / "v5e-2x2-training-step.hlo.txt").read_text())
    rows, length, vocabulary = config.train.batch_size, config.train.max_seq_len, SMALL["vocab_size"]
    for _, shape in program.arrays():
        assert math.prod(shape) < rows * length * vocabulary / 4, shape
    largest_of_a_layer = SMALL["hidden_size"] * SMALL["intermediate_size"]
    gathered = [shape for each in program.instructions("all-gather") for _, shape in program.shapes(each)]
    assert gathered
    for shape in gathered:
        assert math.prod(shape) <= max(
            largest_of_a_layer, rows * config.train.logits_chunk_size * SMALL["hidden_size"]
        ), shape
    names = {name.partition(".")[0] for name in program.kernels()}
    assert names == {"tree_attention_forward", "tree_attention_backward_dq", "tree_attention_backward_dkv"}


def test_what_does_not_fit_comes_with_what_would(folder, tmp_path, capsys):
    """Activations of four layers without recomputation are too many; each change is compiled, not guessed."""
    fields = {"objective": "sft", "train.batch_size": 128, "train.remat": "none", "sample.max_new_tokens": 2}
    assert run(recipe(folder, **fields), tmp_path, "v5e:1x1") == 0
    made = json.loads((tmp_path / COMPILED).read_text())
    assert set(made["programs"]) == {"training step", "sampler", "sampler's prompts"}
    assert not made["fits"] and made["peak_bytes"] > made["hbm_bytes"]
    assert made["would_fit"][0]["changes"] == {"train.remat": "full"}
    assert made["would_fit"][-1]["fits"]
    assert "--config.train.remat=full" in capsys.readouterr().out


@pytest.mark.parametrize(
    "topologies,fields,message",
    [
        (("v9:4x4",), {}, "no chip 'v9'"),
        (("v5e:four",), {}, "want chips along each axis"),
        (("v5e:2x2",), {"train.batch_size": 6}, "train.batch_size / train.grad_accumulation_steps = 6 does not divide"),
        (
            ("v5e:2x2",),
            {"mesh.fsdp": 1, "mesh.tensor": 4, "sample.max_num_seqs": 2, "train.max_seq_len": 500},
            "blocks of",
        ),
        (("v5e:2x2*2",), {"mesh.data": 1, "mesh.fsdp": 8}, "mesh.data = 1 does not divide over 2 slices"),
        ((), {}, "--topology and --mode=compile go together"),
    ],
)
def test_what_cannot_be_compiled_is_said_before_anything_is_compiled(
    folder, tmp_path, capsys, topologies, fields, message
):
    assert run(recipe(folder, **fields), tmp_path, *topologies) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def test_compiling_leaves_jax_as_it_was(compiled):
    assert jax.devices()[0].platform == "cpu"
    assert tiny.model()(jax.numpy.ones((1, 4), jax.numpy.int32)).shape == (1, 4, tiny.VOCAB)
