"""What a recipe is checked for before anything is loaded."""

import jax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from configs import base, demo, dpo_gemma, dpo_gemma_lora, dpo_llama, dpo_smollm, judge_smollm, sft_smollm
from configs.replication import table
from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError
from jax_backtrack.hub import settings as model_settings
from jax_backtrack.utils.settings import check, check_recipe, settings
from tests import processes


def test_every_field_has_its_default():
    """And each default is a value that the field can have."""
    fields = flatten_dict(base.get_config().to_dict(), sep=".")
    assert fields == {name: setting.default for name, setting in settings().items()} and len(fields) > 90
    for name, setting in settings().items():
        setting.check(fields[name])
        shown = setting.documented_default
        spelt = repr(shown) if not isinstance(shown, str) else shown
        assert setting.parse(spelt) == shown, name


def test_every_field_is_known_without_our_recipes():
    """A recipe may come from JSON, or from a file that does not begin with ours."""
    count = (
        "import jax_backtrack.data.testbed; from jax_backtrack.utils.settings import settings; print(len(settings()))"
    )
    output, errors = processes.start("-c", count).communicate()
    assert output == f"{len(settings())}\n", errors


def test_our_recipes_can_be_meant():
    for recipe in (base, dpo_gemma, dpo_gemma_lora, dpo_llama, dpo_smollm, judge_smollm, sft_smollm):
        check(recipe.get_config())
    for recipe in (demo, table):
        check_recipe(recipe.get_config())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.steps", None, "train.steps is None; it must be a whole number"),
        ("train.steps", 2.0, "train.steps is 2.0; it must be a whole number"),
        ("train.steps", True, "train.steps is True; it must be a whole number"),
        ("train.steps", 10**30, "train.steps is 1000.*; it must be at most 2147483647"),
        ("train.steps", -1, "train.steps is -1; it must be at least 0"),
        ("train.learning_rate", float("nan"), "train.learning_rate is nan; it must be a finite number"),
        ("train.learning_rate", float("inf"), "train.learning_rate is inf; it must be a finite number"),
        ("train.learning_rate", 0, "train.learning_rate is 0; it must be above 0"),
        ("train.learning_rate", 10**400, "train.learning_rate is 1000.*; it must be a finite number"),
        ("sample.temperature", float("nan"), "sample.temperature is nan"),
        ("sample.temperature", "hot", "sample.temperature is 'hot'; it must be a finite number"),
        ("sample.top_p", 1.5, "sample.top_p is 1.5; it must be at most 1"),
        ("sample.reset_bias", float("-inf"), "sample.reset_bias is -inf; it must be a finite number"),
        ("data.backtrack", 1, "data.backtrack is 1; it must be True or False"),
        ("data.path", None, "data.path is None; it must be a text"),
        ("data.path", "a\0", "it must be a text"),
        ("model.path", "\udc00", "it must be a text"),
        ("objective", ["sft"], r"objective is \['sft'\]; it must be a text"),
        ("evaluate.prefill", (10, -1), "evaluate.prefill is .*; it must be a list of whole numbers above 0"),
        ("evaluate.harmful", "AdvBench", "evaluate.harmful is 'AdvBench'; it must be a list of texts"),
        ("evaluate.reset_biases", (float("nan"),), "it must be a list of finite numbers"),
    ],
)
def test_what_cannot_be_meant_is_named(field, value, message):
    config = flatten_dict(base.get_config().to_dict(), sep=".") | {field: value}
    with pytest.raises(InputError, match=message):
        check(nested(config))


def test_fields_that_are_lost_or_misspelt_are_named():
    fields = flatten_dict(base.get_config().to_dict(), sep=".")
    with pytest.raises(InputError, match=r"^train\.stepz: no such field; did you mean train\.steps\?$"):
        check(nested(fields | {"train.stepz": 1}))
    with pytest.raises(InputError, match=r"^train\.steps: the recipe has no such field; begin it with base"):
        check(nested({field: value for field, value in fields.items() if field != "train.steps"}))


def nested(fields: dict) -> ConfigDict:
    """A recipe of fields, as a file may make it that does not begin with ours."""
    return ConfigDict(unflatten_dict(fields, sep="."))


def test_bfloat16_is_refused_on_a_cpu_whose_jax_cannot_multiply_it(monkeypatch):
    config = base.get_config()
    config.model.compute_dtype = "bfloat16"
    monkeypatch.setattr(model_settings, "BFLOAT16_ON_CPU", jax.__version_info__)
    assert model_settings.compute(config, make_mesh()).dtype == "bfloat16"
    monkeypatch.setattr(model_settings, "BFLOAT16_ON_CPU", (*jax.__version_info__, 1))
    with pytest.raises(InputError, match=r"model.compute_dtype = 'bfloat16' on a CPU: jax .* does not multiply it"):
        model_settings.compute(config, make_mesh())
