"""Drafts in a terminal: struck through, and with no character that a terminal obeys."""

import re

from rich.text import Text

from jax_backtrack.utils.console import console

RESET_MARK = Text(" [RESET] ", style="bold yellow")
# What a terminal would obey: escapes, the bell, "\r". Models and files may hold it as well as people.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def struck(draft: str) -> Text:
    """Returns a draft struck through, `~~so~~` where nothing can be, and [RESET] behind it."""
    draft = readable(draft)
    marked = f"~~{draft}~~" if console.color_system is None else draft
    return Text(marked, style="strike red") + RESET_MARK


def readable(text: str) -> str:
    """Returns the text with the characters that a terminal obeys shown by their numbers."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
