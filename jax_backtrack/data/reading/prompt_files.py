"""Reads the rows of files of prompts: every row, or an error that names the first one that cannot be read."""

from pathlib import Path

from jax_backtrack.data.conversations import as_messages, is_written, with_system
from jax_backtrack.data.formats.pairs import instruction_messages
from jax_backtrack.data.preferences import BadRow, Report, is_blank
from jax_backtrack.data.reading.columns import lower_names
from jax_backtrack.data.reading.tables import parquet_objects
from jax_backtrack.data.reading.text_files import csv_objects, json_values, read_text, suffix
from jax_backtrack.errors import InputError
from jax_backtrack.tokenizer.chat_tokenizer import Message
from jax_backtrack.utils.unicode import is_unicode

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def prompt_rows(path: str) -> list[tuple[str, dict]]:
    """Returns the rows of a file of prompts with their places; a text alone becomes a row with `prompt`.

    A `.json` file holds a list of texts or objects, or an object with one under `instructions`. Column names are in
    lower case. Raises InputError for a row that is neither a text nor an object, and for a line that is broken.
    """
    file, report = Path(path).expanduser(), Report()
    kind = suffix(file)
    if kind not in SUFFIXES:
        raise InputError(f"{path}: a file of prompts ends in {', '.join(SUFFIXES)}, not in {kind!r}")
    try:
        is_file = file.is_file()
    except ValueError as error:  # a text that cannot be a path
        raise InputError(f"{path} cannot be read: {error}") from None
    if not is_file:
        raise InputError(f"{path} cannot be read: no such file")
    match kind:
        case ".txt":
            rows = _lines(file)
        case ".csv" | ".tsv":
            rows = list(csv_objects(file, report))
        case ".parquet":
            rows = list(parquet_objects(file))
        case _:
            rows = [entry for place, value in json_values(file, "train", report) for entry in _entries(place, value)]
    if report.dropped:
        reason = next(iter(report.first))
        raise InputError(f"{file.parent / report.first[reason]}: {reason}")
    return [(place, _row(place, row)) for place, row in ((str(file.parent / place), row) for place, row in rows)]


def _lines(file: Path) -> list[tuple[str, str]]:
    """Lines of a text file, without blank ones. They end in LF, CRLF or CR and nowhere else."""
    lines = read_text(file).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [(f"{file.name}, line {number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _entries(place: str, value):
    if isinstance(value, dict) and isinstance(value.get("instructions"), list):
        yield from ((f"{place}, instruction {number}", entry) for number, entry in enumerate(value["instructions"]))
    else:
        yield place, value


def _row(place: str, row) -> dict:
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, dict):
        raise InputError(f"{place} is neither a text nor an object")
    lower = lower_names(row)
    return {lower.get(name, name): value for name, value in row.items()}


def prompt_messages(place: str, field: str, row: dict) -> list[Message]:
    """Returns the messages of a row's prompt: a text is the user's, of several texts the first one is asked.

    Raises InputError, with the place, for what is empty, is no conversation, or ends with the assistant.
    """
    value = row[field]
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        if len(value) > 1 and field != "turns":
            raise InputError(f"{place}: the field {field!r} is a list of {len(value)} texts: one prompt a row")
        value = value[0]
    try:
        if field == "instruction":
            messages = instruction_messages(row)
        else:
            plain = isinstance(value, str) and not is_written(value)
            messages = [{"role": "user", "content": value}] if plain else as_messages(value, field)
            messages = with_system(row.get("system"), messages)
    except BadRow as reason:
        raise InputError(f"{place}: {reason}") from None
    if all(is_blank(message["content"]) for message in messages):
        raise InputError(f"{place}: the field {field!r} is empty")
    if empty := [n for n, m in enumerate(messages) if m["role"] != "system" and is_blank(m["content"])]:
        raise InputError(f"{place}: message {empty[0]} is empty")
    if messages[-1]["role"] == "assistant":
        raise InputError(
            f"{place}: the conversation ends with the assistant; how a reply begins belongs into the field 'prefix'"
        )
    if not all(is_unicode(message["content"]) for message in messages):
        raise InputError(f"{place}: a text is not valid Unicode: it holds half of a surrogate pair")
    return messages
