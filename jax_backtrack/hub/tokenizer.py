"""The tokenizer as this project uses it: chat templates in, ids out, and text that can never become a special token.

Ids of control tokens come from the chat template alone. What a user, a data row or an attack wrote is encoded by a
copy of the tokenizer that does not know them, so "[RESET]" or "<|im_end|>" in it stays plain text.
"""

import json
import re
import reprlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import transformers
from tokenizers import AddedToken, Tokenizer

from jax_backtrack.errors import InputError, nearest

RESET = "[RESET]"
ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # role, content
_NOT_UNICODE = "is not valid Unicode: it holds half of a surrogate pair"

# Spare entries that vocabularies keep: Llama-3, Gemma-2, SmolLM2. The first one that is there becomes [RESET].
_SPARE_TOKENS = ("<|reserved_special_token_0|>", "<unused0>", "<reponame>")

# Chat templates that come with this project, for base models, whose tokenizers have none.
_TEMPLATES = {file.stem: file for file in Path(__file__).with_name("templates").glob("*.jinja")}

# Added tokens that text may give. Gemma-2 keeps runs of white space and HTML tags as added tokens that are not special,
# and its models have read them in text as one token each; "\u2581" is how it spells a space. All other added tokens may
# steer a model, special or not: Gemma-2 has "<mask>", "[@BOS@]", "[toxicity=0]" and "<unused0>" in the same list.
_TEXT_TOKEN = re.compile(
    r"[\s\u2581]+|</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code)>"
)


class ChatTokenizer:
    """A fast Hugging Face tokenizer (`hf`) with a chat template, kept safe from what the text spells.

    eot_id:        id of the token that ends the assistant's turn in the chat template
    reset_id:      id of `[RESET]`, or None where the vocabulary has none yet (see `with_reset`)
    reset_context: the reset context that the model was trained with, or None for a model that was not
    chat_template: a template to use in place of the tokenizer's own, which `hf` then keeps: "chatml", "gemma2",
                   "llama3", or the path of a .jinja file
    """

    def __init__(
        self, hf: transformers.PreTrainedTokenizerFast, reset_context: str | None = None, chat_template: str = ""
    ):
        if not hf.is_fast:
            raise InputError(f"{type(hf).__name__} is a slow tokenizer; the model needs a tokenizer.json")
        if chat_template:
            hf.chat_template = _read_template(chat_template, hf)
        if not hf.chat_template:
            raise InputError(
                "the tokenizer has no chat template, as is usual for a base model: "
                f"set chat_template (in a recipe, model.chat_template) to {', '.join(sorted(_TEMPLATES))} "
                "or to the path of a .jinja file"
            )
        self.hf = hf
        self.reset_context = reset_context
        text_tokens, self._control_ids = _split_added_tokens(hf.backend_tokenizer)
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        self._control_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._text_only = _text_only(hf.backend_tokenizer, text_tokens)
        self._refuse_leaks()
        self.eot_id = self._end_of_turn()
        self.asks_reset_context = (
            False  # [RESET] came in a file that does not say which reset context it was trained for
        )
        self.without_row: dict[int, str] = {}  # tokens that the model's embedding has no row for, by id

    def note_rows(self, rows: int) -> None:
        """Notes that the embedding has so many rows: a text or a template that needs a token beyond them is refused."""
        self.without_row = {index: token for token, index in self.hf.get_vocab().items() if index >= rows}

    def unused_ids(self, rows: int) -> tuple[tuple[int, int], ...]:
        """Ids below `rows` that are no token, which a model must not write: first and one behind the last of each run.

        Vocabularies are padded to a multiple of some number, and such rows are not trained.
        """
        unused = np.ones(rows + 2, bool)  # with a used one at either end, so that every run begins and ends
        unused[[0, -1]] = False
        known = [index for index in self.hf.get_vocab().values() if index < rows and index not in self.without_row]
        unused[np.asarray(known, int) + 1] = False
        edges = np.flatnonzero(np.diff(unused))
        return tuple((int(first), int(behind)) for first, behind in zip(edges[::2], edges[1::2], strict=True))

    @property
    def special_ids(self) -> set[int]:
        """Ids of the special tokens, [RESET] and the end of turn among them."""
        return {index for index, token in self.hf.added_tokens_decoder.items() if token.special} | {self.eot_id}

    @property
    def reset_id(self) -> int | None:
        index = self._control_ids.get(RESET)
        return index if index in self.special_ids else None

    @property
    def control_ids(self) -> dict[str, int]:
        """Ids of the tokens that text never becomes, [RESET] among them, by how they are spelt."""
        return dict(self._control_ids)

    @property
    def largest_id(self) -> int:
        """The largest id that the tokenizer can give; the model's vocabulary must be larger."""
        return max(self.hf.get_vocab().values())

    def encode(self, text: str) -> np.ndarray:
        """Ids of untrusted text, int32 `[tokens]`: never a control token, whatever the text spells."""
        return self._with_rows(self._text_ids(text))

    def render(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids of a conversation up to where the assistant speaks, int32 `[tokens]`, by the model's own template."""
        ids = []
        for part in self.render_parts(messages):
            ids.extend(self._text_ids(part) if isinstance(part, str) else [part])
        return self._with_rows(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        # Llama-3's tokenizer_config.json asks for a clean-up that would make "." of " .".
        return self.hf.decode(list(map(int, ids)), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render_parts(self, messages: Sequence[Message]) -> list[int | str]:
        """What `render` encodes: ids of the template's control tokens, and the texts that stand between them."""
        check_messages(messages)
        # Place-holders are rendered instead of contents, so that what stands between them is the template's own.
        stands_for = {}
        held = []
        for number, message in enumerate(messages):
            content = message["content"]
            text = content.strip()
            if text:
                mark = f"\ue000{number}\ue001"
                stands_for[mark] = text
                # White space around the text stays outside the mark: some templates trim it, others keep it.
                content = content.replace(text, mark, 1)
            held.append({"role": message["role"], "content": content})
        rendered = self._fill_template(held, add_generation_prompt=True)
        for mark in stands_for:
            if mark not in rendered:
                roles = ", ".join(message["role"] for message in messages)
                raise InputError(f"the chat template leaves out a message of a conversation of {roles}")
        parts: list[int | str] = []
        for part in self._control_pattern.split(rendered):
            if part in self._control_ids:
                parts.append(self._control_ids[part])
            elif part:
                parts.append(re.sub("\ue000\\d+\ue001", lambda match: stands_for[match[0]], part))
        return parts

    def _fill_template(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: besides jinja2's errors it can raise any other
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(f"the chat template refuses a conversation of {roles}: {error}") from None

    def _text_ids(self, text: str) -> list[int]:
        try:
            return self._text_only.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InputError(f"a text {_NOT_UNICODE}") from None

    def _with_rows(self, ids: list[int]) -> np.ndarray:
        if self.without_row and (lost := [index for index in ids if index in self.without_row]):
            raise InputError(
                f"the token {self.without_row[lost[0]]!r} (id {lost[0]}) has no row in the model's embedding, which "
                f"ends before {min(self.without_row)}: this model cannot read it"
            )
        return np.asarray(ids, np.int32)

    def _refuse_leaks(self) -> None:
        """Some kinds of vocabulary find a control token in plain text even where it is not known as an added token."""
        for token, index in self._control_ids.items():
            if index != self.hf.unk_token_id and index in self._text_ids(token):
                raise InputError(
                    f"this tokenizer reads {token!r} in plain text as its special token; "
                    "load(..., tokenizer=False) gives the model without it"
                )

    def _end_of_turn(self) -> int:
        """The first control token that the template writes behind an assistant's message."""
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        _, _, behind = self._fill_template(turn, add_generation_prompt=False).rpartition("answer")
        for part in self._control_pattern.split(behind):
            if part in self._control_ids:
                return self._control_ids[part]
        raise InputError(
            "the chat template ends the assistant's turn with no special token of this tokenizer: "
            f"behind the message stands {behind!r}"
        )


def check_messages(messages: Sequence[Message]) -> None:
    """Raises InputError unless these are messages: dicts with a known `role` and a text `content`."""
    # reprlib: what is deeply nested has no repr, and what is long has one as long.
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not len(messages):
        raise InputError(f"a conversation is a list of messages, not {reprlib.repr(messages):.60}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"message {number} is not a dict with a role and a text content: {reprlib.repr(message)}")
        role = message.get("role")
        if role not in ROLES:
            known = nearest(role if isinstance(role, str) else "", ROLES)
            raise InputError(f"message {number} has the role {reprlib.repr(role)}: {known}")
        if not is_unicode(message["content"]):
            raise InputError(f"message {number} {_NOT_UNICODE}")


def is_unicode(text: str) -> bool:
    """Whether a text can be written to a file. Escapes of JSON can name half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_reset(tokenizer: ChatTokenizer) -> ChatTokenizer:
    """A tokenizer with the special token `[RESET]`: a renamed spare token where there is one, else a new last entry.

    Returns the tokenizer itself where it has `[RESET]` already. Raises InputError where `[RESET]` is an ordinary
    token of the vocabulary.
    """
    if tokenizer.reset_id is not None:
        return tokenizer
    vocabulary = tokenizer.hf.get_vocab()
    if RESET in vocabulary:
        raise InputError(f"{RESET} is an ordinary token of this vocabulary (id {vocabulary[RESET]}) and cannot be used")
    template = tokenizer.hf.get_chat_template()
    spare = [token for token in _SPARE_TOKENS if token in vocabulary and token not in template]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.hf.save_pretrained(folder)
        if spare:
            # As text: to parse the 34 MB of Gemma-2's tokenizer.json and to write them again takes seconds.
            for file in Path(folder).glob("*.json"):
                file.write_text(file.read_text().replace(json.dumps(spare[0]), json.dumps(RESET)))
        hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    hf.add_tokens([AddedToken(RESET, special=True, normalized=False)], special_tokens=True)
    made = ChatTokenizer(hf, tokenizer.reset_context)
    made.without_row = {index: token for index, token in tokenizer.without_row.items() if index != made.reset_id}
    return made


def _read_template(chat_template: str, hf: transformers.PreTrainedTokenizerFast) -> str:
    """The text of a template that comes with this project, or of a .jinja file."""
    if chat_template.endswith(".jinja"):
        try:
            return Path(chat_template).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat template {chat_template} cannot be read: {error}") from None
    if chat_template not in _TEMPLATES:
        known = nearest(chat_template, _TEMPLATES)
        raise InputError(f"chat template {chat_template!r} is neither a .jinja file nor built in: {known}")
    template = _TEMPLATES[chat_template].read_text()
    added = hf.get_added_vocab()
    for mark in re.findall(r"<\S+?>", template):
        if mark not in added:
            raise InputError(f"chat template {chat_template!r} writes {mark}, which is no token of this tokenizer")
    return template


def _split_added_tokens(backend: Tokenizer) -> tuple[list[AddedToken], dict[str, int]]:
    """Added tokens that text may give, and the ids of all others by name."""
    text_tokens, control_ids = [], {}
    for index, token in sorted(backend.get_added_tokens_decoder().items()):
        # One that stands outside the model's own vocabulary would have another id in a copy with fewer added tokens.
        in_vocabulary = backend.model.token_to_id(token.content) == index
        if not token.special and in_vocabulary and _TEXT_TOKEN.fullmatch(token.content):
            text_tokens.append(token)
        else:
            control_ids[token.content] = index
    return text_tokens, control_ids


def _text_only(backend: Tokenizer, text_tokens: list[AddedToken]) -> Tokenizer:
    """A tokenizer with the same vocabulary, which it shares, but with no other added tokens than `text_tokens`."""
    text_only = Tokenizer(backend.model)
    text_only.normalizer = backend.normalizer
    text_only.pre_tokenizer = backend.pre_tokenizer
    text_only.add_tokens(text_tokens)
    return text_only
