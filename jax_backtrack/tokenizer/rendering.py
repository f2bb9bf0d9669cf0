"""Conversations rendered by a chat template, with the control tokens that the template wrote itself."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence

from jax_backtrack.errors import InputError
from jax_backtrack.tokenizer.chat_template import ChatTemplate, map_texts
from jax_backtrack.tokenizer.control_tokens import ControlTokens
from jax_backtrack.tokenizer.untrusted import kind_for

_WANTS_PARTS = (
    ": it wants contents as lists of parts, and here they are texts. Set model.chat_template to a .jinja file that "
    "writes message.content as it is"
)


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it, and the control tokens of its own: begin, end and id of each."""

    text: str
    controls: tuple[tuple[int, int, int], ...]

    def parts(self, start: int = 0, end: int | None = None) -> list[int | str]:
        """Returns ids of control tokens and the texts between them."""
        parts: list[int | str] = []
        end = len(self.text) if end is None else end
        for begin, after, index in self.controls:
            if start <= begin and after <= end:
                parts += [self.text[start:begin], index]
                start = after
        return [part for part in (*parts, self.text[start:end]) if part != ""]


class Renderer:
    """Renders conversations, and refuses those that a template does not render whole or that steer it."""

    def __init__(self, template: ChatTemplate, controls: ControlTokens):
        self._template, self._controls = template, controls
        self._left_out: dict[tuple, frozenset[int]] = {}

    def __call__(self, messages: Sequence[Mapping], generation_prompt: bool, at: datetime.datetime) -> Rendered:
        """Returns a conversation as the template writes it at a time."""
        self._refuse_left_out(messages, generation_prompt, at)
        text = self._template.fill(messages, generation_prompt, at)
        contents: list[str] = []
        for message in messages:
            map_texts(message, lambda content: contents.append(content) or content)
        kind = kind_for(self._controls.alphabet, contents)
        blank = str.__str__(kind.hide(self._controls.alphabet[:1]))

        def filled(change) -> str:
            return self._template.fill([map_texts(message, change) for message in messages], generation_prompt, at)

        hidden = filled(kind.hide)
        if kind.show(hidden) != text:
            # The template did to a content what `Untrusted` does not follow. Where contents of one repeated character
            # give the same control tokens, all of them are its own.
            hidden = text
            if self._spelled(text) != self._spelled(filled(lambda content: blank * len(content))):
                raise InputError(
                    "a message spells a control token, and the chat template changes messages in a way that does not "
                    "show which control tokens are its own"
                )
        if spelled := {token for content in contents for token in self._spelled(content)}:
            self._refuse_steered(
                hidden, filled(lambda content: kind.hide(self._controls.blank(content, blank))), spelled
            )
        controls = ((m.start(), m.end(), self._controls.ids[m[0]]) for m in self._controls.find(hidden))
        return Rendered(text, tuple(controls))

    def _refuse_steered(self, hidden: str, without: str, spelled: set[str]) -> None:
        """Raises InputError where the template wrote other control tokens than without those that a message spells."""
        if self._spelled(hidden) != self._spelled(without):
            tokens = ", ".join(map(repr, sorted(spelled)))
            raise InputError(f"a message spells {tokens}, and the chat template writes other control tokens for that")

    def _spelled(self, text: str) -> list[str]:
        return [match[0] for match in self._controls.find(text)]

    def _refuse_left_out(self, messages: Sequence[Mapping], generation_prompt: bool, at: datetime.datetime) -> None:
        """Raises InputError where the template leaves out a message of these roles that is not empty."""
        key = (*(message["role"] for message in messages), generation_prompt)
        if key not in self._left_out:
            marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
            marked = [{**message} | {"content": mark} for message, mark in zip(messages, marks, strict=True)]
            try:
                text = self._template.fill(marked, generation_prompt, at)
            except InputError:  # it looks into contents
                text = "".join(marks)
            self._left_out[key] = frozenset(number for number, mark in enumerate(marks) if mark not in text)
        if any(messages[number]["content"].strip() for number in self._left_out[key]):
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"the chat template leaves out a message of a conversation of {roles}{self._parts_hint(at)}"
            )

    def _parts_hint(self, at: datetime.datetime) -> str:
        """Returns the remedy where the template wants contents as lists of parts, as templates of image models do."""
        mark = "\ue000"

        def writes(content) -> bool:
            return mark in self._template.fill([{"role": "user", "content": content}], True, at)

        try:
            wants_parts = not writes(mark) and writes([{"type": "text", "text": mark}])
        except InputError:
            return ""
        return _WANTS_PARTS if wants_parts else ""
