"""The rooms of the package: each imports those above it and never those below; none grows past what is read at once."""

import ast
import itertools
import re
from pathlib import Path

from tests.processes import ROOT

PACKAGE = ROOT / "jax_backtrack"
# From the bottom of the building to its roof: a room may import those that stand before it.
ROOMS = """
    errors utils distributed backtracking models tokenizer hub data training sampling evaluation experiments aot serving
    integrations recipes cli main
""".split()
OUTSIDE = {"__init__", "hub/custom_generate"}  # the public names, and a file that goes into exports
MOST_FILES = 12
MOST_LINES = 450


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Every room that a module imports anything from, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {parts[1] for parts in (name.split(".") for name in names) if parts[0] == PACKAGE.name and parts[1:]}
    return found


def modules() -> list[Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    inside = [path for path in paths if not any(f"{PACKAGE}/{name}" in str(path) for name in OUTSIDE)]
    assert len(inside) > 100
    return inside


def test_every_room_has_its_place():
    assert {room(path) for path in modules()} == set(ROOMS)


def test_imports_go_one_way():
    wrong = [
        f"{path.relative_to(ROOT)} imports {imported}"
        for path in modules()
        for imported in imported_rooms(path)
        if ROOMS.index(imported) > ROOMS.index(room(path))
    ]
    assert not wrong


def test_tests_lie_as_what_they_test_does():
    """Those of the whole program lie in `tests` itself; what several share, fixtures or not, is in no test module."""
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= {*ROOMS, "fuzz", "gpu"}
    found = re.compile(r"^ *(?:from tests\.(?:\w+\.)?test_|from tests\.?\w* import test_)", re.MULTILINE)
    assert not [str(path) for path in (ROOT / "tests").rglob("*.py") if found.search(path.read_text())]


def test_a_folder_can_be_taken_in_at_a_glance():
    by_folder = itertools.groupby(modules(), key=lambda path: path.parent)
    counts = {folder: len([path for path in paths if path.stem != "__init__"]) for folder, paths in by_folder}
    assert not {str(folder): count for folder, count in counts.items() if count > MOST_FILES}


def test_every_axis_letter_is_in_the_glossary():
    """Names such as `query_BxTxNxD` have letters for axes, which the docstring of `models` lists."""
    glossary = (PACKAGE / "models/__init__.py").read_text()
    listed = {letter for entry in re.findall(r"((?:[A-Z], )*[A-Z])  ", glossary) for letter in entry.split(", ")}
    names = (node for path in modules() for node in ast.walk(ast.parse(path.read_text())))
    texts = (getattr(node, "id", getattr(node, "arg", getattr(node, "attr", ""))) or "" for node in names)
    used = {
        letter for text in texts if (axes := re.search(r"_([A-Z1](x[A-Z1])*)$", text)) for letter in axes[1].split("x")
    }
    assert used - {"1"} == listed


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in modules()}
    assert not {str(path): length for path, length in lengths.items() if length > MOST_LINES}
