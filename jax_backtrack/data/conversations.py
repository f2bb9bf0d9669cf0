"""Makes messages of what data files hold: texts, lists of messages in several spellings, transcripts."""

import ast
import json
import re
import reprlib
from collections.abc import Sequence

from jax_backtrack.data.preferences import BadRow, is_blank, same_text, tidy
from jax_backtrack.data.transcripts import (
    ends_open,
    is_rendered,
    is_rendered_prompt,
    is_transcript,
    open_transcript,
    transcript,
)
from jax_backtrack.tokenizer.chat_tokenizer import Message

# Roles by their spellings in data sets, in lower case; only those whose meaning is sure.
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
}
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "parts")
_TOOL_KEYS = ("tool_calls", "function_call")
# Keys of a message that say whose it is, and all that are read.
ROLE_KEYS = frozenset(_ROLE_KEYS)
KNOWN_KEYS = ROLE_KEYS | {*_CONTENT_KEYS, *_TOOL_KEYS, "weight", "train"}
# A list of messages, or one message, that was written as a text.
_WRITTEN = re.compile(r"\s*\[?\s*\{\s*[\"'](?:role|from|content|value)[\"']\s*:")


def is_written(text) -> bool:
    """Returns whether a text is a list of messages that was written as one."""
    return isinstance(text, str) and _WRITTEN.match(text) is not None


def as_messages(value, field: str) -> list[Message]:
    """Returns the messages of a list in one of the spellings of data sets; BadRow where it is none, with the reason.

    Spellings: dicts of role and content or of from and value, content as text parts, one dict alone, a dict of equally
    long lists, and any of these as JSON in a text.
    """
    if isinstance(value, str):
        value = _from_json(value, field)
    if isinstance(value, dict):
        value = _from_dict(value, field)
    if not isinstance(value, (list, tuple)):
        raise BadRow(f"the field {field!r} is {_kind(value)}, not a list of messages")
    if not len(value):
        raise BadRow(f"the field {field!r} is an empty list")
    roles = [_role(number, message, field) for number, message in enumerate(value)]
    if roles[-1] == "assistant" and (value[-1].get("train") is False or value[-1].get("weight") in (0, "0")):
        raise BadRow("the last reply is marked as one that is not trained on (weight 0, or train false)")
    return [
        {"role": role, "content": _content(number, message)}
        for number, (role, message) in enumerate(zip(roles, value, strict=True))
    ]


def as_prompt(value, field: str) -> list[Message]:
    """Returns the messages of a prompt: a text is the user's, a transcript has its turns.

    Raises BadRow for a transcript that does not end with an open turn of the assistant.
    """
    if not isinstance(value, str) or _WRITTEN.match(value):
        messages = as_messages(value, field) if value != [] else []
        if len(messages) != 1 or not is_transcript(messages[0]["content"]):
            return messages
        value = messages[0]["content"]
    if is_transcript(value) or ends_open(value):
        return open_transcript(value)
    return [{"role": "user", "content": value}]


def as_reply(value, field: str) -> list[Message]:
    """Returns the messages of a reply: a text is the assistant's, but for a transcript that begins with the user.

    Raises BadRow for a text that a chat template rendered with its prompt.
    """
    if not isinstance(value, str) or _WRITTEN.match(value):
        return as_messages(value, field)
    if is_transcript(value) and (turns := transcript(value))[0]["role"] == "user" and len(turns) > 1:
        return turns
    if is_rendered(value):
        raise BadRow(f"the field {field!r} is rendered with a chat template, with its prompt")
    return [{"role": "assistant", "content": tidy(value)}]


def _from_json(text: str, field: str):
    for parse in (json.loads, ast.literal_eval):  # pandas writes lists as Python does
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, (list, dict)):
            return value
    what = "a list of messages written as a text that is no JSON" if _WRITTEN.match(text) else "a text"
    raise BadRow(f"the field {field!r} is {what}, not a list of messages")


def _from_dict(value: dict, field: str) -> list:
    """Returns one message, or messages as datasets keeps a sequence of dicts: a dict of lists."""
    lists = {key: entries for key, entries in value.items() if isinstance(entries, list)}
    if any(isinstance(value.get(key), list) for key in _ROLE_KEYS):
        if len({len(entries) for entries in lists.values()}) > 1:
            raise BadRow(f"the lists of the field {field!r} are not equally long")
        return [dict(zip(lists, entries, strict=True)) for entries in zip(*lists.values(), strict=True)]
    return [value]


def _role(number: int, message, field: str) -> str:
    if not isinstance(message, dict):
        raise BadRow(f"the field {field!r} holds {_kind(message)} where a message belongs")
    role = next((message[key] for key in _ROLE_KEYS if message.get(key) is not None), None)
    if role is None:
        raise BadRow(f"message {number} of the field {field!r} has no role")
    common_name = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if common_name is None:
        raise BadRow(f"message {number} has the role {reprlib.repr(role)}")
    return common_name


def _content(number: int, message: dict) -> str:
    for key in _TOOL_KEYS:
        if message.get(key):
            raise BadRow(f"message {number} calls a tool ({key})")
    content = next((message[key] for key in _CONTENT_KEYS if message.get(key) is not None), None)
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
    kind = part.get("type") if isinstance(part, dict) else None
    if (
        isinstance(part, dict)
        and isinstance(part.get("text"), str)
        and kind in (None, "text", "input_text", "output_text")
    ):
        return part["text"]
    raise BadRow(f"message {number} holds a part that is no text: {reprlib.repr(kind) if kind else _kind(part)}")


def _kind(value) -> str:
    """Returns a word for a value that is not what it should be."""
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
    if all(is_blank(message["content"]) for message in prompt):
        return reply
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
        left["role"] == right["role"] and same_text(left["content"], right["content"])
        for left, right in zip(messages, others, strict=True)
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
        if message["role"] == "user" and (is_rendered_prompt(message["content"]) or ends_open(message["content"])):
            raise BadRow(f"message {number} is a conversation that was rendered already")
