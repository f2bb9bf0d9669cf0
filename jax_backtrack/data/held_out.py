"""Keeps prompts out of training: those that test sets ask, and a share that is held out, by prompt and never by row."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence

from jax_backtrack.data import prompt_sets
from jax_backtrack.data.preferences import Preference, Report
from jax_backtrack.tokenizer.chat_tokenizer import Message

Question = tuple[str, ...]  # the words of each user message of a question
_WORD = re.compile(r"\w+")


def asked_by(entries: Iterable[str]) -> frozenset[Question]:
    """Returns the questions of prompt sets, harmful and harmless alike: the words of what a user says in each."""
    asked_questions = set()
    for entry in entries:
        for harmful in (True, False):
            _, questions = prompt_sets.read(entry, harmful, may_be_empty=True)
            asked_questions.update(tuple(_user_words(question.messages)) for question in questions)
    return frozenset(asked_questions - {()})


def asks(prompt: Sequence[Message], questions: frozenset[Question]) -> bool:
    """Returns whether a user asks one of the questions in a prompt: in any turn, whatever the system message says."""
    if not questions:
        return False
    turns = _user_words(prompt)
    spans = itertools.combinations(range(len(turns) + 1), 2)
    return any(tuple(turns[first:end]) in questions for first, end in spans)


def is_held_out(prompt: Sequence[Message], share: float) -> bool:
    """Returns whether a prompt is among the share that is held out. The same one is, or is not, in every file."""
    drawn = int.from_bytes(hashlib.blake2b(_words(prompt).encode(), digest_size=8).digest(), "little")
    return drawn < share * 2**64


def for_training(
    preferences: Sequence[Preference], questions: frozenset[Question], share: float, report: Report
) -> list[Preference]:
    """Returns the preferences to train on; the others are counted in `report`."""
    usable = []
    for preference in preferences:
        if asks(preference.prompt, questions):
            report.drop("data.exclude asks its prompt", preference.origin)
        elif is_held_out(preference.prompt, share):
            report.drop("its prompt is held out (data.held_out_fraction)", preference.origin)
        else:
            usable.append(preference)
    return usable


def _words(prompt: Sequence[Message]) -> str:
    """Returns what is said, without case and punctuation."""
    return "\n".join(map(_message_words, prompt))


def _user_words(prompt: Sequence[Message]) -> list[str]:
    """Returns what each message of a user says that has a word."""
    return list(filter(None, (_message_words(message) for message in prompt if message["role"] == "user")))


def _message_words(message: Message) -> str:
    return " ".join(_WORD.findall(message["content"].casefold()))
