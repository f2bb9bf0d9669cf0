"""Recipes as files and as flags."""

import sys
from pathlib import Path

import jax
from absl import flags
from absl.testing import flagsaver
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import strategies as st
from ml_collections import ConfigDict

import main
from configs import base, dpo_gemma_lora, dpo_llama, sft_smollm
from jax_backtrack import cli
from jax_backtrack.backtracking.trees import TreeSpec
from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.training.settings import check_sizes, check_training, train_config
from tests.fuzz.odd import odd_values
from tests.fuzz.trials import Refused, fuzz

CONFIGS = Path(main.__file__).parent / "configs"
FIELDS = sorted(flatten_dict(base.get_config().to_dict(), sep="."))
RECIPES = {"sft_smollm.py": sft_smollm, "dpo_llama.py": dpo_llama, "dpo_gemma_lora.py": dpo_gemma_lora}
BASE = flatten_dict(base.get_config().to_dict(), sep=".")


def fitting(field: str):
    """Values of the field's own kind, most of which it may have."""
    match BASE[field]:
        case bool():
            return st.booleans()
        case int() | float() as number:
            return st.one_of(st.just(number), st.integers(1, 4).map(type(number)), st.just(type(number)(2 * number)))
        case str() as text:
            return st.sampled_from([text, "testbed", "float32", "bfloat16"])
        case entries:
            return st.sampled_from([entries, (), ("a", "b"), (1, 2)])


def values(field: str):
    return st.one_of(fitting(field), fitting(field), fitting(field), odd_values)


def check_all(config: ConfigDict) -> None:
    """What a training checks before it reads its data, and that what is made of the recipe then can be made."""
    check_training(config)
    mesh = make_mesh(**config.mesh)
    check_sizes(config, mesh)
    train_config(config, 3)
    weights = dict(reset_weight=config.train.reset_weight, initial_reply_weight=config.train.initial_reply_weight)
    TreeSpec(config.objective, config.data.backtrack, config.reset.mode, 3, **weights)
    jax.numpy.float32(config.sample.reset_bias), jax.numpy.int32(config.data.seed)


@st.composite
def changes(draw):
    """Fields of a recipe with other values; some of them misspelt."""
    fields = draw(st.lists(st.sampled_from(FIELDS), max_size=3, unique=True))
    return {draw(st.sampled_from([field] * 15 + [field + "s", field[:-1]])): draw(values(field)) for field in fields}


@fuzz(
    "recipes",
    name=st.sampled_from(list(RECIPES)),
    changed=changes(),
    lost=st.lists(st.sampled_from(FIELDS), max_size=1),
)
def test_recipes(name, changed, lost):
    """As a file can make them: it is a program that may leave out fields, add some, and set them to anything."""
    config = RECIPES[name].get_config()
    config.data.path = config.data.path or "data.jsonl"
    flat = flatten_dict(config.to_dict(), sep=".") | changed
    if lost and len(changed) == 3:
        del flat[next(iter(changed))]
    check_all(ConfigDict(unflatten_dict(flat, sep=".")))


def spelt(value) -> str:
    return str(value) if not isinstance(value, str) else value


@st.composite
def command_lines(draw):
    """Flags of main.py."""
    odd = st.one_of(
        odd_values.map(spelt),
        st.sampled_from(["(1,", "[[[", "(" * 200, "1e999", "0x10", "True", "'", "{}", "lambda: 0", "-", "9" * 5000]),
    )
    name = draw(st.sampled_from([*["sft_smollm.py"] * 12, "demo.py", "base.py", "no.py", "", "."]))
    given = [f"--config={name}", "--config.data.path=testbed"]
    for field in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        spelling = draw(
            st.sampled_from([field] * 15 + [field + "s", field.partition(".")[0], f"stages.SFT.{field}", ""])
        )
        given.append(f"--config.{spelling}={draw(st.one_of(*[fitting(field).map(spelt)] * 3, odd))}")
    if draw(st.booleans()):
        other = draw(st.sampled_from(["mode", "workdir", "process", "topology", "workdirs", "prompts", "wrkdir"]))
        given.append(f"--{other}={draw(st.one_of(odd, st.sampled_from(['train', '1', 'a,b'])))}")
    return given


@fuzz("command lines", arguments=command_lines())
def test_command_lines(arguments, monkeypatch):
    """What is refused ends in one line and exit code 2."""
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])  # which ml_collections reads
    with flagsaver.flagsaver():
        try:
            left = cli.parse_flags(cli.with_config_path(sys.argv, CONFIGS))
        except SystemExit as end:
            assert end.code == 2
            raise Refused from None
        assert len(left) == 1
        config = flags.FLAGS.config
        if "stages" not in config:
            check_all(config)
