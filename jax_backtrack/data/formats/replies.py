"""Formats of rows that hold a reply and none that is worse: there is nothing to take back."""

from jax_backtrack.data.conversations import as_messages, as_prompt, as_reply, join, tidy, with_system
from jax_backtrack.data.formats.format import Format, Place, columns, field, flag, reply, text
from jax_backtrack.data.formats.pairs import instruction_messages
from jax_backtrack.data.preferences import BadRow, Preference


def _check_label(row: dict) -> None:
    """TRL's unpaired preferences have replies of both kinds."""
    if row.get("label") is not None and not flag(row, "label"):
        raise BadRow("labelled as a reply that is not wanted, without one that is")


def _sft(row: dict, at: Place) -> Preference:
    """A conversation, or a prompt and the reply to it."""
    _check_label(row)
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return reply(with_system(row.get("system"), as_messages(row[column], column)), at)
    column = "response" if "response" in row and row.get("completion") is None else "completion"
    last = as_reply(field(row, column), column)
    return reply(join(with_system(row.get("system"), as_prompt(field(row, "prompt"), "prompt")), last), at)


def _alpaca(row: dict, at: Place) -> Preference:
    return reply(join(instruction_messages(row), as_reply(text(row, "output"), "output")), at)


def _samples(row: dict, at: Place) -> Preference:
    """A reply that ran out of room is used without an end of turn."""
    prompt = as_prompt(field(row, "prompt"), "prompt")
    last = {"role": "assistant", "content": tidy(text(row, "reply"))}
    return reply([*prompt, last], at, whole=field(row, "finish") != "length")


_SFT = columns("messages conversations prompt completion response system label")

FORMATS = (
    Format(
        "samples",
        columns("prompt reply finish"),
        columns("prefix drafts resets trace"),
        read=_samples,
        holds="the replies that `--mode=sample` leaves",
    ),
    Format(
        "alpaca",
        columns("instruction output"),
        columns("input system history"),
        read=_alpaca,
        holds="Alpaca: `instruction`, `input`, `output`",
    ),
    Format(
        "sharegpt",
        columns("conversations"),
        _SFT,
        read=_sft,
        holds="ShareGPT: `conversations` of `from` and `value`",
    ),
    Format(
        "sft",
        columns("messages"),
        _SFT,
        read=_sft,
        holds="TRL's: `messages`, or `prompt` and `completion` (or `response`); a `label` that is false drops the row",
    ),
    Format("sft", columns("prompt completion"), _SFT, read=_sft),
    Format("sft", columns("prompt response"), _SFT, read=_sft),
)
