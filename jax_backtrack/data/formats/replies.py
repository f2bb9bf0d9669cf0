"""Formats of rows that hold a reply and none that is worse: there is nothing to take back."""

from jax_backtrack.data.conversations import as_messages, as_prompt, as_reply, join, with_system
from jax_backtrack.data.formats.format import Format, Place, columns, field, flag, reply, text
from jax_backtrack.data.formats.pairs import instruction_messages
from jax_backtrack.data.preferences import BadRow, Preference, tidy


def _check_label(row: dict) -> None:
    """Refuses unwanted replies of unpaired preferences, TRL's and LLaMA-Factory's."""
    for name in LABELS:
        if row.get(name) is not None and not flag(row, name):
            raise BadRow("labelled as a reply that is not wanted, without one that is")


def _conversation(column: str):
    def read(row: dict, at: Place) -> Preference:
        _check_label(row)
        return reply(with_system(row.get("system"), as_messages(field(row, column), column)), at)

    return read


def _prompt_and(column: str):
    def read(row: dict, at: Place) -> Preference:
        _check_label(row)
        last = as_reply(field(row, column), column)
        return reply(join(with_system(row.get("system"), as_prompt(field(row, "prompt"), "prompt")), last), at)

    return read


def _alpaca(row: dict, at: Place) -> Preference:
    _check_label(row)
    return reply(join(instruction_messages(row), as_reply(text(row, "output"), "output")), at)


def _samples(row: dict, at: Place) -> Preference:
    """Reads a sample; a reply that ran out of room is used without an end of turn."""
    prompt = as_prompt(field(row, "prompt"), "prompt")
    last = {"role": "assistant", "content": tidy(text(row, "reply"))}
    return reply([*prompt, last], at, whole=field(row, "finish_reason") != "length")


LABELS = ("label", "kto_tag")  # of replies of which some are not wanted
_BESIDE = columns("system") | {*LABELS}

FORMATS = (
    Format(
        "samples",
        columns("prompt reply finish_reason"),
        columns("prefix drafts resets trace"),
        read=_samples,
        holds="the replies that `--mode=sample` leaves",
    ),
    Format(
        "alpaca",
        columns("instruction output"),
        columns("input history") | _BESIDE,
        read=_alpaca,
        holds="Alpaca: `instruction`, `input`, `output`",
    ),
    Format(
        "sharegpt",
        columns("conversations"),
        _BESIDE,
        read=_conversation("conversations"),
        holds="ShareGPT: `conversations` of `from` and `value`",
    ),
    Format(
        "sft",
        columns("messages"),
        _BESIDE,
        read=_conversation("messages"),
        holds="TRL's: `messages`, or `prompt` and `completion` (or `response`); a `label` that is false drops the row",
    ),
    Format("sft", columns("prompt completion"), _BESIDE, read=_prompt_and("completion")),
    Format("sft", columns("prompt response"), _BESIDE, read=_prompt_and("response")),
)
