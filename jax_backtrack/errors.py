"""The one exception that a user's input can cause."""

import difflib
import re
from collections.abc import Iterable


class InputError(ValueError):
    """Something given to jax_backtrack is wrong: says what, where, and what would mend it."""

    def __str__(self) -> str:
        """Returns the message, fit to be printed: what it quotes of the input need not be valid Unicode."""
        return super().__str__().encode(errors="backslashreplace").decode()


def nearest(wrong: str, right: Iterable[str]) -> str:
    """Returns a clause that names the entry of `right` that `wrong` is a misspelling of, or lists all of them.

    Names with other numbers or another first letter are names of other things: "gemma" is no "gemma2", "float16" no
    "bfloat16", "HarmBench" no "AdvBench".
    """
    right = sorted(right)
    alike = [name for name in right if _kind(name) == _kind(wrong)]
    close = difflib.get_close_matches(wrong, alike, n=1, cutoff=0.5)
    if not close:
        close = [name for name in alike if name.casefold() == wrong.casefold()]
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(right)}"


def _kind(name: str) -> tuple[str, list[str]]:
    """Returns the first letter and the digits, these in any order: they are mistyped too."""
    return name[:1].casefold(), sorted(re.findall(r"\d", name))
