"""Reads preference and SFT data, in TRL's formats and those of HH-RLHF and OASST, by local path or Hub id.

| format       | columns                                                                              |
|--------------|--------------------------------------------------------------------------------------|
| `preference` | `chosen`, `rejected` (texts or message lists), `prompt` (a text or a message list)   |
| `sft`        | `prompt`, `completion` (texts or message lists), or `messages`                       |
| `hh`         | `chosen`, `rejected`: transcripts with "Human:" and "Assistant:" turns               |
| `samples`    | `prompt`, `reply`, `finish`: what `--mode=sample` leaves, as utility data            |
| `oasst`      | `message_id`, `parent_id`, `role`, `text`, `lang`, `rank`: one message a row         |

`prompt` may be missing where the replies begin with it: as messages, or as texts, of which it is then all words that
both begin with. Where prompt and replies both say it, it counts once. A row of `sft` or `samples` has a reply and none
that is worse, so there is nothing to take back. Of `messages` the last one is the reply, earlier ones are its prompt.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator

from jax_backtrack.data import testbed
from jax_backtrack.data.files import rows
from jax_backtrack.data.preferences import BadRow, Preference, Report
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.hub.tokenizer import Message, check_messages

FORMATS = ("preference", "sft", "samples", "hh", "oasst")
TESTBED = "testbed"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def read(
    path: str,
    *,
    utility: bool = False,
    split: str = "train",
    format: str | None = None,
    limit: int | None = None,
) -> tuple[list[Preference], Report]:
    """Reads up to `limit` preferences and the account of what was dropped.

    path:    a `.jsonl`, `.json` (both with or without `.gz`) or `.parquet` file, a folder of `datasets.save_to_disk`, a
             Hub id (`owner/name` or `owner/name:folder`), or "testbed"
    utility: the rejected replies are worse, not unsafe; nothing of them is to be taken back
    split:   of a Hub data set, of a folder that has several, or of the testbed
    format:  one of FORMATS; read off the columns of the first row if None
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"data format {format!r}: {nearest(format, FORMATS)}")
    if path == TESTBED:
        preferences = [question.preference() for question in testbed.questions(split, limit or 1000)]
        if utility:
            preferences = [dataclasses.replace(preference, backtracks=False) for preference in preferences]
        return preferences, Report(used=len(preferences))
    report = Report()
    preferences = []
    for origin, made in _preferences(rows(path, split, report), path, format, utility, report):
        try:
            preferences.append(made())
        except BadRow as reason:
            report.drop(str(reason), origin)
        if len(preferences) == limit:
            break
    report.used = len(preferences)
    if not preferences:
        raise InputError(f"{path} gives no usable row: " + "; ".join(report.lines()))
    return preferences, report


def _preferences(rows, path: str, format: str | None, utility: bool, report: Report):
    """Pairs of a row's name and a function that makes its Preference or raises BadRow."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path} has no rows that are JSON objects: " + "; ".join(report.lines()))
    format = format or _detect(first[1], path)
    rows = _chain(first, rows)
    if format == "oasst":
        yield from _oasst(rows, report)
        return
    make = {"hh": _from_hh, "sft": _from_sft, "samples": _from_samples, "preference": _from_preference}[format]
    for origin, row in rows:
        yield origin, lambda row=row, origin=origin: make(row, not utility, origin)


def _chain(first, rest) -> Iterator:
    yield first
    yield from rest


def _detect(row: dict, path: str) -> str:
    if {"message_id", "parent_id", "role", "text"} <= row.keys():
        return "oasst"
    if {"chosen", "rejected"} <= row.keys():
        transcript = isinstance(row["chosen"], str) and _HH_TURN.match(row["chosen"])
        return "hh" if transcript and "prompt" not in row else "preference"
    if "messages" in row or {"prompt", "completion"} <= row.keys():
        return "sft"
    if {"prompt", "reply", "finish"} <= row.keys():
        return "samples"
    raise InputError(
        f"{path}: the columns {', '.join(sorted(row))} are none of a known format. "
        "Needed are prompt, chosen, rejected; or messages; or prompt, completion; or prompt, reply, finish; "
        "or the columns of HH-RLHF or OASST"
    )


# ----------------------------------------------------------------------------------------------------- HH-RLHF


def _from_hh(row: dict, backtracks: bool, origin: str) -> Preference:
    chosen, rejected = (_transcript(_field(row, field)) for field in ("chosen", "rejected"))
    return _from_conversations(chosen, rejected, backtracks, origin)


def _transcript(text) -> list[Message]:
    if not isinstance(text, str):
        raise BadRow("a transcript is not a text")
    before, *turns = _HH_TURN.split(text)
    if before.strip() or not turns:
        raise BadRow("a transcript does not begin with a turn")
    messages = [
        {"role": _HH_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    if any(not message["content"] for message in messages[:-1]):
        raise BadRow("a turn of the prompt is empty")
    return messages


# ------------------------------------------------------------------------------------------- preference files


def _from_preference(row: dict, backtracks: bool, origin: str) -> Preference:
    chosen, rejected = _as_messages(row, "chosen"), _as_messages(row, "rejected")
    if row.get("prompt") is None:
        if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
            return _from_texts(row["chosen"], row["rejected"], backtracks, origin)
        return _from_conversations(chosen, rejected, backtracks, origin)
    prompt = _as_prompt(row["prompt"])
    if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        return _from_conversations(chosen, rejected, backtracks, origin)
    return _from_conversations([*prompt, *chosen], [*prompt, *rejected], backtracks, origin)


def _from_texts(chosen: str, rejected: str, backtracks: bool, origin: str) -> Preference:
    """Of two texts that begin with their prompt: it is all words that both begin with."""
    alike = itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    prompt = re.match(r"(.*\s)?", "".join(letter for letter, _ in alike), re.DOTALL)[0]
    if not prompt.strip():
        raise BadRow("the field 'prompt' is missing")
    question = {"role": "user", "content": prompt.strip()}
    replies = ({"role": "assistant", "content": text[len(prompt) :]} for text in (chosen, rejected))
    return _from_conversations(*([question, reply] for reply in replies), backtracks, origin)


def _from_sft(row: dict, _backtracks: bool, origin: str) -> Preference:
    if row.get("label") is False:  # TRL's unpaired preferences have replies of both kinds
        raise BadRow("labelled as a reply that is not wanted, without one that is")
    messages = _checked(row["messages"], "messages") if row.get("messages") is not None else None
    if messages is None:
        reply, prompt = _as_messages(row, "completion"), _field(row, "prompt")
        messages = [*_as_prompt(prompt), *reply]
    _check_conversation(messages)
    return Preference(tuple(messages[:-1]), messages[-1]["content"].strip(), None, backtracks=False, origin=origin)


def _from_samples(row: dict, _backtracks: bool, origin: str) -> Preference:
    """A reply that ran out of room is used without an end of turn."""
    prompt, reply = _as_prompt(_field(row, "prompt")), _field(row, "reply")
    if not isinstance(reply, str):
        raise BadRow("the field 'reply' is not a text")
    _check_conversation([*prompt, {"role": "assistant", "content": reply}])
    whole = _field(row, "finish") != "length"
    return Preference(tuple(prompt), reply.strip(), None, backtracks=False, origin=origin, whole=whole)


def _as_prompt(prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _checked(prompt, "prompt")


def _as_messages(row: dict, field: str) -> list[Message]:
    value = _field(row, field)
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else _checked(value, field)


def _checked(messages, field: str) -> list[Message]:
    try:
        check_messages(messages)
    except InputError:
        raise BadRow(f"the field {field!r} is neither a text nor a list of messages") from None
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _field(row: dict, field: str):
    if row.get(field) is None:
        raise BadRow(f"the field {field!r} is missing")
    return row[field]


def _from_conversations(chosen: list[Message], rejected: list[Message], backtracks: bool, origin: str) -> Preference:
    for conversation in (chosen, rejected):
        _check_conversation(conversation)
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected answer different prompts")
    return Preference(
        prompt=tuple(chosen[:-1]),
        chosen=chosen[-1]["content"].strip(),
        rejected=rejected[-1]["content"].strip(),
        backtracks=backtracks,
        origin=origin,
    )


def _check_conversation(messages: list[Message]) -> None:
    if messages[-1]["role"] != "assistant":
        raise BadRow("a conversation does not end with the assistant")
    if not any(message["content"].strip() for message in messages[:-1]):
        raise BadRow("the prompt is empty")


# ------------------------------------------------------------------------------------------------------- OASST


def _oasst(rows: Iterable[tuple[str, dict]], report: Report):
    """First questions in English with their replies by rank: the best is chosen, the worst of several is rejected."""
    questions, replies = [], collections.defaultdict(list)
    for origin, row in rows:
        if not all(isinstance(row.get(field), str) for field in ("message_id", "role", "text")):
            report.drop("a message without message_id, role or text", origin)
        elif not isinstance(row.get("parent_id"), (str, type(None))):
            report.drop("a parent_id is not a text", origin)
        elif row.get("deleted"):
            report.drop("a deleted message", origin)
        elif row.get("lang") != "en":
            report.drop("not English", origin)
        elif row.get("parent_id") is None:
            questions.append((origin, row))
        else:
            replies[row["parent_id"]].append(row)
    first_questions = {row["message_id"] for _, row in questions}
    later = sum(len(messages) for parent, messages in replies.items() if parent not in first_questions)
    if later:
        report.dropped["a later turn of a conversation"] += later
        report.first.setdefault("a later turn of a conversation", "-")
    for origin, question in questions:
        yield (
            origin,
            lambda question=question, origin=origin: _best_and_worst(question, replies[question["message_id"]], origin),
        )


def _best_and_worst(question: dict, replies: list[dict], origin: str) -> Preference:
    if not replies:
        raise BadRow("a question without a reply")
    ranks = [reply["rank"] for reply in replies if reply.get("rank") is not None]
    if not all(isinstance(rank, (int, float)) and rank == rank for rank in ranks):  # NaN does not equal itself
        raise BadRow("a rank is not a number")
    ranked = sorted((reply for reply in replies if reply.get("rank") is not None), key=lambda reply: reply["rank"])
    if len(replies) > 1 and not ranked:
        raise BadRow("replies without ranks")
    best = ranked[0] if ranked else replies[0]
    return Preference(
        prompt=({"role": "user", "content": question["text"]},),
        chosen=best["text"].strip(),
        rejected=ranked[-1]["text"].strip() if len(ranked) > 1 else None,
        backtracks=False,
        origin=origin,
    )
