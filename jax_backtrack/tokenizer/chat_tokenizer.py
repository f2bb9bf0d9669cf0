"""The tokenizer as this project uses it: chat templates in, ids out, and text that can never become a special token.

Ids of control tokens come from the chat template alone (`untrusted.py` shows what a template wrote itself). What a
user, a data row or an attack wrote is encoded by a copy of the tokenizer that does not know them, so "[RESET]" or
"<|im_end|>" in it stays plain text.
"""

import dataclasses
import datetime
import functools
import json
import reprlib
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import transformers
from tokenizers import AddedToken

from jax_backtrack.errors import InputError, nearest
from jax_backtrack.tokenizer import chat_template as templates
from jax_backtrack.tokenizer.control_tokens import NOT_UNICODE, ControlTokens
from jax_backtrack.tokenizer.rendering import Rendered, Renderer
from jax_backtrack.utils.unicode import is_unicode

RESET = "[RESET]"
ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # role, content

# Spare entries that vocabularies keep: Llama-3, Gemma-2, SmolLM2. The first one that is there becomes [RESET].
_SPARE_TOKENS = ("<|reserved_special_token_0|>", "<unused0>", "<reponame>")


@dataclasses.dataclass(frozen=True)
class Turn:
    """A prompt and the reply to it as the chat template writes the whole conversation, in ids, int32.

    prompt:  what the sampler prefills
    reply:   what follows up to and with the end of turn: the template's own text around the reply too
    begun:   what follows of a reply that goes on: without the template's text after it, and without an end of turn
    changed: whether the template wrote the reply otherwise than it was given, white space around it aside
    joined:  whether the tokenizer would make one token of the white space that the reply begins with and the end of the
             prompt. The reply is then encoded by itself, as it is sampled after that prompt
    """

    prompt: np.ndarray
    reply: np.ndarray
    begun: np.ndarray
    changed: bool
    joined: bool


class ChatTokenizer:
    """A fast Hugging Face tokenizer (`hf`) with a chat template, kept safe from what the text spells.

    eot_id:        id of the token that ends the assistant's turn in the chat template
    closing:       what the template writes between a reply and its end of turn
    reset_id:      id of `[RESET]`, or None where the vocabulary has none yet (see `with_reset`)
    reset_mode: the reset mode that the model was trained with, or None for a model that was not
    chat_template: a template to use in place of the tokenizer's own, which `hf` then keeps: "chatml", "gemma2",
                   "llama3", or the path of a .jinja file
    template_date: the day that a chat template which prints the date prints; None for today
    """

    def __init__(
        self,
        hf: transformers.PreTrainedTokenizerFast,
        reset_mode: str | None = None,
        chat_template: str = "",
        template_date: datetime.date | None = None,
    ):
        if not hf.is_fast:
            raise InputError(f"{type(hf).__name__} is a slow tokenizer; the model needs a tokenizer.json")
        if chat_template:
            hf.chat_template = templates.read_template(chat_template, hf)
        if not hf.chat_template:
            raise InputError(
                "the tokenizer has no chat template, as is usual for a base model: "
                f"set chat_template (in a recipe, model.chat_template) to {', '.join(sorted(templates.TEMPLATES))} "
                "or to the path of a .jinja file"
            )
        if isinstance(hf.chat_template, str):
            hf.chat_template = hf.chat_template.removeprefix("\ufeff")  # a byte order mark, which is no text
        self.hf = hf
        self.reset_mode = reset_mode
        self.template_date = template_date
        self._template = templates.ChatTemplate(hf)
        self._controls = ControlTokens(hf.backend_tokenizer)
        self._render = Renderer(self._template, self._controls)
        self._refuse_leaks()
        # Whether [RESET] came in a file that does not say which reset mode it was trained for.
        self.asks_reset_mode = False
        self.without_row: dict[int, str] = {}  # tokens that the model's embedding has no row for, by id
        self._contradiction = ""
        self.eot_id, self._opening, self.closing = self._frame()

    def note_rows(self, rows: int) -> None:
        """Notes that the embedding has so many rows: a text or a template that needs a token beyond them is refused."""
        self.without_row = {index: token for token, index in self.hf.get_vocab().items() if index >= rows}

    def unused_ids(self, rows: int) -> tuple[tuple[int, int], ...]:
        """Ids below `rows` that are no token, which a model must not write: first and one behind the last of each run.

        Vocabularies are padded to a multiple of some number, and such rows are not trained.
        """
        unused = np.ones(rows + 2, bool)  # with a used one at either end, so that every run begins and ends
        unused[[0, -1]] = False
        ids = [index for index in self.hf.get_vocab().values() if index < rows and index not in self.without_row]
        unused[np.asarray(ids, int) + 1] = False
        edges = np.flatnonzero(np.diff(unused))
        return tuple((int(first), int(behind)) for first, behind in zip(edges[::2], edges[1::2], strict=True))

    @property
    def special_ids(self) -> set[int]:
        """Ids of the special tokens, [RESET] and the end of turn among them."""
        return {index for index, token in self.hf.added_tokens_decoder.items() if token.special} | {self.eot_id}

    @property
    def reset_id(self) -> int | None:
        index = self._controls.ids.get(RESET)
        return index if index in self.special_ids else None

    @property
    def control_ids(self) -> dict[str, int]:
        """Ids of the tokens that text never becomes, [RESET] among them, by how they are spelt."""
        return dict(self._controls.ids)

    @property
    def largest_id(self) -> int:
        """The largest id that the tokenizer can give; the model's vocabulary must be larger."""
        return max(self.hf.get_vocab().values())

    @property
    def prints_date(self) -> bool:
        """Returns whether the chat template may print the date."""
        return self._template.reads_clock

    def encode(self, text: str) -> np.ndarray:
        """Ids of untrusted text, int32 `[tokens]`: never a control token, whatever the text spells."""
        return self._with_rows(self._controls.encode_text(text))

    def encode_parts(self, parts: Sequence[int | str]) -> np.ndarray:
        """Returns ids of untrusted texts with control tokens between them, as of `render_parts`, int32 `[tokens]`."""
        return self._with_rows(self._controls.encode_parts(parts))

    def loses_characters(self, text: str) -> bool:
        """Returns whether the ids of a text stand for another text, white space and NFKC spellings aside."""
        return _signs(self.hf.decode(self.encode(text), clean_up_tokenization_spaces=False)) != _signs(text)

    def render(self, messages: Sequence[Message]) -> np.ndarray:
        """Ids of a conversation up to where the assistant speaks, int32 `[tokens]`, by the model's own template."""
        return self.encode_parts(self.render_parts(messages))

    def render_parts(self, messages: Sequence[Message], begun: str = "") -> list[int | str]:
        """Returns what `render` encodes: ids of the template's control tokens, and the texts that stand between them.

        begun: first words of the reply, which follow what the template writes before a reply
        """
        check_messages(messages)
        parts = self._render(messages, True, self._now()).parts()
        return [*parts, *self._opening, begun] if begun else parts

    def begin_reply(self, words: str) -> np.ndarray:
        """Returns ids of a reply's first words after what the template writes before a reply; none where there are no
        words, int32 `[tokens]`."""
        return self.encode_parts([*self._opening, words] if words else [])

    def render_turns(self, messages: Sequence[Message], replies: Sequence[str]) -> list[Turn]:
        """Returns, for each reply to a prompt, what the template writes of the conversation of both.

        Raises InputError where the ids of that conversation do not begin with those of the prompt, which the sampler
        prefills: the model would be trained on something else than it sees.
        """
        check_messages(messages)
        at = self._now()
        before = self._render(messages, True, at)
        prompt = self.encode_parts(before.parts())
        return [self._turn(messages, reply, before, prompt, at) for reply in replies]

    def _turn(self, messages, reply: str, before: Rendered, prompt: np.ndarray, at: datetime.datetime) -> Turn:
        whole = [*messages, {"role": "assistant", "content": reply}]
        check_messages(whole)
        after, start = self._render(whole, False, at), len(before.text)
        if after.parts(0, start) != before.parts():
            raise InputError(self._contradiction or _contradiction())
        end, tail = self._end_of(after, start)
        self._refuse_early_end([part for part in after.parts(start, end) if not isinstance(part, str)])
        if tail.strip() and self._render(whole, True, at) != after:
            raise InputError("the chat template writes text after the end of a turn, which would not be learned")
        reply_text = after.text[start:end].removesuffix(self.closing)
        if not reply_text.removeprefix(self._spell(self._opening)).strip():
            raise InputError("the chat template leaves nothing of a reply")
        # From the last control token of the prompt on: no token of the vocabulary crosses one.
        last = max((begin for begin, _, _ in before.controls), default=0)
        shared = len(self.encode_parts(before.parts(last)))
        ids = self.encode_parts(after.parts(last, end))
        joined = not np.array_equal(ids[:shared], prompt[len(prompt) - shared :])
        if joined:
            if not reply[:1].isspace():
                raise InputError(
                    "the tokenizer splits the end of the generation prompt otherwise where the reply follows it: leave "
                    "out the white space at the end of the template's generation prompt"
                )
            last, shared = start, 0  # the reply by itself, as sampling writes it
            ids = self.encode_parts(after.parts(last, end))
        begun = self.encode_parts(after.parts(last, start + len(reply_text))) if self.closing else ids
        reply_ids = np.append(ids[shared:], np.int32(self.eot_id))
        return Turn(prompt, reply_ids, begun[shared:], changed=reply.strip() not in reply_text, joined=joined)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out."""
        # Llama-3's tokenizer_config.json asks for a clean-up that would make "." of " .".
        return self.hf.decode(list(map(int, ids)), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_reply(self, ids: Sequence[int]) -> str:
        """Returns the text of a reply's ids as it goes into a conversation: without what the template writes around it.

        What it writes after a reply stands before the end of turn, and goes where that is the last id.
        """
        return self.without_frame(self.decode(ids), ended=len(ids) > 0 and ids[-1] == self.eot_id)

    def without_frame(self, text: str, ended: bool) -> str:
        """Returns a decoded reply without what the template writes around it; `ended` with its end of turn."""
        text = text.removeprefix(self.opening)
        return text.removesuffix(self.closing) if ended else text

    @functools.cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of the tokens that stand for single bytes, where the tokenizer falls back to these."""
        vocabulary = self.hf.get_vocab()
        return frozenset(vocabulary[token] for byte in range(256) if (token := f"<0x{byte:02X}>") in vocabulary)

    @functools.cached_property
    def opening(self) -> str:
        """What the template writes between the generation prompt and a reply, as `decode` gives it."""
        return self.decode(self.encode_parts(self._opening))

    def opened(self, reply: np.ndarray) -> int:
        """Returns how many of a reply's ids hold nothing but what the template writes before a reply."""
        opening = self.encode_parts([*self._opening, "\ue000"])  # before a text, as it may be split otherwise at an end
        same = opening[: len(reply)] == reply[: len(opening)]
        return len(same) if same.all() else int(np.argmin(same))

    def check_opening(self) -> None:
        """Raises InputError where a reply cannot be sampled: it begins with a special token, at which it would end."""
        self._refuse_early_end([part for part in self._opening if not isinstance(part, str)])

    def _refuse_early_end(self, controls: Sequence[int]) -> None:
        if ends := self.special_ids.intersection(controls):
            names = ", ".join(sorted(repr(self.hf.convert_ids_to_tokens(index)) for index in ends))
            raise InputError(
                f"the chat template writes {names} after its generation prompt and before the end of a reply, where "
                "sampling ends: set model.chat_template to a .jinja file whose generation prompt ends where a reply "
                "begins"
            )

    def _now(self) -> datetime.datetime:
        date = self.template_date
        return templates.now() if date is None else datetime.datetime.combine(date, datetime.time())

    def _spell(self, parts: Sequence[int | str]) -> str:
        spelled = {index: token for token, index in self._controls.ids.items()}
        return "".join(part if isinstance(part, str) else spelled[part] for part in parts)

    def _with_rows(self, ids: list[int]) -> np.ndarray:
        if self.without_row and (lost := [index for index in ids if index in self.without_row]):
            raise InputError(
                f"the token {self.without_row[lost[0]]!r} (id {lost[0]}) has no row in the model's embedding, which "
                f"ends before {min(self.without_row)}: this model cannot read it"
            )
        return np.asarray(ids, np.int32)

    def _refuse_leaks(self) -> None:
        """Refuses vocabularies that find a control token in plain text even where it is not known as an added token."""
        for token, index in self._controls.ids.items():
            if index != self.hf.unk_token_id and index in self._controls.encode_text(token):
                raise InputError(
                    f"this tokenizer reads {token!r} in plain text as its special token; "
                    "load(..., tokenizer=False) gives the model without it"
                )

    def _frame(self) -> tuple[int, list[int | str], str]:
        """Returns the id that ends the assistant's turn, and what the template writes before and after a reply."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "\ue000a\ue001"}
        at = self._now()
        whole = self._render([question, answer], False, at)
        begin, end = whole.text.rfind("\ue000"), whole.text.rfind("\ue001") + 1
        after = next((control for control in whole.controls if control[0] >= end), None)
        if after is None:
            raise InputError(
                "the chat template ends the assistant's turn with no special token of this tokenizer: "
                f"behind the message stands {whole.text[end:]!r}"
            )
        before = self._render([question], True, at)
        start, opening = len(before.text), []
        if whole.parts(0, start) == before.parts():
            opening = whole.parts(start, begin)
        else:  # it can be sampled with, but not trained on
            self._contradiction = _contradiction(_difference(before.text, whole.text))
        return after[2], opening, whole.text[end : after[0]]

    def _end_of(self, whole: Rendered, start: int) -> tuple[int, str]:
        """Returns where the turn that begins at `start` ends, and the text of what follows its end of turn."""
        for begin, end, index in whole.controls:
            if begin >= start and index == self.eot_id:
                return begin, "".join(part for part in whole.parts(end) if isinstance(part, str))
        raise InputError("the chat template writes no end of turn after this reply")


def _signs(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _contradiction(where: str = "") -> str:
    return (
        f"the chat template contradicts itself: with the reply it writes the prompt otherwise{where}. The model would "
        "be trained on a prompt that it never sees: set model.chat_template to a .jinja file that writes both alike"
    )


def _difference(prompt: str, whole: str) -> str:
    """Returns a clause with the place from which on a conversation and its prompt differ."""
    pairs = zip(prompt, whole, strict=False)
    shared = next((place for place, (left, right) in enumerate(pairs) if left != right), min(len(prompt), len(whole)))
    return f" ({whole[max(shared - 20, 0) :][:40]!r}, where the prompt has {prompt[max(shared - 20, 0) :][:40]!r})"


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
            roles = nearest(role if isinstance(role, str) else "", ROLES)
            raise InputError(f"message {number} has the role {reprlib.repr(role)}: {roles}")
        if not is_unicode(message["content"]):
            raise InputError(f"message {number} {NOT_UNICODE}")


def with_reset(tokenizer: ChatTokenizer) -> ChatTokenizer:
    """Returns a tokenizer with the special token `[RESET]`: a spare token renamed, or else a new last entry.

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
    extended = ChatTokenizer(hf, tokenizer.reset_mode, template_date=tokenizer.template_date)
    extended.without_row = {
        index: token for index, token in tokenizer.without_row.items() if index != extended.reset_id
    }
    return extended
