"""Makes messages of what data files hold: texts, lists of messages in several spellings, transcripts."""

import json
import re
import reprlib
from collections.abc import Sequence

from jax_backtrack.data.preferences import BadRow, is_blank, same_text
from jax_backtrack.hub.tokenizer import Message

# Roles by their spellings in data sets, in lower case; only those whose meaning is sure.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
}
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")
_TOOL_KEYS = ("tool_calls", "function_call")
# How chat templates begin a conversation, and how they end it where the assistant speaks: a prompt that has both was
# rendered already.
_RENDERED = re.compile(
    r"\s*(<\|im_start\|>|<\|begin_of_text\|>|<\|start_header_id\|>|<start_of_turn>|<bos>|<s>|\[INST\]"
    r"|<\|(?:system|user)\|>|<\|endoftext\|>|<｜begin▁of▁sentence｜>|<\|start\|>).*"
    r"(<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model|\[/INST\]"
    r"|<\|assistant\|>|<｜Assistant｜>|<\|start\|>assistant)\s*(<think>\s*)?",
    re.DOTALL,
)


def known_keys() -> frozenset[str]:
    """Returns the keys of a message that are read."""
    return frozenset({*_ROLE_KEYS, *_CONTENT_KEYS, *_TOOL_KEYS})


def as_messages(value, field: str) -> list[Message]:
    """Returns the messages of a list in one of the spellings of data sets; BadRow where it is none, with the reason.

    Spellings: dicts of role and content or of from and value, content as text parts, one dict alone, a dict of equally
    long lists, and any of these as JSON in a text.
    """
    if isinstance(value, str):
        value = _from_json(value, field)
    if isinstance(value, dict):
        value = _from_dict(value, field)
    if not isinstance(value, Sequence):
        raise BadRow(f"the field {field!r} is {_kind(value)}, not a list of messages")
    if not len(value):
        raise BadRow(f"the field {field!r} is an empty list")
    roles = [_role(number, message, field) for number, message in enumerate(value)]
    return [
        {"role": role, "content": _content(number, message)}
        for number, (role, message) in enumerate(zip(roles, value, strict=True))
    ]


def as_prompt(value, field: str) -> list[Message]:
    """Returns the messages of a prompt: a text is the user's, a transcript has its turns.

    Raises BadRow for a text that a chat template rendered, and for a transcript that does not end with an open turn of
    the assistant.
    """
    if not isinstance(value, str):
        messages = as_messages(value, field)
        if len(messages) == 1 and is_transcript(messages[0]["content"]):
            return _open_transcript(messages[0]["content"])
        return messages
    if is_transcript(value):
        return _open_transcript(value)
    if _RENDERED.fullmatch(value):
        raise BadRow(f"the field {field!r} is rendered with a chat template already")
    return [{"role": "user", "content": value}]


def as_reply(value, field: str) -> list[Message]:
    """Returns the messages of a reply: a text is the assistant's, but for a transcript that begins with the user."""
    if isinstance(value, str):
        if is_transcript(value) and (turns := transcript(value))[0]["role"] == "user" and len(turns) > 1:
            return turns
        return [{"role": "assistant", "content": tidy(value)}]
    return as_messages(value, field)


def tidy(text: str) -> str:
    """Returns a reply that stands in a field of its own, without blank lines at its ends and without the one space
    that parts it from its prompt. The indentation of its first line stays."""
    text = re.sub(r"\A(?:[ \t]*\r?\n)+", "", text).rstrip()
    return text[1:] if re.match(r" \S", text) else text


def _from_json(text: str, field: str):
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, (list, dict)):
        raise BadRow(f"the field {field!r} is a text, not a list of messages")
    return value


def _from_dict(value: dict, field: str) -> list:
    """One message, or messages as datasets keeps a sequence of dicts: a dict of lists."""
    lists = {key: entries for key, entries in value.items() if isinstance(entries, list)}
    if any(isinstance(value.get(key), list) for key in _ROLE_KEYS):
        if len({len(entries) for entries in lists.values()}) > 1:
            raise BadRow(f"the lists of the field {field!r} are not equally long")
        return [dict(zip(lists, entries, strict=True)) for entries in zip(*lists.values(), strict=True)]
    return [value]


def _role(number: int, message, field: str) -> str:
    if not isinstance(message, dict):
        raise BadRow(f"the field {field!r} holds {_kind(message)} where a message belongs")
    key = next((key for key in _ROLE_KEYS if key in message), None)
    if key is None:
        raise BadRow(f"message {number} of the field {field!r} has no role")
    role = message[key]
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRow(f"message {number} has the role {reprlib.repr(role)}")
    return known


def _content(number: int, message: dict) -> str:
    for key in _TOOL_KEYS:
        if message.get(key):
            raise BadRow(f"message {number} calls a tool ({key})")
    content = next((message[key] for key in _CONTENT_KEYS if key in message), None)
    if content is None:
        raise BadRow(f"message {number} has no content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(number, part) for part in content)
    raise BadRow(f"the content of message {number} is {_kind(content)}, not a text")


def _part(number: int, part) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text").endswith("text"):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else None
    raise BadRow(f"message {number} holds a part that is no text: {reprlib.repr(kind) if kind else _kind(part)}")


def _kind(value) -> str:
    """A word for a value that is not what it should be."""
    match value:
        case None:
            return "null"
        case bool():
            return "a truth value"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case dict():
            return "an object"
        case bytes():
            return "a byte string"
        case list() | tuple():
            return "a list"
    return f"a {type(value).__name__}"


# ------------------------------------------------------------------------------------------------- transcripts

_SPEAKERS = {"human": "user", "user": "user", "assistant": "assistant"}
_MARK = r"[ \t]*(?:\#{2,3}[ \t]*)?(Human|Assistant|HUMAN|ASSISTANT):"
_START = re.compile(rf"\A[\s\ufeff]*{_MARK}")
# Between turns stands a blank line; where there is none in the whole text, a line break.
_BY_BLANK_LINES = re.compile(rf"(?:\A[\s\ufeff]*|\r?\n[ \t]*\r?\n\s*?){_MARK}")
_BY_LINES = re.compile(rf"(?:\A[\s\ufeff]*|\r?\n){_MARK}")


def is_transcript(text) -> bool:
    """Whether a text begins with a speaker's mark: "Human:" or "Assistant:", with white space or "###" before it."""
    return isinstance(text, str) and _START.match(text) is not None


def transcript(text) -> list[Message]:
    """Returns the messages of a transcript of HH-RLHF, or of one whose white space was changed on its way here."""
    if not isinstance(text, str):
        raise BadRow("a transcript is not a text")
    if not is_transcript(text):
        raise BadRow("a transcript does not begin with a turn")
    _, *turns = _BY_BLANK_LINES.split(text)
    if len(turns) == 2:
        _, *turns = _BY_LINES.split(text)
    messages = [
        {"role": _SPEAKERS[speaker.lower()], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]
    if any(is_blank(message["content"]) for message in messages[:-1]):
        raise BadRow("a turn of the prompt is empty")
    if any(_BY_LINES.search("\n" + message["content"]) for message in messages if message["role"] == "user"):
        raise BadRow("a turn of the prompt holds the mark of another turn")
    return messages


def _open_transcript(text: str) -> list[Message]:
    *messages, last = transcript(text)
    if last["role"] != "assistant" or not is_blank(last["content"]):
        raise BadRow("a prompt that is a transcript does not end with the assistant's open turn")
    if not messages:
        raise BadRow("the prompt is empty")
    return messages


# -------------------------------------------------------------------------------------------- prompt and reply


def join(prompt: Sequence[Message], reply: Sequence[Message]) -> list[Message]:
    """Returns the conversation of a prompt and a reply, each of which may say some of the other's messages again.

    prompt: the whole context, or its last question
    reply:  the assistant's message, or a whole conversation that ends with it

    Raises BadRow where the prompt and the conversation do not fit together.
    """
    prompt, reply = list(prompt), list(reply)
    if reply[0]["role"] == "assistant":
        if prompt and prompt[-1]["role"] == "assistant":
            raise BadRow("the prompt ends with the assistant: a reply that was begun cannot be trained on")
        return [*prompt, *reply]
    *context, last = reply
    if not context:
        raise BadRow("a conversation does not end with the assistant")
    if _same(prompt, context[: len(prompt)]) or _same(prompt, context[-len(prompt) :]) or _same(prompt, reply):
        return reply
    if _same(context, prompt[-len(context) :]):
        return [*prompt, last]
    raise BadRow("the prompt is not that of the replies' conversation")


def _same(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    return len(messages) == len(others) and all(
        one["role"] == other["role"] and same_text(one["content"], other["content"])
        for one, other in zip(messages, others, strict=True)
    )


def with_system(system, messages: list[Message]) -> list[Message]:
    """Returns the messages under a system message that a column of its own gives; None or a blank one gives none."""
    if system is None or (isinstance(system, str) and is_blank(system)):
        return messages
    if not isinstance(system, str):
        raise BadRow(f"the system message is {_kind(system)}, not a text")
    if messages and messages[0]["role"] == "system":
        if same_text(messages[0]["content"], system):
            return messages
        raise BadRow("the row has two system messages")
    return [{"role": "system", "content": system}, *messages]


def check_conversation(messages: Sequence[Message]) -> None:
    """Raises BadRow unless a conversation has a prompt of messages that say something, and ends with the assistant."""
    if messages[-1]["role"] != "assistant":
        raise BadRow("a conversation does not end with the assistant")
    if all(is_blank(message["content"]) for message in messages[:-1]):
        raise BadRow("the prompt is empty")
    for number, message in enumerate(messages[:-1]):
        if message["role"] != "system" and is_blank(message["content"]):
            raise BadRow(f"message {number} is empty")
