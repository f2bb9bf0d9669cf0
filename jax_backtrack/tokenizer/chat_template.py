"""A chat template as a program: conversations in, strings out, exactly as transformers renders them, on a given day."""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jinja2
import transformers

try:  # jinja2 as transformers sets it up for templates; it has no public name
    from transformers.utils.chat_template_utils import _compile_jinja_template
except ImportError:
    _compile_jinja_template = None

from jax_backtrack.errors import InputError, nearest
from jax_backtrack.tokenizer.untrusted import concat

# Chat templates that come with this project, for base models, whose tokenizers have none.
TEMPLATES = {file.stem: file for file in Path(__file__).with_name("templates").glob("*.jinja")}


def now() -> datetime.datetime:
    """Returns the local time, which a template may print. Nothing else reads the clock for templates."""
    return datetime.datetime.now()


class ChatTemplate:
    """The chat template of a tokenizer, compiled.

    It is rendered by itself and not by `apply_chat_template`, which makes plain texts of all that a template is given.
    `tests/tokenizer/test_chat_templates.py` compares the two.
    """

    def __init__(self, hf: transformers.PreTrainedTokenizerFast):
        if _compile_jinja_template is None:
            raise InputError(
                "chat templates are compiled by transformers.utils.chat_template_utils._compile_jinja_template, "
                f"which transformers {transformers.__version__} has not: install an older release"
            )
        try:
            self._source = hf.get_chat_template()
            environment = _compile_jinja_template(self._source).environment.overlay()
            environment.concat = concat
            self._compiled = environment.from_string(self._source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"the chat template has a syntax error in line {error.lineno}: {error.message}") from None
        except ValueError as error:  # several templates, none of which is the default
            raise InputError(f"the tokenizer's chat template cannot be used: {error}") from None
        self._special_tokens = dict(hf.special_tokens_map)

    @property
    def reads_clock(self) -> bool:
        """Returns whether the template may print the date."""
        return "strftime_now" in self._source

    def fill(self, messages: Sequence[Mapping], generation_prompt: bool, at: datetime.datetime) -> str:
        """Returns the conversation as the template writes it at a time; InputError where the template raises."""
        try:
            text = self._compiled.render(
                messages=[
                    {name: value for name, value in message.items() if value is not None} for message in messages
                ],
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
                strftime_now=at.strftime,
                **self._special_tokens,
            )
            return str.__str__(text)  # with stand-ins, where the contents have them
        except Exception as error:  # a template is a program: besides jinja2's errors it can raise any other
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(f"the chat template refuses a conversation of {roles}: {error}") from None


def read_template(chat_template: str, hf: transformers.PreTrainedTokenizerFast) -> str:
    """Returns the text of a template that comes with this project, or of a .jinja file."""
    if chat_template.endswith(".jinja"):
        try:
            return Path(chat_template).expanduser().read_text(encoding="utf-8-sig")  # a byte order mark is no text
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat template {chat_template} cannot be read: {error}") from None
    if chat_template not in TEMPLATES:
        nearest_names = nearest(chat_template, TEMPLATES)
        raise InputError(f"chat template {chat_template!r} is neither a .jinja file nor built in: {nearest_names}")
    template = TEMPLATES[chat_template].read_text()
    added = hf.get_added_vocab()
    for mark in re.findall(r"<\S+?>", template):
        if mark not in added:
            raise InputError(f"chat template {chat_template!r} writes {mark}, which is no token of this tokenizer")
    return template


def map_texts(message: Mapping, change: Callable[[str], str]) -> dict:
    """Returns a message with every text changed but its role and the names of its fields, however deep it stands."""

    def changed(value):
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {name: changed(entry) for name, entry in value.items()}
        return [changed(entry) for entry in value] if isinstance(value, (list, tuple)) else value

    return {name: value if name == "role" else changed(value) for name, value in message.items()}
