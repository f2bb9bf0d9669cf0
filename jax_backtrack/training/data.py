"""Reads a recipe's data and encodes it, as training and the look at the data before it both do."""

import dataclasses

from ml_collections import ConfigDict
from rich.markup import escape

from jax_backtrack.backtracking.trees import Example, TreeSpec
from jax_backtrack.data import held_out, sources
from jax_backtrack.data.examples import encode_each
from jax_backtrack.data.preferences import Preference, Report
from jax_backtrack.data.reading.files import split_paths
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.utils.console import console


@dataclasses.dataclass(frozen=True)
class Source:
    """One path of a recipe's data: its preferences that may be trained on, and the account of its rows.

    epochs: over this data for each one over the others
    """

    path: str
    utility: bool
    preferences: list[Preference]
    report: Report
    epochs: int


def read_sources(config: ConfigDict) -> list[Source]:
    """Reads safety and utility data of the recipe, without the prompts that are held out."""
    sources, excluded = [], held_out.asked_by(config.data.exclude)
    for utility in (False, True):
        with console.status(escape(f"reading {', '.join(data_paths(config, utility=utility))}")):
            records = read_data(config, utility=utility)
        for path, preferences, report in records:
            usable = held_out.for_training(preferences, excluded, config.data.held_out_fraction, report)
            sources.append(Source(path, utility, usable, report, config.data.utility_epochs if utility else 1))
    return sources


def tree_spec(config: ConfigDict, tokenizer: ChatTokenizer) -> TreeSpec:
    """Returns the part of a recipe that says how examples become trees."""
    return TreeSpec(
        objective=config.objective,
        backtrack=config.data.backtrack,
        reset_mode=config.reset.mode,
        reset_id=tokenizer.reset_id,
        reset_weight=config.train.reset_weight,
        initial_reply_weight=config.train.initial_reply_weight,
    )


def encode_source(
    source: Source, tokenizer: ChatTokenizer, spec: TreeSpec, config: ConfigDict
) -> list[tuple[Preference, Example]]:
    """Encodes the preferences of a path, each with its example; prints the account of the path."""
    with console.status(escape(f"encoding {source.path}")):
        max_seq_len, max_response_length = config.train.max_seq_len, config.data.max_response_length
        encoded = encode_each(source.preferences, tokenizer, spec, max_seq_len, source.report, max_response_length)
    for line in source.report.lines():
        console.print(f"{source.path}: {line}", highlight=False, markup=False)
    return encoded


def encode_sources(
    sources: list[Source], tokenizer: ChatTokenizer, spec: TreeSpec, config: ConfigDict
) -> list[Example]:
    """Encodes all sources; prints the account of each, and says so where nothing of them can be taken back."""
    examples = []
    for source in sources:
        examples += source.epochs * [example for _, example in encode_source(source, tokenizer, spec, config)]
    warn_if_nothing_is_taken_back(examples, spec)
    return examples


def warn_if_nothing_is_taken_back(examples: list[Example], spec: TreeSpec) -> None:
    """Says so where a training that is to teach `[RESET]` has no example with an unsafe reply."""
    if spec.backtrack and not any(example.backtracks for example in examples):
        what = "no [RESET] is learned" if spec.objective == "sft" else "only guard pairs hold a [RESET]"
        console.print(
            f"of {len(examples)} examples none has an unsafe reply to take back: {what}. Safety pairs, with chosen and "
            "rejected replies, belong in data.path; data.backtrack=False says that this is meant",
            style="yellow",
            highlight=False,
            markup=False,
        )


def read_data(config: ConfigDict, *, utility: bool) -> list[tuple[str, list[Preference], Report]]:
    """Reads the recipe's safety data, or its utility data: each path with its preferences and their account."""
    data = config.data
    records = []
    for path in data_paths(config, utility=utility):
        preferences, report = sources.read(
            path,
            utility=utility,
            split=data.split,
            format=data.format or None,
            limit=data.limit or None,
            columns=data.columns.to_dict(),
            config_name=data.config_name,
        )
        records.append((path, preferences, report))
    return records


def data_paths(config: ConfigDict, *, utility: bool) -> list[str]:
    """Returns the paths of the recipe's safety data, or of its utility data."""
    path = config.data.utility_path if utility else config.data.path
    return split_paths(path) if path else []
