"""The recipes' programs as they are lowered for a GPU that need not be there: nothing in them is for another device."""

import json
import re

import jax
import pytest

from configs import dpo_gemma, dpo_llama, sft_llama
from jax_backtrack.aot.compile import compiler_only, devices, programs
from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError
from jax_backtrack.hub.settings import best_dtype, compute
from jax_backtrack.models.attention.tree_attention import KINDS
from jax_backtrack.models.families.published import PUBLISHED
from tests.conftest import missing_libtpu
from tests.published_models import SMALL, config_of

LLAMA, GEMMA = "meta-llama/Meta-Llama-3-8B", "google/gemma-2-2b"
RECIPES = [(LLAMA, sft_llama), (LLAMA, dpo_llama), (GEMMA, dpo_gemma)]
mesh = make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture(scope="module", params=RECIPES, ids=lambda pair: pair[1].__name__)
def lowered(request, tmp_path_factory) -> dict[str, tuple[str, int]]:
    """Of every program of a recipe, for one GPU: its text, and how many arrays of a state it takes."""
    name, recipe = request.param
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name] | SMALL))
    made = {}
    for program, trace in programs(config_of(recipe, folder), mesh, platform="gpu").items():
        for_cuda = trace().lower(lowering_platforms=("cuda",))
        made[program] = for_cuda.as_text(), sum(each.donated for each in jax.tree.leaves(for_cuda.args_info))
    return made


def test_nothing_is_for_another_device(lowered):
    for program, (text, _) in lowered.items():
        assert not re.search(r"tpu_custom_call|LayoutConstraint", text), program


def test_no_branch_depends_on_data(lowered):
    for program, (text, _) in lowered.items():
        assert not re.search(r"stablehlo\.(case|if)\b", text), program


def test_no_loop_but_the_samplers_own_ends_by_data(lowered):
    for program, (text, _) in lowered.items():
        conditions = re.findall(r"^ *cond \{\n(.*?)^ *\} do \{", text, re.DOTALL | re.MULTILINE)
        assert conditions and len(conditions) == text.count("stablehlo.while"), program
        counted = [
            set(re.findall(r"stablehlo\.(\w+)", each)) <= {"constant", "compare", "return"} for each in conditions
        ]
        assert counted.count(False) == (program == "sampler"), program


def test_states_are_overwritten_where_they_lie(lowered):
    for program, (text, states) in lowered.items():
        assert (states > 0) == (program in ("training step", "sampler")), program
        assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == states, program


def test_products_are_of_bfloat16_but_for_the_gradients_of_scores(lowered):
    for program, (text, _) in lowered.items():
        products = re.findall(r"stablehlo\.dot_general .* : \(tensor<([^>]*)>, tensor<([^>]*)>\)", text)
        float32 = [scores for scores, _ in products if not scores.endswith("xbf16")]
        assert len(products) > len(float32) and all(map(is_gradient_of_scores, float32)), (program, float32)
        assert not float32 or program == "training step"


def is_gradient_of_scores(shape: str) -> bool:
    """Of one chunk: rows, key-value heads, queries, query heads of one, keys."""
    return re.fullmatch(r"2x2x512x2x(512|1024)xf32", shape) is not None


def test_another_device_has_what_is_not_to_be_there(tmp_path):
    """So what was looked for above can be found."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[LLAMA] | SMALL))
    step = programs(config_of(dpo_llama, tmp_path), mesh, platform="cpu")["training step"]
    assert "stablehlo.case" in step().lower().as_text()
    missing_libtpu()
    with compiler_only():
        chip = make_mesh(1, 1, 1, devices("v5e:1x1"))
        made = programs(config_of(dpo_llama, tmp_path, **{"mesh.data": 1, "mesh.fsdp": 1}), chip)
        assert "tpu_custom_call" in made["training step"]().lower().as_text()
        assert "LayoutConstraint" in made["sampler"]().lower().as_text()


def test_each_kind_of_device_has_its_attention_and_its_dtype(tmp_path):
    config = config_of(dpo_llama, tmp_path)
    made = {platform: compute(config, mesh, platform) for platform in ("cpu", "gpu", "tpu")}
    chosen = {platform: (each.attention, each.dtype, each.skip_unscored) for platform, each in made.items()}
    assert chosen == {
        "cpu": ("blockwise", "float32", True),
        "gpu": ("chunked", "bfloat16", False),
        "tpu": ("pallas", "bfloat16", True),
    }
    assert [best_dtype("gpu", capability) for capability in ("7.5", "8.0", "10.0", "gfx90a")] == [
        "float32", *["bfloat16"] * 3
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_kernel_is_refused_on_a_gpu(kind, tmp_path):
    config = config_of(dpo_llama, tmp_path, **{"model.attention": kind})
    if kind == "pallas":
        with pytest.raises(
            InputError, match=r"model\.attention = 'pallas' is for TPUs, and this is a GPU: choose 'chunked'"
        ):
            compute(config, mesh, "gpu")
    else:
        assert compute(config, mesh, "gpu").attention == kind
