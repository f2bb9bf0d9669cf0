"""The project's Markdown files, read: links, anchors, names in backticks, code blocks, and the commands in them."""

import dataclasses
import itertools
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.processes import ROOT

FILES = [
    ROOT / "README.md",
    *(file for folder in ("docs", "notebooks") for file in sorted((ROOT / folder).rglob("*.md"))),
]
_PYTHON_FILE = re.compile(r"# (\w+\.py)\n")  # the first line of a block that is a file
_PROGRAMS = ("python", "python3", "python3.11", "jax-backtrack", "pip", "make", "gcloud", "hf")
_BESIDE = ("cd", ".", "[", "break")  # of a line with several commands, those that only prepare or end
_KEYWORDS = ("until", "do", "done")
_BETWEEN = ("&&", "||", ";", "|")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code. `language` is empty where it is indented; `file` is its name where its first line says one, as
    in `# mine.py`."""

    line: int
    language: str
    text: str
    file: str = ""


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a line: its words, variables that are set for it, and the file that it reads."""

    line: int
    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    reads: str = ""

    def __str__(self) -> str:
        return shlex.join(self.words)


def named(file: Path) -> str:
    """A file's name in messages."""
    return file.relative_to(ROOT).as_posix()


@cache
def parse(file: Path) -> list[Token]:
    """All tokens of a file, those within lines included."""
    tokens = []
    for token in MarkdownIt("commonmark").enable("table").parse(file.read_text()):
        tokens.append(token)
        for child in token.children or ():
            child.meta["line"] = token.map[0] + 1 if token.map else 0
            tokens.append(child)
    return tokens


def links(file: Path) -> Iterator[tuple[int, str]]:
    """Lines and targets of links and images."""
    for token in parse(file):
        target = token.attrGet({"link_open": "href", "image": "src"}.get(token.type, ""))
        if target:
            yield token.meta["line"], str(target)


def anchors(file: Path) -> set[str]:
    """What GitHub makes of the headings."""
    found: list[str] = []
    tokens = parse(file)
    for heading, inline in itertools.pairwise(tokens):
        if heading.type == "heading_open":
            text = "".join(part.content for part in inline.children or () if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


def names(file: Path) -> Iterator[tuple[int, str]]:
    """Lines and texts of code within lines."""
    for token in parse(file):
        if token.type == "code_inline":
            yield token.meta["line"], token.content


def blocks(file: Path) -> list[Block]:
    """All blocks of code, fenced and indented."""
    found = []
    for token in parse(file):
        if token.type in ("fence", "code_block"):
            made = _PYTHON_FILE.match(token.content) if token.info == "python" else None
            found.append(Block(token.map[0] + 1, token.info, token.content, made[1] if made else ""))
    return found


def table(file: Path, heading: str) -> Iterator[list[str]]:
    """Rows of all tables of a file whose first heading is this, as the texts of their cells."""
    cells: list[str] = []
    inside = False
    for before, token in itertools.pairwise(parse(file)):
        if token.type == "tr_open":
            cells = []
        elif token.type == "inline" and before.type in ("th_open", "td_open"):
            cells.append(token.content)
        elif token.type == "thead_close":
            inside = cells[0] == heading
        elif token.type == "tr_close" and inside and cells[0] != heading:
            yield cells


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block that is not Python. Lines that begin with no known program are output."""
    lines = enumerate(block.text.splitlines(), start=block.line)
    for number, line in lines:
        line = line.strip().removeprefix("$ ")
        first = next((word for word in line.split(" ") if "=" not in word and word not in _KEYWORDS), "")
        if first not in (*_PROGRAMS, *_BESIDE):
            continue
        while (words := _words(line)) is None:
            line = f"{line}\n{next(lines)[1]}"
        yield from _simple(number, words)


def _words(line: str) -> list[str] | None:
    """Words of a line; None where it goes on in the next one."""
    if line.endswith("\\"):
        return None
    lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # a quotation that is still open
        return None


def _simple(number: int, words: list[str]) -> Iterator[Command]:
    part: list[str] = []
    for word in [*words, ";"]:
        if word not in _BETWEEN:
            part.append(word)
            continue
        part = [word for word in part if word not in _KEYWORDS]
        environment = []
        while part and re.fullmatch(r"\w+=.*", part[0]):
            environment.append(tuple(part.pop(0).split("=", 1)))
        reads = ""
        if "<" in part:
            at = part.index("<")
            reads, part = part[at + 1], part[:at]
        if part and part[0] not in _BESIDE:
            assert part[0] in _PROGRAMS, f"line {number}: {part[0]} is no program that is known here"
            yield Command(number, tuple(part), tuple(environment), reads)
            for inner in part[1:]:  # what another machine is to run
                if inner.startswith("--command="):
                    yield from commands(Block(number, "", inner.removeprefix("--command=")))
        part = []
