"""The documents say what is there: links, names of files, fields of recipes, messages."""

import ast
import re
from pathlib import Path

import pytest

from jax_backtrack.data import sources
from tests import markdown
from tests.markdown import FILES, named
from tests.processes import ROOT
from tools import write_settings

PACKAGE = ROOT / "jax_backtrack"
_FOLDERS = ("tests/", "configs/", "jax_backtrack/", "benchmarks/", "docs/", "notebooks/", ".ci/")
_SHORTEST = 8  # letters that a text of the source must have to be told from others


@pytest.mark.parametrize("file", FILES, ids=named)
def test_links_lead_somewhere(file):
    for line, target in markdown.links(file):
        if re.match(r"[a-z]+:", target):  # elsewhere: no test asks the network
            continue
        path, _, anchor = target.partition("#")
        to = (file.parent / path).resolve() if path else file
        assert to.exists() and to.is_relative_to(ROOT), f"{named(file)}, line {line}: {target} is not there"
        if anchor:
            assert anchor in markdown.anchors(to), f"{named(file)}, line {line}: {target} has no such heading"


@pytest.mark.parametrize("file", FILES, ids=named)
def test_files_that_are_named_are_there(file):
    """In the repository, or, as documents shorten names, somewhere in the package; or the document shows the file."""
    shown = {block.file for block in markdown.blocks(file)}
    for line, name in markdown.names(file):
        where = f"{named(file)}, line {line}: `{name}` is not there"
        if name.startswith(_FOLDERS) and re.fullmatch(r"[\w./-]+", name):
            assert (ROOT / name).exists(), where
        elif re.fullmatch(r"[\w/]+\.py", name) and name not in shown:
            assert any(PACKAGE.rglob(name)) or any((ROOT / "configs").rglob(name)) or (ROOT / name).exists(), where


def test_every_document_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for _, target in markdown.links(index)}
    assert {file for file in FILES if file.parent == index.parent and file != index} <= linked
    assert index in {(ROOT / target).resolve() for _, target in markdown.links(ROOT / "README.md")}


def test_the_tables_of_fields_are_those_of_the_settings():
    """`python tools/write_settings.py` writes them."""
    assert write_settings.written(write_settings.DOCUMENT.read_text()) == write_settings.DOCUMENT.read_text()


def test_the_table_of_versions_has_the_bounds_of_the_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    bounds = [line.partition(",")[0].split(">=") for line in lines if not line.startswith("#")]
    assert [row[:2] for row in markdown.table(ROOT / "docs" / "INSTALL.md", "package")] == bounds


@pytest.mark.parametrize("file", [ROOT / "README.md", ROOT / "docs" / "DATA.md"], ids=named)
def test_rows_of_data_that_are_shown_are_used(file, tmp_path):
    shown = [block.text for block in markdown.blocks(file) if block.language == "json"]
    assert shown
    for number, text in enumerate(shown):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text)
        preferences, report = sources.read(str(path))
        assert preferences and not report.dropped, report.lines()


class Texts(ast.NodeVisitor):
    """Patterns of the texts in a source file; what is put into one may be anything."""

    def __init__(self, tree: ast.AST):
        self.patterns: list[str] = []
        self.visit(tree)

    def visit_Constant(self, node):
        self._add(node)

    def visit_JoinedStr(self, node):
        self._add(node)

    def visit_BinOp(self, node):
        if isinstance(node.op, ast.Add) and isinstance(node.left, (ast.Constant, ast.JoinedStr)):
            self._add(node.left, ".*")  # a list, joined
            self.visit(node.right)
        else:
            self.generic_visit(node)

    def _add(self, node, behind: str = "") -> None:
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        fixed = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        if sum(len(text) for text in fixed if isinstance(text, str)) >= _SHORTEST:
            self.patterns.append("".join(".*" if text is None else re.escape(str(text)) for text in fixed) + behind)


@pytest.fixture(scope="module")
def printed() -> list[re.Pattern]:
    """Patterns of all texts in the package."""
    files = PACKAGE.rglob("*.py")
    return [re.compile(text, re.DOTALL) for file in files for text in Texts(ast.parse(file.read_text())).patterns]


def messages(file: Path):
    """What a document says that the program prints: lines of blocks of text, and reasons to drop a row."""
    if file.name == "FAQ.md":
        for block in markdown.blocks(file):
            if block.language == "text":
                yield from re.sub(r"\n {4}", " ", block.text).splitlines()  # long ones go on, indented
    for row in markdown.table(file, "reason"):
        yield from re.findall("`(.+?)`", row[0])


@pytest.mark.parametrize("file", [ROOT / "docs" / name for name in ("FAQ.md", "DATA.md")], ids=named)
def test_messages_are_those_of_the_program(file, printed):
    said = list(messages(file))
    assert len(said) > 15
    for message in said:
        text = message.removeprefix("error: ")
        assert any(pattern.fullmatch(text) for pattern in printed), f"{file.name}: {message}"


def test_no_pattern_matches_whatever_it_is_given(printed):
    """Or the test before could not fail."""
    assert not any(
        pattern.fullmatch("tulips: they are 3 in all, 'and' not 4; so (first: red) 1.0") for pattern in printed
    )
