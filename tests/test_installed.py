"""The package as pip installs it: everything is in the wheel, and the command runs far from the repository."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jax_backtrack.hub.export import save
from tests import tiny
from tests.processes import ROOT, start

READ_ONLY = Path("/proc")  # to root too
pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def run(*command, **settings) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def is_source(path: Path) -> bool:
    return path.is_file() and path.suffix != ".pyc"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy: what an earlier build left in the repository would get in, and a build leaves something again."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("jax_backtrack", "configs"):
        shutil.copytree(ROOT / folder, source / folder)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """Built from a source distribution, and so from what that carries."""
    built = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", f"--outdir={built}", source)
    (made,) = built.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory) -> Path:
    """A folder of site-packages with this package alone, by `pip install .`; all others are those of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    run(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", f"--target={folder}", ".", cwd=source)
    return folder


def command(installed: Path, cwd: Path, *arguments) -> str:
    """Output of the installed `jax-backtrack`, which sees the repository neither as its folder nor on its path."""
    process = start(
        installed / "bin" / "jax-backtrack",
        *arguments,
        cwd=cwd,
        stderr=subprocess.STDOUT,
        PYTHONPATH=os.pathsep.join([str(ROOT / "tests" / "without_torch"), str(installed)]),
        COLUMNS="400",
    )
    output = process.communicate()[0]
    assert "Traceback" not in output, output
    return output


def test_every_file_of_the_package_and_every_recipe_is_in_the_wheel(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jax_backtrack").rglob("*") if is_source(path)}
    recipes = {f"jax_backtrack/shipped/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert inside == package | recipes


def test_pip_installs_what_is_in_the_wheel(wheel, installed):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (path for path in (installed / "jax_backtrack").rglob("*") if is_source(path))
    assert {path.relative_to(installed).as_posix() for path in files} == inside
    assert {path.name for path in installed.iterdir() if ".dist-info" not in path.name} == {"bin", "jax_backtrack"}


def test_requirements_are_those_of_the_requirements_files(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (metadata,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        lines = opened.read(metadata).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    wanted = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    for name in ("cuda12", "cuda13", "lm-eval", "wandb", "web"):
        extra = (ROOT / f"requirements-{name}.txt").read_text().splitlines()
        wanted += [f'{line}; extra == "{name}"' for line in extra if not line.startswith("#")]
    assert list(map(Requirement, required)) == list(map(Requirement, wanted))


def test_the_command_says_what_it_takes(installed, tmp_path):
    output = command(installed, tmp_path, "--help")
    assert all(f"--{flag}" in output for flag in ("config", "workdir", "mode", "prompts", "topology", "coordinator"))


def test_a_mistake_is_named_in_one_line(installed, tmp_path):
    assert "did you mean 'sft_smollm.py'?" in command(installed, tmp_path, "--config=sft_smolm.py")
    refused = command(installed, tmp_path, "--config=dpo_llama.py", "--mode=compile")
    assert refused.strip() == "error: --topology and --mode=compile go together: --mode=compile --topology=v5e:4x4"


def test_the_command_trains_by_a_shipped_recipe_and_by_one_of_ours(installed, tmp_path, short_tokenizer):
    """In a folder with programs of the same names. What it leaves has the files that the package carries as data."""
    (tmp_path / "configs").mkdir()
    for name in ("configs/__init__.py", "configs/sft_smollm.py", "main.py", "jax_backtrack.py"):
        (tmp_path / name).write_text("raise RuntimeError('somebody else')\n")
    save(tiny.model(vocab_size=tiny.SHORT, max_position_embeddings=512), short_tokenizer, tmp_path / "base")
    mine = """
        from configs import sft_smollm

        def get_config():
            config = sft_smollm.get_config()
            config.data.path, config.data.limit = "testbed", 8
            config.train.steps, config.train.max_seq_len, config.train.batch_size = 1, 256, 2
            config.train.checkpoint_every_steps = 0
            config.model.path, config.model.chat_template = "base", "chatml"
            return config
    """
    (tmp_path / "mine.py").write_text("\n".join(line.removeprefix(" " * 8) for line in mine.splitlines()))
    trained = command(installed, tmp_path, "--config=mine.py", "--workdir=mine")
    assert "model in mine/export" in trained
    assert json.loads((tmp_path / "mine" / "metrics.jsonl").read_text())["step"] == 1
    assert (tmp_path / "mine" / "export" / "custom_generate" / "generate.py").is_file()

    (tmp_path / "prompts.txt").write_text("Where is Paris?\n")
    flags = (f"--workdir={tmp_path / 'mine'}", "--mode=sample", f"--prompts={tmp_path / 'prompts.txt'}")
    sampled = command(installed, READ_ONLY, "--config=dpo_smollm.py", *flags, "--config.sample.max_new_tokens=4")
    assert "1 replies" in sampled


def test_the_repository_is_not_what_is_imported(installed, tmp_path):
    found = run(
        sys.executable,
        "-c",
        "from importlib.util import find_spec; print(find_spec('jax_backtrack').origin)",
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
    )
    assert Path(found.strip()) == installed / "jax_backtrack" / "__init__.py"
