"""Measures as they are shown: headings, values and intervals."""

from jax_backtrack.safety.measures import Measure

HEADINGS = {
    "unsafe": "unsafe",
    "shown_unsafe": "unsafe, shown",
    "refused": "refused",
    "reset": "reset",
    "draft_words": "words a draft",
    "reply_words": "words a reply",
}
_IN_WORDS = ("draft_words", "reply_words")


def cell(measure: Measure | None, name: str) -> tuple[str, str]:
    """A measure's value and interval, as they are shown."""
    if measure is None:
        return "", ""
    scale, form, unit = (1, ".1f", "") if name in _IN_WORDS else (100, ".1f", " %")
    low, value, high = (format(scale * number, form) for number in (measure.low, measure.value, measure.high))
    return f"{value}{unit}", f"{low}{' to ' if measure.low < 0 else '–'}{high}"
