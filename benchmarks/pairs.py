"""The benchmarks' data: examples of a preference file, and the same as the token sequences that TRL trains on.

With the reset mode `keep` a token tree is a set of ordinary sequences, so both sides get the very same token ids and
cuts. Only the first epoch's cuts are used, which in DPO are those of every epoch.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from jax_backtrack.backtracking.trees import Example, TreeSpec
from jax_backtrack.data import examples as examples_lib
from jax_backtrack.data import sources
from jax_backtrack.data.preferences import Report
from jax_backtrack.data.rows import TreeSource
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer

LONGEST = 512  # tokens of a sequence
SEED = 0
READ_AHEAD = 16  # preferences read for each that is asked for, since many are too long


def usable(path: str, tokenizer: ChatTokenizer, count: int) -> list[Example]:
    """The first `count` examples whose four sequences of backtracking DPO all fit into `LONGEST` tokens."""
    recipe = make_recipe("dpo", True, tokenizer)
    preferences, _ = sources.read(path, limit=READ_AHEAD * count)
    candidates = examples_lib.encode(preferences, tokenizer, recipe, 4 * LONGEST, Report())
    kept: list[Example] = []
    source = TreeSource(kept, recipe, SEED)
    for example in candidates:
        kept.append(example)  # an example's cuts depend on its number
        if longest_sequence(dpo_pairs(source, len(kept) - 1)) > LONGEST:
            kept.pop()
        if len(kept) == count:
            return kept
    raise SystemExit(f"{path}: only {len(kept)} of the first {len(preferences)} rows fit; ask for fewer with --rows")


def make_recipe(objective: str, backtrack: bool, tokenizer: ChatTokenizer) -> TreeSpec:
    return TreeSpec(objective, backtrack, "keep", tokenizer.reset_id)


def longest_sequence(pairs: list[dict]) -> int:
    return max(len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs)


def dpo_pairs(source: TreeSource, number: int) -> list[dict]:
    """The preference pairs of one example, in the columns of TRL's tokenized data."""
    example, recipe, cuts = source.examples[number], source.spec, source.cuts(0, number)
    prompt, chosen, rejected = example.prompt.tolist(), example.chosen.tolist(), example.rejected.tolist()
    if not recipe.backtrack:
        return [dict(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)]
    reset = [recipe.reset_id]
    draft, guard = cuts.draft, cuts.guard
    return [
        dict(prompt_ids=prompt + rejected[:draft], chosen_ids=reset + chosen, rejected_ids=rejected[draft:]),
        dict(prompt_ids=prompt + chosen[:guard], chosen_ids=chosen[guard:], rejected_ids=reset + rejected),
    ]


def sft_sequences(source: TreeSource, number: int) -> list[dict]:
    """The sequences of one example, one for each reply that is learned; what is context has the label -100."""
    example, recipe, cuts = source.examples[number], source.spec, source.cuts(0, number)
    prompt, chosen = example.prompt.tolist(), example.chosen.tolist()
    parts = [(prompt, chosen)]
    if recipe.backtrack:
        parts.insert(0, (prompt + example.rejected[: cuts.draft].tolist(), [recipe.reset_id, *chosen]))
    return [dict(input_ids=context + reply, labels=[-100] * len(context) + reply) for context, reply in parts]


def sequence_tokens(units: list[dict]) -> int:
    """Tokens of all sequences, padding aside: of a pair there are two, and each has the prompt."""
    return sum(
        len(unit["input_ids"])
        if "input_ids" in unit
        else 2 * len(unit["prompt_ids"]) + len(unit["chosen_ids"]) + len(unit["rejected_ids"])
        for unit in units
    )


def write(file: Path, source: TreeSource) -> dict:
    """Writes examples and sequences for the workers; gives what there is to say of them."""
    make = dpo_pairs if source.spec.objective == "dpo" else sft_sequences
    numbers = range(len(source.examples))
    units = [unit for number in numbers for unit in make(source, number)]
    examples = [
        {name: getattr(example, name).tolist() for name in ("prompt", "chosen", "rejected")}
        for example in source.examples
    ]
    file.write_text(json.dumps(dict(recipe=dataclasses.asdict(source.spec), examples=examples, units=units)))
    return dict(
        examples=len(examples),
        units=len(units),
        sequence_tokens_per_unit=sequence_tokens(units) / len(units),
        tree_tokens_per_unit=sum(source.length(0, number) for number in numbers) / len(units),
    )


def read_source(file: str) -> TreeSource:
    """What `write` was given."""
    held = json.loads(Path(file).read_text())
    examples = [
        Example(**{name: np.asarray(ids, np.int32) for name, ids in example.items()}, backtracks=True)
        for example in held["examples"]
    ]
    return TreeSource(examples, TreeSpec(**held["recipe"]), SEED)


def read_units(file: str) -> list[dict]:
    """The sequences in TRL's columns. An example's stand side by side."""
    return json.loads(Path(file).read_text())["units"]
