"""Recipes by name, in Python."""

import pytest

from configs import demo, sft_smollm
from configs.replication import table
from jax_backtrack.errors import InputError
from jax_backtrack.recipes import known_recipes, read_recipe
from jax_backtrack.utils.settings import check


@pytest.mark.parametrize(
    ("name", "module"), [("sft_smollm", sft_smollm), ("demo.py", demo), ("replication/table", table)]
)
def test_a_recipe_by_name_is_what_its_file_gives(name, module):
    assert read_recipe(name).to_dict() == module.get_config().to_dict()


def test_every_recipe_of_one_run_can_be_read_and_is_one():
    recipes = [read_recipe(name) for name in known_recipes()]
    alone = [config for config in recipes if "stages" not in config]
    assert len(alone) > 5
    for config in alone:
        check(config)


def test_a_recipe_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from configs import sft_smollm\ndef get_config():\n"
        "    config = sft_smollm.get_config()\n    config.train.steps = 7\n    return config\n"
    )
    assert read_recipe(str(tmp_path / "mine.py")).train.steps == 7
    monkeypatch.chdir(tmp_path)
    assert read_recipe("mine.py").train.steps == 7


@pytest.mark.parametrize(
    ("name", "problem"), [("sft_smolm", "did you mean 'sft_smollm.py'"), ("", "known are"), ("x" * 300, "no such file")]
)
def test_a_misspelt_recipe_names_the_nearest(name, problem):
    with pytest.raises(InputError, match=problem):
        read_recipe(name)


def test_a_file_that_is_no_recipe_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config():\n    return 7\n")
    with pytest.raises(InputError, match="gives 7, no ConfigDict"):
        read_recipe(str(tmp_path / "mine.py"))
