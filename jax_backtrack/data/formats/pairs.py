"""Formats of rows that hold a chosen and a rejected reply."""

import itertools

from jax_backtrack.data.conversations import as_messages, as_prompt, as_reply, is_written, join, with_system
from jax_backtrack.data.formats.format import Format, Place, columns, field, pair, text
from jax_backtrack.data.preferences import BadRow, Preference, is_blank
from jax_backtrack.data.transcripts import holds_marks, is_rendered, is_transcript, transcript
from jax_backtrack.tokenizer.chat_tokenizer import Message

# A prompt that both replies begin with ends with one of these; else it is not known where it does.
_PROMPT_ENDS = tuple(".?!:;…。？！：；\"'”’)]\n")


def replies_to(row: dict, prompt: list[Message], chosen: str, rejected: str, at: Place) -> Preference:
    """Returns the preference of two columns of a row that hold the replies to a prompt."""
    replies = (as_reply(field(row, column), column) for column in (chosen, rejected))
    return pair(*(join(prompt, reply) for reply in replies), at)


# ------------------------------------------------------------------------------------------------------- TRL's


def _preference(row: dict, at: Place) -> Preference:
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if row.get("prompt") is not None:
        return replies_to(row, _with_system(row, as_prompt(row["prompt"], "prompt")), "chosen", "rejected", at)
    if is_transcript(chosen) or is_transcript(rejected):
        return pair(*(_with_system(row, transcript(text)) for text in (chosen, rejected)), at)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRow("the field 'prompt' is missing")
    return pair(*(_with_system(row, as_reply(row[name], name)) for name in ("chosen", "rejected")), at)


def _without_prompt(row: dict, at: Place) -> Preference:
    """Reads replies that begin with their prompt."""
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    plain = all(
        isinstance(text, str) and not is_transcript(text) and not is_written(text) for text in (chosen, rejected)
    )
    return _common_prompt(row, chosen, rejected, at) if plain else _preference(row, at)


def _with_system(row: dict, prompt: list[Message]) -> list[Message]:
    return with_system(row.get("system"), prompt)


def _common_prompt(row: dict, chosen: str, rejected: str, at: Place) -> Preference:
    """Reads two texts that begin with the prompt: it ends where TRL's `extract_prompt` ends it, before the first letter
    that differs and the space before that."""
    alike = itertools.takewhile(lambda letters: letters[0] == letters[1], zip(chosen, rejected, strict=False))
    prompt = "".join(letter for letter, _ in alike).removesuffix(" ")
    if is_blank(prompt):
        raise BadRow("the field 'prompt' is missing")
    if is_rendered(prompt) or holds_marks(prompt):
        raise BadRow("the field 'prompt' is missing, and the replies hold a conversation that was rendered already")
    if not prompt.endswith(_PROMPT_ENDS):
        raise BadRow(
            "the field 'prompt' is missing, and the replies begin alike, so where the prompt ends is not known"
        )
    question = _with_system(row, [{"role": "user", "content": prompt}])
    return pair(*([*question, *as_reply(text[len(prompt) :], "chosen")] for text in (chosen, rejected)), at)


def _are_transcripts(rows: list[dict]) -> bool:
    """Returns whether most of the rows hold transcripts, as replies or as prompts."""
    transcripts = [
        is_transcript(row["chosen"] if row.get("prompt") is None else row["prompt"])
        for row in rows
        if row.get("chosen") is not None
    ]
    return 2 * sum(transcripts) > len(transcripts)


# ----------------------------------------------------------------------------------------- with other prompts


def _orca(column: str):
    def read(row: dict, at: Place) -> Preference:
        return replies_to(row, _with_system(row, as_prompt(field(row, column), column)), "chosen", "rejected", at)

    return read


def instruction_messages(row: dict) -> list[Message]:
    """Returns the prompt of a row in the manner of Alpaca: the instruction, and in a line of its own the input.

    Earlier turns stand in `history` as pairs of question and answer, a system message in `system`.
    """
    question, more = text(row, "instruction"), row.get("input")
    if more is not None and not isinstance(more, str):
        raise BadRow("the field 'input' is not a text")
    if more and not is_blank(more):
        question = f"{question}\n{more}"
    turns = []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(map(_is_question_and_answer, history)):
        raise BadRow("the field 'history' is not a list of questions with answers")
    for turn in history:
        turns += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return with_system(row.get("system"), [*turns, {"role": "user", "content": question}])


def _is_question_and_answer(turn) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)


def _llama_factory(row: dict, at: Place) -> Preference:
    return replies_to(row, instruction_messages(row), "chosen", "rejected", at)


def _instruction_responses(row: dict, at: Place) -> Preference:
    return replies_to(row, instruction_messages(row), "chosen_response", "rejected_response", at)


def _prompt_responses(row: dict, at: Place) -> Preference:
    return replies_to(row, _with_system(row, as_prompt(field(row, "prompt"), "prompt")), *_RESPONSES, at)


def _sharegpt(row: dict, at: Place) -> Preference:
    prompt = with_system(row.get("system"), as_messages(field(row, "conversations"), "conversations"))
    return replies_to(row, prompt, "chosen", "rejected", at)


def _axolotl(row: dict, at: Place) -> Preference:
    return replies_to(row, _with_system(row, as_messages(field(row, "messages"), "messages")), "chosen", "rejected", at)


def _swift(row: dict, at: Place) -> Preference:
    """Reads the conversation with the chosen reply, and the rejected reply or the conversation with it."""
    chosen = _with_system(row, as_messages(field(row, "messages"), "messages"))
    if row.get("rejected_messages") is not None and row.get("rejected_response"):
        raise BadRow("the row has both rejected_messages and rejected_response")
    if row.get("rejected_messages") is not None:
        return pair(chosen, _with_system(row, as_messages(row["rejected_messages"], "rejected_messages")), at)
    rejected = as_reply(field(row, "rejected_response"), "rejected_response")
    return pair(chosen, join(chosen[:-1], rejected), at)


def _openai(row: dict, at: Place) -> Preference:
    input = field(row, "input")
    if not isinstance(input, dict):
        raise BadRow("the field 'input' is not an object with messages")
    if input.get("tools"):
        raise BadRow("the field 'input' has tools")
    return replies_to(row, as_messages(field(input, "messages"), "input.messages"), *_OUTPUTS, at)


_RESPONSES = "chosen_response", "rejected_response"
_OUTPUTS = "preferred_output", "non_preferred_output"


FORMATS = (
    Format(
        "openai",
        columns("input preferred_output non_preferred_output"),
        inner=columns("input.messages"),
        read=_openai,
        holds="OpenAI's preference files: `input` with messages, `preferred_output`, `non_preferred_output`",
    ),
    Format(
        "swift",
        columns("messages"),
        columns("rejected_response rejected_messages system"),
        read=_swift,
        when=lambda rows: any(row.get("rejected_response") or row.get("rejected_messages") for row in rows),
        holds="ms-swift: `messages` with the chosen reply, `rejected_response` or `rejected_messages`",
    ),
    Format(
        "sharegpt-preference",
        columns("conversations chosen rejected"),
        columns("system"),
        read=_sharegpt,
        holds="LLaMA-Factory's and axolotl's ShareGPT pairs: `conversations`, and a message as `chosen`, `rejected`",
    ),
    Format(
        "hh",
        columns("chosen rejected"),
        columns("prompt system"),
        read=_preference,
        when=_are_transcripts,
        holds="HH-RLHF: transcripts with `Human:` and `Assistant:` turns, the prompt in a column of its own or not",
    ),
    Format(
        "preference",
        columns("prompt chosen rejected"),
        columns("system"),
        read=_preference,
        holds="TRL's: texts or lists of messages",
    ),
    Format(
        "axolotl",
        columns("messages chosen rejected"),
        columns("system"),
        read=_axolotl,
        holds="axolotl's chat_template pairs: `messages`, and a message as `chosen`, `rejected`",
    ),
    Format(
        "llama-factory",
        columns("instruction chosen rejected"),
        columns("input system history"),
        read=_llama_factory,
        holds="LLaMA-Factory's Alpaca pairs: `instruction`, `input`, `chosen`, `rejected`",
    ),
    Format(
        "orca",
        columns("question chosen rejected"),
        columns("system"),
        read=_orca("question"),
        holds="Orca pairs: `system`, `question` (Argilla's: `input`), `chosen`, `rejected`",
    ),
    Format("orca", columns("input chosen rejected"), columns("system"), read=_orca("input")),
    Format(
        "preference",
        columns("prompt chosen_response rejected_response"),
        columns("system"),
        read=_prompt_responses,
    ),
    Format(
        "preference",
        columns("instruction chosen_response rejected_response"),
        columns("input system history"),
        read=_instruction_responses,
    ),
    Format(
        "preference",
        columns("chosen rejected"),
        columns("system"),
        read=_without_prompt,
        note="there is no column of prompts: a prompt is what both replies begin with",
    ),
)
