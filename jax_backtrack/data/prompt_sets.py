"""Prompt sets: what a model is asked, by the set's name, by Hub id or from a file."""

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path

from jax_backtrack.data.reading.prompt_files import prompt_messages, prompt_rows
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.tokenizer.chat_tokenizer import Message


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt of a set.

    target: how a reply that complies might begin; empty where the set has none
    value:  text by which replies are judged exactly: one that holds it gives what was asked for; empty where there is
            none
    """

    messages: tuple[Message, ...]
    target: str = ""
    value: str = ""

    def with_suffix(self, suffix: str) -> "Question":
        """Returns the question with something more after its last message."""
        *earlier, last = self.messages
        return self._with((*earlier, last | {"content": last["content"].strip() + suffix}))

    def with_system(self, text: str) -> "Question":
        """Returns the question under a system message that says this, after what it says already."""
        if self.messages[0]["role"] != "system":
            return self._with(({"role": "system", "content": text}, *self.messages))
        first, *rest = self.messages
        return self._with((first | {"content": f"{first['content']}\n\n{text}"}, *rest))

    def contains_value(self, reply: str) -> bool:
        """Returns whether a reply gives the value.

        Case and punctuation do not matter, nor does what stands between digits if it is no letter. A longer number or
        word that merely contains the value does not count; numbers beside the value take nothing away.
        """
        words = (re.sub(r"(?<=\d)(?=\d)", r"[\\W_]*", word) for word in self.value.lower().split())
        spelt = r"[\W_]+".join(words)
        return re.search(rf"(?<![^\W_]){spelt}(?![^\W_])", reply.lower()) is not None

    def _with(self, messages: tuple[Message, ...]) -> "Question":
        return dataclasses.replace(self, messages=messages)


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Questions that should be declined (`harmful`), or answered."""

    name: str
    harmful: bool
    questions: tuple[Question, ...]

    def of(self, questions: Iterable[Question]) -> "PromptSet":
        """Returns the set with other questions."""
        return dataclasses.replace(self, questions=tuple(questions))


@dataclasses.dataclass(frozen=True)
class Published:
    """Where a set can be had: a Hub id with its configuration and split, or, without an id, what to do instead."""

    hub: str
    split: str = "train"
    configuration: str | None = None
    instead: str = ""


PUBLISHED = {
    "AdvBench": Published("walledai/AdvBench"),
    "MaliciousInstructions": Published(
        "", instead="I-MaliciousInstructions.json of github.com/vinid/safety-tuned-llamas, with its path"
    ),
    "SimpleSafetyTests": Published("Bertievidgen/SimpleSafetyTests", split="test"),
    "StrongREJECT": Published("walledai/StrongREJECT"),
    "HarmBench": Published("walledai/HarmBench", configuration="standard"),
    "XSTest": Published("walledai/XSTest", split="test"),
    "OASST": Published("OpenAssistant/oasst2", split="validation"),
    "MT-Bench": Published("HuggingFaceH4/mt_bench_prompts"),
}

# Columns that may hold the prompt, in this order. The last three are lists: messages, or turns of which the first one
# is asked.
_PROMPTS = ("prompt", "goal", "prompts_final", "forbidden_prompt", "instruction", "question", "turns", "messages")
_TARGET, _LABEL = "target", "label"
_OASST = {"message_id", "parent_id", "role", "text"}


def read(
    entry: str, harmful: bool, limit: int | None = None, *, may_be_empty: bool = False
) -> tuple[str, list[Question]]:
    """Returns the name of a set and its questions, in their order, up to `limit`.

    entry:   a name of PUBLISHED, a Hub id, a file (`prompt_files.SUFFIXES`), or "NAME=FILE"
    harmful: of a set with a column `label`, the rows "unsafe"; else those "safe". A set without one is all of one kind

    Raises InputError for what is not to be had, and for the first row without a prompt, with its place.
    """
    name, path = _split_entry(entry)
    if not name:
        name = path if path in PUBLISHED else Path(path).stem
    questions = []
    for place, row in _of_kind(_hub_rows(path) if _is_published(path) else prompt_rows(path), harmful):
        questions.append(_question(place, row))
        if len(questions) == limit:
            break
    if not questions and not may_be_empty:
        raise InputError(f"{entry} has no {'harmful' if harmful else 'harmless'} prompts")
    return name, questions


def _split_entry(entry: str) -> tuple[str, str]:
    """Returns name and path of an entry, split at the first "=" behind which a file is; the name may be empty."""
    splits = [("", entry)] + [(entry[: at.start()], entry[at.end() :].strip()) for at in re.finditer("=", entry)]
    files = [(name, path) for name, path in splits if os.path.isfile(path)]
    return (files or splits[1:] or splits)[0]


def _is_published(path: str) -> bool:
    if path in PUBLISHED:
        return True
    if os.path.isfile(path):  # where a text cannot be a path, Path.is_file raises
        return False
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).suffix:
        return True
    raise InputError(f"prompt set {path!r} is no file here, no Hub id, and no known set: {nearest(path, PUBLISHED)}")


def _hub_rows(path: str) -> Iterable[tuple[str, dict]]:
    import datasets  # takes a second, which runs without it should not cost

    at = PUBLISHED.get(path, Published(path))
    if not at.hub:
        raise InputError(f"{path} is not on the Hub: get {at.instead}, as {path}=FILE")
    try:
        rows = datasets.load_dataset(at.hub, at.configuration, split=at.split)
    except Exception as error:
        raise InputError(f"{path}: the Hub does not give {at.hub}: {error}. A file does too: {path}=FILE") from error
    return ((f"{at.hub}, row {number}", row) for number, row in enumerate(rows))


def _of_kind(rows: Iterable[tuple[str, dict]], harmful: bool) -> Iterable[tuple[str, dict]]:
    """Rows of the wanted kind with their places; of OASST's messages, the first ones of conversations in English."""
    for place, row in rows:
        if row.keys() >= _OASST:
            if row["parent_id"] is None and row.get("lang") == "en" and not row.get("deleted"):
                yield place, {"prompt": row["text"]}
        elif row.get(_LABEL) in ("safe", "unsafe"):
            if (row[_LABEL] == "unsafe") == harmful:
                yield place, row
        else:
            yield place, row


def _question(place: str, row: dict) -> Question:
    field = next((field for field in _PROMPTS if row.get(field)), None)
    if field is None:
        raise InputError(f"{place}: none of {', '.join(_PROMPTS)} has a prompt; there are {', '.join(map(str, row))}")
    messages = prompt_messages(place, field, row)
    if isinstance(row[field], str):
        messages[-1]["content"] = messages[-1]["content"].strip()
    target = row.get(_TARGET) or ""
    if not isinstance(target, str):
        raise InputError(f"{place}: the target is not a text")
    return Question(tuple(messages), target.strip())
