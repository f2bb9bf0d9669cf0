"""Reads transcripts of HH-RLHF and their near misses, and tells texts that a chat template rendered.

A prompt or a reply that is one of these must not become a message as it stands: the model would be trained on the marks
of speakers inside a turn.
"""

import re

from jax_backtrack.data.preferences import BadRow, is_blank, tidy
from jax_backtrack.tokenizer.chat_tokenizer import Message

_ROLES = {
    **dict.fromkeys(("human", "user", "h"), "user"),
    **dict.fromkeys(("assistant", "ai", "bot", "gpt", "a"), "assistant"),
    "system": "system",
}
# A speaker's mark at the beginning of a line, as in "Human:", "### Human:", "**Human:**", "[Human]:", "<human>:",
# "Human :" or "Human\uff1a".
_MARK = (
    r"[ \t\ufeff]*(?:\#{1,4}[ \t]*)?(?P<bold>\*\*)?[\[<]?(?P<speaker>%s)[\]>]?"
    r"(?(bold)(?:\*\*[ \t]?[:\uff1a]|[:\uff1a]\*\*)|[ \t]?[:\uff1a])"
)
# Marks whose meaning is sure wherever a text begins with them, and all; others need one of the assistant after them.
_SURE = _MARK % "Human|Assistant|HUMAN|ASSISTANT"
_ANY = _MARK % "(?i:human|user|h|assistant|ai|bot|gpt|a|system)"
_BEGINS_SURELY = re.compile(rf"[\s\ufeff]*{_SURE}")
_BEGINS = re.compile(rf"[\s\ufeff]*{_ANY}")
_AT_LINES = {pattern: re.compile(rf"^{pattern}", re.MULTILINE) for pattern in (_SURE, _ANY)}
_BLANK_BEFORE = re.compile(r"(?:\A|\n)[ \t\r]*\n[ \t\r]*\Z|\A\s*\Z")
_NO_USER_MARK = "a transcript does not begin with a turn"

# Headers of turns in chat templates, and prompts in which the assistant's turn is open.
_USER_HEADER = (
    r"<\|im_start\|>(?:user|system)|<\|start_header_id\|>(?:user|system)|<start_of_turn>user|\[INST\]|<\|user\|>"
    r"|<\|system\|>|<\|prompter\|>|<｜User｜>|<\|START_OF_TURN_TOKEN\|>|\[gMASK\]|<\|start\|>(?:user|system)"
    r"|\#\#\#[ ]?Instruction:|BEGINNING OF CONVERSATION:|USER:"
)
_ASSISTANT_HEADER = (
    r"<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model|\[/INST\]"
    r"|<\|assistant\|>|<｜Assistant｜>|<\|CHATBOT_TOKEN\|>|<\|start\|>assistant|\#\#\#[ ]?Response:|ASSISTANT:"
)
_RENDERED = re.compile(rf"(?:{_USER_HEADER})(?:.*?)(?:{_ASSISTANT_HEADER})", re.DOTALL)
_RENDERED_PROMPT = re.compile(rf"(?:{_USER_HEADER}).*(?:{_ASSISTANT_HEADER})\s*(?:<think>\s*)?\Z", re.DOTALL)


def is_rendered_prompt(text: str) -> bool:
    """Returns whether a text has a user's turn as chat templates write it, and ends with the assistant's open turn."""
    return _RENDERED_PROMPT.search(text) is not None


def is_rendered(text: str) -> bool:
    """Returns whether a text has a user's turn and one of the assistant after it as chat templates write them."""
    return _RENDERED.search(text) is not None


def is_transcript(text) -> bool:
    """Returns whether a text begins with the mark of a speaker.

    "Human:" and "Assistant:" are such marks by themselves; others, such as "User:" and "H:", where a mark of the
    assistant follows at the beginning of a line.
    """
    if not isinstance(text, str):
        return False
    if _BEGINS_SURELY.match(text):
        return True
    first = _BEGINS.match(text)
    if first is None or _ROLES[first["speaker"].lower()] == "assistant":
        return False
    return any(_ROLES[mark["speaker"].lower()] == "assistant" for mark in _AT_LINES[_ANY].finditer(text, first.end()))


def holds_marks(text: str) -> bool:
    """Returns whether a line of a text begins with the mark of the assistant, by its usual name."""
    return any(_ROLES[mark["speaker"].lower()] == "assistant" for mark in _AT_LINES[_SURE].finditer(text))


def ends_open(text: str) -> bool:
    """Returns whether a text ends with the assistant's mark, in a line of its own."""
    marks = list(_AT_LINES[_SURE].finditer(text))
    return bool(marks) and _ROLES[marks[-1]["speaker"].lower()] == "assistant" and is_blank(text[marks[-1].end() :])


def transcript(text) -> list[Message]:
    """Returns the messages of a transcript: of HH-RLHF, or of one whose marks and white space are others."""
    if not isinstance(text, str):
        raise BadRow("a transcript is not a text")
    if not is_transcript(text):
        raise BadRow(_NO_USER_MARK)
    marks = list(_AT_LINES[_SURE if _BEGINS_SURELY.match(text) else _ANY].finditer(text))
    # Turns are parted by blank lines; where no turn is, by line breaks.
    parted = [mark for mark in marks if _BLANK_BEFORE.search(text[: mark.start()][-80:])]
    turns = parted if len(parted) > 1 else marks
    ends = [mark.start() for mark in turns[1:]] + [len(text)]
    messages = []
    for mark, end in zip(turns, ends, strict=True):
        content, last = text[mark.end() : end], end == len(text)
        if len(turns) < len(marks) and any(mark.end() <= later.start() < end for later in marks):
            raise BadRow("a turn holds the mark of another turn")
        # The spaces after the mark and the line breaks after a turn belong to the transcript.
        content = tidy(content.lstrip(" ")) if last else content.strip()
        messages.append({"role": _ROLES[mark["speaker"].lower()], "content": content})
    if any(is_blank(message["content"]) for message in messages[:-1]):
        raise BadRow("a turn of the prompt is empty")
    return messages


def open_transcript(text: str) -> list[Message]:
    """Returns the messages of a transcript that ends where the assistant speaks; text before it is the system's."""
    first = next((mark for mark in _AT_LINES[_SURE].finditer(text)), None)
    before = "" if first is None or is_transcript(text) else text[: first.start()]
    *messages, last = transcript(text[len(before) :])
    if last["role"] != "assistant" or not is_blank(last["content"]):
        raise BadRow("a prompt that is a transcript does not end with the assistant's open turn")
    if not messages:
        raise BadRow("the prompt is empty")
    return [*([{"role": "system", "content": before.strip()}] if before.strip() else []), *messages]
