"""Prompts from files, replies to files."""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jax_backtrack.errors import InputError
from jax_backtrack.hub.tokenizer import Message, check_messages
from jax_backtrack.journal import journal_of
from jax_backtrack.progress import console, progress_bar
from jax_backtrack.sampling.reply import Reply
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.workdir import write_whole

# Columns of a .csv file or fields of a .jsonl object that may hold the prompt, in this order.
_PROMPT_FIELDS = ("prompt", "goal", "prompts_final", "question")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, and how its reply begins where that is given."""

    prompt: str | Sequence[Message]
    prefix: str = ""


def read_prompts(path: str | None, limit: int | None = None) -> list[Asked]:
    """Prompts of a file, or of standard input (one a line) where `path` is None.

    `.txt` has one prompt a line; `.jsonl` objects with `prompt` (a text or a message list) and, if wanted, `prefix`;
    `.csv` a column `prompt`, `goal`, `prompts_final` or `question`.
    """
    if path is None:
        if sys.stdin.isatty():
            console.print("prompts, one a line, then Ctrl-D:")
        try:
            asked = [Asked(line.strip()) for line in sys.stdin if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"standard input cannot be read: {error}") from None
        where = "standard input"
    else:
        where = path
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise InputError(f"--prompts={path} cannot be read: {error}") from None
        reader = {".txt": _from_lines, ".jsonl": _from_jsonl, ".csv": _from_csv}.get(Path(path).suffix)
        if reader is None:
            raise InputError(f"--prompts={path}: the name must end in .txt, .jsonl or .csv")
        asked = reader(text, path)
    if not asked:
        raise InputError(f"no prompts in {where}")
    return asked[:limit]


def write_samples(sampler: Sampler, asked: Sequence[Asked], path: Path, seed: int, samples: int = 1) -> None:
    """Samples replies and writes them as JSON lines, `samples` per prompt, prompt after prompt.

    A line has prompt, prefix, reply, drafts, resets, finish, and where the sampler keeps them under `trace` the tokens'
    ids and log-probabilities.
    """
    wanted = [one for one in asked for _ in range(samples)]
    replaced = path.exists()
    with journal_of(path) as journal:
        with progress_bar("sampling", len(wanted)) as advance:
            replies = sampler(
                [one.prompt for one in asked],
                samples=samples,
                prefixes=[one.prefix for one in asked],
                seeds=range(seed, seed + len(wanted)),
                progress=advance,
                journal=journal,
            )
        lines = [json.dumps(_fields(*each), ensure_ascii=False) + "\n" for each in zip(wanted, replies, strict=True)]
        write_whole(path, "".join(lines))
    reset = sum(reply.resets > 0 for reply in replies)
    instead = " (instead of those that were there)" if replaced else ""
    shown = f"{len(replies)} replies in [bold]{path}[/]{instead}, {reset} of them after a reset"
    console.print(shown, highlight=False)
    console.print(f"compiled: {'; '.join(sampler.compiled)}", style="dim", highlight=False)


def _fields(asked: Asked, reply: Reply) -> dict:
    fields = {
        "prompt": asked.prompt,
        "prefix": asked.prefix,
        "reply": reply.text,
        "drafts": reply.drafts,
        "resets": reply.resets,
        "finish": reply.finish,
    }
    return fields | ({"trace": dataclasses.asdict(reply.trace)} if reply.trace else {})


def _from_lines(text: str, _path: str) -> list[Asked]:
    return [Asked(line.strip()) for line in text.split("\n") if line.strip()]


def _from_jsonl(text: str, path: str) -> list[Asked]:
    asked = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{where} is not a JSON object")
        prompt = row[_prompt_field(row, where)]
        if not isinstance(prompt, str):
            try:
                check_messages(prompt)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        prefix = row.get("prefix", "")
        if not isinstance(prefix, str):
            raise InputError(f"{where}: the prefix is not a text")
        asked.append(Asked(prompt, prefix))
    return asked


def _from_csv(text: str, path: str) -> list[Asked]:
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise InputError(f"{path} is not CSV: {error}") from None
    field = _prompt_field(rows[0], path) if rows else ""
    for number, row in enumerate(rows, start=1):
        if not (row[field] or "").strip():
            raise InputError(f"{path}, row {number}: the column {field!r} is empty")
    return [Asked(row[field]) for row in rows]


def _prompt_field(row: dict, where: str) -> str:
    for field in _PROMPT_FIELDS:
        if field in row:
            return field
    raise InputError(
        f"{where}: none of the fields {', '.join(_PROMPT_FIELDS)} is there, only {', '.join(map(str, row))}"
    )
