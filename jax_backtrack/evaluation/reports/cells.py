"""Measures as they are shown: headings, values and intervals."""

from jax_backtrack.evaluation.measures import Measure

HEADINGS = {
    "unsafe": "unsafe",
    "shown_unsafe": "unsafe, shown",
    "refused": "refused",
    "won": "preferred",
    "reset": "reset",
    "reset_word_leak": "reset word leak",
    "draft_words": "words a draft",
    "reply_words": "words a reply",
    "tokens": "tokens written",
}
LENGTHS = ("draft_words", "reply_words", "tokens")
_NOT_SHARES = (*LENGTHS, "perplexity")


def cell(measure: Measure | None, name: str) -> tuple[str, str]:
    """A measure's value and interval, as they are shown."""
    if measure is None:
        return "", ""
    scale, form, unit = (1, ".1f", "") if name in _NOT_SHARES else (100, ".1f", " %")
    low, value, high = (format(scale * number, form) for number in (measure.low, measure.value, measure.high))
    return f"{value}{unit}", f"{low}{' to ' if measure.low < 0 else '–'}{high}"


def in_line(measure: Measure | None, name: str) -> str:
    """A measure's value with its interval in brackets."""
    value, interval = cell(measure, name)
    return f"{value} ({interval})" if value else ""
