"""Text of a message as a chat template handles it: it looks like the text, and the template's output shows its origin.

Each character that control tokens are spelled with is stored as a private-use character, its stand-in. So a control
token that appears in a rendered conversation was written by the template alone, whatever the template did to the
contents: joined, trimmed, split or changed them to upper case.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import ClassVar

from jax_backtrack.errors import InputError

_FIRST, _LAST = 0xF0000, 0x10FFFD  # the private-use planes


class Untrusted(str):
    """A text whose characters may be stand-ins. A template that looks into it finds the true text.

    Subclasses, one per set of stand-ins, have the tables: `_hidden` maps characters to stand-ins, `_shown` maps back.
    Where an operation is missing here, a template gets a plain text with stand-ins, and what it renders differs from
    what it renders of the true text: the caller compares the two.
    """

    _hidden: ClassVar[dict[int, int]] = {}
    _shown: ClassVar[dict[int, int]] = {}

    @classmethod
    def hide(cls, text: str) -> "Untrusted":
        """Returns the text with every character that has a stand-in replaced by it."""
        return cls(text.translate(cls._hidden))

    @classmethod
    def show(cls, text):
        """Returns the true text; what is no text as it is."""
        return str.translate(text, cls._shown) if isinstance(text, str) else text

    @property
    def _true(self) -> str:
        return self.show(self)

    def _like(self, text: str) -> "Untrusted":
        """Returns what an operation made of the true text. Each character comes from where the one in its place did."""
        if len(text) != len(self):
            return self.hide(text)
        hidden, stored = self.hide(text), str.__str__(self)
        return type(self)("".join(hidden[i] if ord(stored[i]) in self._shown else text[i] for i in range(len(text))))

    def _slices(self, pieces: Iterable[str]) -> list["Untrusted"]:
        """Returns the pieces of the true text, which stand in it one after the other, as pieces of this one."""
        slices, start, true = [], 0, self._true
        for piece in pieces:
            start = true.index(piece, start)
            slices.append(self[start : start + len(piece)])
            start += len(piece)
        return slices

    # What gives texts.

    def __str__(self):
        return self

    def __add__(self, other):
        return type(self)(str.__add__(self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other):
        return type(self)(str.__add__(other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times):
        return type(self)(str.__mul__(self, times))

    __rmul__ = __mul__

    def __getitem__(self, place):
        return type(self)(str.__getitem__(self, place))

    def __iter__(self):
        return map(type(self), str.__iter__(self))

    def lstrip(self, chars=None, /):
        return self[len(self) - len(self._true.lstrip(self.show(chars))) :]

    def rstrip(self, chars=None, /):
        return self[: len(self._true.rstrip(self.show(chars)))]

    def strip(self, chars=None, /):
        return self.lstrip(chars).rstrip(chars)

    def split(self, sep=None, maxsplit=-1):
        return self._between(self._true.split(self.show(sep), maxsplit), sep)

    def rsplit(self, sep=None, maxsplit=-1):
        return self._between(self._true.rsplit(self.show(sep), maxsplit), sep)

    def _between(self, pieces: Sequence[str], sep: str | None) -> list["Untrusted"]:
        if sep is None:
            return self._slices(pieces)
        starts = [0]
        for piece in pieces:
            starts.append(starts[-1] + len(piece) + len(sep))
        return [self[start : start + len(piece)] for start, piece in zip(starts, pieces, strict=False)]

    def splitlines(self, keepends=False):
        whole = self._slices(self._true.splitlines(keepends=True))
        return whole if keepends else [line[: len(line._true.splitlines()[0])] for line in whole]

    def partition(self, sep, /):
        before, separator, _ = self._true.partition(self.show(sep))
        end = len(before) + len(separator)
        return self[: len(before)], self[len(before) : end], self[end:]

    def rpartition(self, sep, /):
        before, separator, _ = self._true.rpartition(self.show(sep))
        end = len(before) + len(separator)
        return self[: len(before)], self[len(before) : end], self[end:]

    def replace(self, old, new, count=-1, /):
        if not old:
            return self.hide(self._true.replace(old, self.show(new), count))
        return type(self)(str.join(new, self.split(old, count)))

    def removeprefix(self, prefix, /):
        return self[len(self) - len(self._true.removeprefix(self.show(prefix))) :]

    def removesuffix(self, suffix, /):
        return self[: len(self._true.removesuffix(self.show(suffix)))]

    def join(self, texts, /):
        return type(self)(str.join(self, texts))


def concat(parts: Iterable[str]) -> str:
    """Joins what a template writes: in a macro or a block of its own too, untrusted text stays such."""
    parts = list(parts)
    whole = "".join(parts)
    kind = next((type(part) for part in parts if isinstance(part, Untrusted)), str)
    return whole if kind is str else kind(whole)


def _on_true_text(name: str, gives_text: bool):
    operation = getattr(str, name)

    @functools.wraps(operation)
    def method(self, *arguments):
        shown = [
            tuple(map(self.show, argument)) if isinstance(argument, tuple) else self.show(argument)
            for argument in arguments
        ]
        result = operation(self._true, *shown)
        return self._like(result) if gives_text else result

    return method


for _name in ("upper", "lower", "title", "capitalize", "casefold", "swapcase"):
    setattr(Untrusted, _name, _on_true_text(_name, gives_text=True))
for _name in """
    __contains__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ find rfind index rindex count startswith endswith
    encode isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper
""".split():
    setattr(Untrusted, _name, _on_true_text(_name, gives_text=False))


@functools.lru_cache(maxsize=16)
def _kind(alphabet: str, first: int) -> type[Untrusted]:
    """Returns untrusted texts whose stand-ins begin at the code point `first`."""
    hidden = {ord(character): first + place for place, character in enumerate(alphabet)}
    return type("Untrusted", (Untrusted,), {"_hidden": hidden, "_shown": {to: back for back, to in hidden.items()}})


def kind_for(alphabet: str, texts: Sequence[str]) -> type[Untrusted]:
    """Returns a kind of untrusted text with stand-ins for the characters of `alphabet` that no text contains."""
    high = [text for text in texts if not text.isascii() and max(text) >= chr(_FIRST)]
    code_points = {ord(character) for text in high for character in text}
    for first in range(_FIRST, _LAST - len(alphabet), max(len(alphabet), 1)):
        if code_points.isdisjoint(range(first, first + len(alphabet))):
            return _kind(alphabet, first)
    raise InputError("a conversation contains nearly all private-use characters: its chat template cannot be rendered")
