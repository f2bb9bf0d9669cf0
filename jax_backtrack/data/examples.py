"""Preferences to examples in token ids, with the account of those that do not fit."""

import hashlib
from collections.abc import Sequence

import numpy as np

from jax_backtrack.backtracking.trees import Cuts, Example, TreeSpec, common_beginning, shortest_draft, tree_length
from jax_backtrack.data.preferences import NoUsableRow, Preference, Report
from jax_backtrack.errors import InputError
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer


def encode(
    preferences: Sequence[Preference],
    tokenizer: ChatTokenizer,
    spec: TreeSpec,
    max_seq_len: int,
    report: Report,
    max_response_length: int = 0,
) -> list[Example]:
    """Renders and encodes preferences; drops, and counts in `report`, what the objective cannot use or a row not hold.

    The first `max_response_length` tokens of a reply are used, its end of turn among them; all for 0. Those cut are
    counted.
    """
    return [
        example for _, example in encode_each(preferences, tokenizer, spec, max_seq_len, report, max_response_length)
    ]


def encode_each(
    preferences: Sequence[Preference],
    tokenizer: ChatTokenizer,
    spec: TreeSpec,
    max_seq_len: int,
    report: Report,
    max_response_length: int = 0,
) -> list[tuple[Preference, Example]]:
    """Encodes as `encode` does, and returns each example with the preference that it was made of."""
    encoded = []
    for preference in preferences:
        reason, example = _encode_one(preference, tokenizer, spec, max_seq_len, max_response_length, report)
        if reason:
            report.drop(reason, preference.origin)
        else:
            encoded.append((preference, example))
    report.used = len(encoded)
    if not encoded:
        raise NoUsableRow("no example is left to train on", report)
    return encoded


def content_hash(examples: Sequence[Example]) -> str:
    """Returns a hash of everything that training sees of the examples."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        for ids in (example.prompt, example.chosen, example.rejected):
            digest.update(b"-" if ids is None else len(ids).to_bytes(4, "little") + ids.tobytes())
        digest.update(f"{example.backtracks:d}".encode())
    return digest.hexdigest()


def _encode_one(
    preference: Preference,
    tokenizer: ChatTokenizer,
    spec: TreeSpec,
    max_seq_len: int,
    max_response_length: int,
    report: Report,
) -> tuple[str | None, Example | None]:
    """Returns the reason to drop a preference, or its example; counts in `report` where its texts are not used as they
    are."""
    if spec.objective == "dpo" and preference.rejected is None:
        return "no rejected reply for a preference pair", None
    replies = [preference.chosen] if preference.rejected is None else [preference.chosen, preference.rejected]
    try:
        chosen, *others = tokenizer.render_turns(preference.prompt, replies)
    except InputError as error:
        return str(error), None
    turns = [chosen.reply if preference.whole else chosen.begun, *(other.reply for other in others)]
    # What the template writes before a reply is none of its tokens.
    limit = max_response_length + tokenizer.opened(turns[0]) if max_response_length else None
    chosen_ids, *rejected = (ids[:limit] for ids in turns)
    example = Example(chosen.prompt, chosen_ids, *(rejected or [None]), preference.backtracks, preference.origin)
    longest = Cuts(draft=0, guard=0)
    # Drafts are drawn for every pair, whatever the objective. Text of the template after a reply tells no two apart.
    if example.rejected is not None:
        longest = Cuts(draft=len(example.rejected) - 1, guard=0)
        own = min(common_beginning(example.rejected, others[0].begun), longest.draft)
        if shortest_draft(chosen_ids, example.rejected) > own:
            return "the rejected reply is a prefix of the chosen one", None
    if tree_length(example, spec, longest) > max_seq_len:
        return f"over-long: the tree has more than train.max_seq_len = {max_seq_len} tokens", None
    if any(turn.changed for turn in (chosen, *others)):
        report.alter("rows with a reply that the chat template changes", preference.origin)
    if any(turn.joined for turn in (chosen, *others)):
        report.alter(
            "rows with a reply whose first white space is not joined to the prompt's as one token", preference.origin
        )
    texts = [message["content"] for message in preference.prompt] + replies
    if any(map(tokenizer.loses_characters, texts)):
        report.alter("rows with characters that the tokenizer does not have", preference.origin)
    report.cut += sum(limit is not None and len(ids) > limit for ids in (turns if preference.whole else turns[1:]))
    report.unfinished += not preference.whole
    return None, example


def cuts_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Returns random numbers for the cuts of one example in one epoch, whatever was drawn before."""
    return np.random.default_rng([seed, epoch, index])
