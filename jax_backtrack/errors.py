"""The one exception that a user's input can cause."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something given to jax_backtrack is wrong: says what, where, and what would mend it."""

    def __str__(self) -> str:
        """The message, fit to be printed: what it quotes of the input need not be valid Unicode."""
        return super().__str__().encode(errors="backslashreplace").decode()


def nearest(wrong: str, right: Iterable[str]) -> str:
    """A clause that names the entry of `right` closest to `wrong`, or lists all of them."""
    right = sorted(right)
    close = difflib.get_close_matches(wrong, right, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(right)}"
