"""Prompts from files, replies to files."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from jax_backtrack.data.reading.columns import filled_columns
from jax_backtrack.data.reading.prompt_files import prompt_messages, prompt_rows
from jax_backtrack.errors import InputError
from jax_backtrack.sampling.replies import Reply
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.tokenizer.chat_tokenizer import Message
from jax_backtrack.utils.console import bold, console, progress_bar
from jax_backtrack.utils.json_text import to_json
from jax_backtrack.utils.resume_cache import resume_cache_of
from jax_backtrack.utils.workdir import atomic_write

# Columns that may hold the prompt, in this order. The last one is a list of messages.
PROMPT_FIELDS = ("prompt", "goal", "prompts_final", "question", "instruction", "messages")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt, and how its reply begins where that is given."""

    prompt: str | Sequence[Message]
    prefix: str = ""


def read_prompts(path: str | None, limit: int | None = None) -> list[Asked]:
    """Reads the prompts of a file, or of standard input (one a line) where `path` is None.

    `.txt` has one prompt a line; other files (`prompt_files.SUFFIXES`) have rows with a prompt in the first of the
    columns PROMPT_FIELDS that is there, a text or a list of messages, and if wanted `prefix`. Columns that are not read
    are said. Raises InputError for the first row without a prompt.
    """
    if path is None:
        if sys.stdin.isatty():
            console.print("prompts, one a line, then Ctrl-D:")
        try:
            requests = [Asked(line.strip()) for line in sys.stdin if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"standard input cannot be read: {error}") from None
    else:
        try:
            rows = prompt_rows(path)
        except InputError as error:
            raise InputError(f"--prompts={error}") from None
        requests = [_asked(place, row) for place, row in rows]
        _say_unread(path, rows)
    if not requests:
        raise InputError(f"no prompts in {path or 'standard input'}")
    return requests[:limit]


def write_samples(sampler: Sampler, requests: Sequence[Asked], path: Path) -> None:
    """Samples replies and writes them as JSON lines, `sampler.params.n` per prompt, prompt after prompt.

    A line has prompt, prefix, reply, drafts, resets, finish_reason, and where the sampler keeps them under `trace` the
    tokens' ids and log-probabilities.
    """
    of_replies = [request for request in requests for _ in range(sampler.params.n)]
    replaced = path.exists()
    with resume_cache_of(path) as resume_cache:
        with progress_bar("sampling", len(of_replies)) as advance:
            replies = sampler(
                [request.prompt for request in requests],
                prefills=[request.prefix for request in requests],
                progress=advance,
                resume_cache=resume_cache,
            )
        lines = [to_json(_fields(*line)) + "\n" for line in zip(of_replies, replies, strict=True)]
        atomic_write(path, "".join(lines))
    reset = sum(reply.resets > 0 for reply in replies)
    instead = " (instead of those that were there)" if replaced else ""
    shown = f"{len(replies)} replies in {bold(path)}{instead}, {reset} of them after a reset"
    console.print(shown, highlight=False)
    console.print(f"compiled: {'; '.join(sampler.compiled)}", style="dim", highlight=False)


def _fields(request: Asked, reply: Reply) -> dict:
    fields = {
        "prompt": request.prompt,
        "prefix": request.prefix,
        "reply": reply.text,
        "drafts": reply.drafts,
        "resets": reply.resets,
        "finish_reason": reply.finish_reason,
    }
    return fields | ({"trace": reply.trace} if reply.trace else {})


def _asked(place: str, row: dict) -> Asked:
    field = _prompt_field(place, row)
    messages = prompt_messages(place, field, row)
    prefix = row.get("prefix") or ""
    if not isinstance(prefix, str):
        raise InputError(f"{place}: the prefix is not a text")
    alone = len(messages) == 1 and isinstance(row[field], str)
    return Asked(messages[0]["content"] if alone else messages, prefix)


def _prompt_field(place: str, row: dict) -> str:
    for field in PROMPT_FIELDS:
        if row.get(field) is not None:
            return field
    shown = ", ".join(map(str, row))
    raise InputError(f"{place}: none of the fields {', '.join(PROMPT_FIELDS)} has a prompt, of {shown}")


def _say_unread(path: str, rows: Sequence[tuple[str, dict]]) -> None:
    """Says which columns of a file hold something that is not read."""
    unread = set()
    for place, row in rows:
        known_columns = {_prompt_field(place, row), "prefix", "system"}
        known_columns |= {"input", "history"} if "instruction" in known_columns else set()
        unread |= filled_columns([row]) - known_columns
    if unread:
        shown = f"{path}: columns that are not read: {', '.join(sorted(map(str, unread)))}"
        console.print(shown, style="dim", highlight=False, markup=False)
