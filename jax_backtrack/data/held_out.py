"""Keeps prompts out of training: those that test sets ask, and a share that is held out, by prompt and never by row."""

import hashlib
import re
from collections.abc import Iterable, Sequence

from jax_backtrack.data import prompt_sets
from jax_backtrack.data.preferences import Preference, Report
from jax_backtrack.tokenizer.chat_tokenizer import Message

_WORD = re.compile(r"\w+")


def asked_by(entries: Iterable[str]) -> frozenset[str]:
    """What the prompt sets ask, harmful and harmless alike, each reduced to its words."""
    asked = set()
    for entry in entries:
        for harmful in (True, False):
            _, questions = prompt_sets.read(entry, harmful, may_be_empty=True)
            asked.update(_words(question.messages) for question in questions)
    return frozenset(asked)


def is_held_out(prompt: Sequence[Message], share: float) -> bool:
    """Returns whether a prompt is among the share that is held out. The same one is, or is not, in every file."""
    drawn = int.from_bytes(hashlib.blake2b(_words(prompt).encode(), digest_size=8).digest(), "little")
    return drawn < share * 2**64


def for_training(
    preferences: Sequence[Preference], asked: frozenset[str], share: float, report: Report
) -> list[Preference]:
    """The preferences to train on; the others are counted in `report`."""
    kept = []
    for preference in preferences:
        if _words(preference.prompt) in asked:
            report.drop("data.exclude asks its prompt", preference.origin)
        elif is_held_out(preference.prompt, share):
            report.drop("its prompt is held out (data.held_out)", preference.origin)
        else:
            kept.append(preference)
    return kept


def _words(prompt: Sequence[Message]) -> str:
    """What is said, without case and punctuation."""
    return "\n".join(" ".join(_WORD.findall(message["content"].casefold())) for message in prompt)
