"""Preferences to examples in token ids, with the account of those that do not fit."""

import hashlib
from collections.abc import Sequence

import numpy as np

from jax_backtrack.data.preferences import Preference, Report
from jax_backtrack.errors import InputError
from jax_backtrack.hub.tokenizer import ChatTokenizer
from jax_backtrack.trees import Cuts, Example, Recipe, shortest_draft, tree_length


def encode(
    preferences: Sequence[Preference], tokenizer: ChatTokenizer, recipe: Recipe, row_length: int, report: Report
) -> list[Example]:
    """Renders and encodes preferences; drops, and counts in `report`, what the recipe cannot use or a row not hold."""
    examples = []
    for preference in preferences:
        reason, example = _encode_one(preference, tokenizer, recipe, row_length)
        if reason:
            report.drop(reason, preference.origin)
        else:
            examples.append(example)
    report.used = len(examples)
    if not examples:
        raise InputError("no example is left to train on: " + "; ".join(report.lines()))
    return examples


def content_hash(examples: Sequence[Example]) -> str:
    """A hash of everything that training sees of the examples."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        for ids in (example.prompt, example.chosen, example.rejected):
            digest.update(b"-" if ids is None else len(ids).to_bytes(4, "little") + ids.tobytes())
        digest.update(bytes([example.backtracks]))
    return digest.hexdigest()


def _encode_one(
    preference: Preference, tokenizer: ChatTokenizer, recipe: Recipe, row_length: int
) -> tuple[str | None, Example | None]:
    """The reason to drop a preference, or its example."""
    if recipe.objective == "dpo" and preference.rejected is None:
        return "no rejected reply for a preference pair", None
    try:
        prompt = tokenizer.render(preference.prompt)
        chosen = tokenizer.encode(preference.chosen)
        rejected = None if preference.rejected is None else tokenizer.encode(preference.rejected)
    except InputError as error:
        return str(error), None
    example = Example(prompt, chosen, rejected, preference.backtracks, preference.origin)
    # Whatever the recipe: drafts are drawn for every pair.
    if rejected is not None and shortest_draft(chosen, rejected) > len(rejected):
        return "the rejected reply is a prefix of the chosen one", None
    longest = Cuts(draft=0 if rejected is None else len(rejected), guard=len(chosen))
    if tree_length(example, recipe, longest) > row_length:
        return f"over-long: the tree has more than train.row_length = {row_length} tokens", None
    return None, example


def cuts_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers for the cuts of one example in one epoch, whatever was drawn before."""
    return np.random.default_rng([seed, epoch, index])
