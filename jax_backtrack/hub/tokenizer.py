"""The tokenizer as this project uses it: chat templates in, ids out, and text that can never become a special token.

Ids of special tokens come from the chat template alone. What a user, a data row or an attack wrote is encoded by a
copy of the tokenizer that knows no added tokens at all, so "[RESET]" or "<|im_end|>" in it stays plain text.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
import transformers
from tokenizers import AddedToken, Tokenizer

from jax_backtrack.errors import InputError, nearest

RESET = "[RESET]"
ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # role, content

# Spare entries that vocabularies keep: Llama-3, Gemma-2, SmolLM2. The first one that is there becomes [RESET].
_SPARE_TOKENS = ("<|reserved_special_token_0|>", "<unused0>", "<reponame>")


class ChatTokenizer:
    """A fast Hugging Face tokenizer (`hf`) with a chat template, kept safe from what the text spells.

    eot_id:        id of the token that ends the assistant's turn in the chat template
    reset_id:      id of `[RESET]`, or None where the vocabulary has none yet (see `with_reset`)
    reset_context: the reset context that the model was trained with, or None for a model that was not
    """

    def __init__(self, hf: transformers.PreTrainedTokenizerFast, reset_context: str | None = None):
        if not hf.is_fast:
            raise InputError(f"{type(hf).__name__} is a slow tokenizer; the model needs a tokenizer.json")
        if not hf.chat_template:
            raise InputError("the tokenizer has no chat template: give it one in its tokenizer_config.json")
        self.hf = hf
        self.reset_context = reset_context
        self._special_ids = {token.content: index for index, token in hf.added_tokens_decoder.items()}
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._text_only = _without_added_tokens(hf.backend_tokenizer)
        self._refuse_leaks()
        self.eot_id = self._end_of_turn()

    @property
    def special_ids(self) -> set[int]:
        """Ids of the special tokens, [RESET] among them."""
        return {index for index, token in self.hf.added_tokens_decoder.items() if token.special}

    @property
    def reset_id(self) -> int | None:
        return self._special_ids.get(RESET)

    @property
    def largest_id(self) -> int:
        """The largest id that the tokenizer can give; the model's vocabulary must be larger."""
        return max(self.hf.get_vocab().values())

    def encode(self, text: str) -> np.ndarray:
        """Ids of untrusted text, int32 `[tokens]`: never a special token, whatever the text spells."""
        return np.asarray(self._text_ids(text), np.int32)

    def render(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids of a conversation up to where the assistant speaks, int32 `[tokens]`, by the model's own template."""
        return np.asarray(self._render(messages), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self.hf.decode(list(map(int, ids)), skip_special_tokens=True)

    def _render(self, messages: Sequence[Message]) -> list[int]:
        """Renders place-holders instead of contents, so that what stands between them is the template's own."""
        check_messages(messages)
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
        ids = []
        for part in self._special_pattern.split(rendered):
            if part in self._special_ids:
                ids.append(self._special_ids[part])
            elif part:
                text = re.sub("\ue000\\d+\ue001", lambda match: stands_for[match[0]], part)
                ids.extend(self._text_ids(text))
        return ids

    def _fill_template(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(f"the chat template refuses a conversation of {roles}: {error}") from None

    def _text_ids(self, text: str) -> list[int]:
        try:
            return self._text_only.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InputError("a text is not valid Unicode: it holds half of a surrogate pair") from None

    def _refuse_leaks(self) -> None:
        """Some kinds of vocabulary find a special token in plain text even where no added token is known."""
        for index, token in self.hf.added_tokens_decoder.items():
            if token.special and index != self.hf.unk_token_id and index in self._text_ids(token.content):
                raise InputError(f"this tokenizer reads {token.content!r} in plain text as its special token")

    def _end_of_turn(self) -> int:
        """The first special token that the template writes behind an assistant's message."""
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        _, _, behind = self._fill_template(turn, add_generation_prompt=False).rpartition("answer")
        for part in self._special_pattern.split(behind):
            if part in self._special_ids:
                return self._special_ids[part]
        raise InputError("the chat template ends the assistant's turn with no special token")


def check_messages(messages: Sequence[Message]) -> None:
    """Raises InputError unless these are messages: dicts with a known `role` and a text `content`."""
    if isinstance(messages, str) or not messages:
        raise InputError(f"a conversation is a list of messages, not {messages!r:.60}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise InputError(f"message {number} is not a dict with a role and a text content: {message!r:.80}")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(f"message {number} has the role {role!r}: {nearest(str(role), ROLES)}")


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
    spare = [token for token in _SPARE_TOKENS if token in vocabulary and token not in tokenizer.hf.chat_template]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.hf.save_pretrained(folder)
        if spare:
            for file in Path(folder).glob("*.json"):
                renamed = _renamed(json.loads(file.read_text()), spare[0])
                file.write_text(json.dumps(renamed, ensure_ascii=False))
        hf = transformers.AutoTokenizer.from_pretrained(folder)
    hf.add_tokens([AddedToken(RESET, special=True, normalized=False)], special_tokens=True)
    return ChatTokenizer(hf, tokenizer.reset_context)


def _renamed(value, spare: str):
    """Replaces every key and every string equal to the spare token by [RESET]."""
    if isinstance(value, dict):
        return {_renamed(key, spare): _renamed(item, spare) for key, item in value.items()}
    if isinstance(value, list):
        return [_renamed(item, spare) for item in value]
    return RESET if value == spare else value


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    state = json.loads(backend.to_str())
    state |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(state))
