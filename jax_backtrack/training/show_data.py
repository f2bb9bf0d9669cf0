"""Shows a recipe's data as it is trained on, before any weights are loaded."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from rich.text import Text
from rich.tree import Tree

from jax_backtrack.backtracking.trees import NO_PARENT, Example, TokenTrees, TreeSpec
from jax_backtrack.data.preferences import NoUsableRow, Preference
from jax_backtrack.data.rows import TreeSource
from jax_backtrack.errors import InputError
from jax_backtrack.hub.load import load_tokenizer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, with_reset
from jax_backtrack.training.data import (
    Source,
    data_paths,
    encode_source,
    read_sources,
    tree_spec,
    warn_if_nothing_is_taken_back,
)
from jax_backtrack.training.template_date import pin_date
from jax_backtrack.utils.console import bold, console
from jax_backtrack.utils.settings import check
from jax_backtrack.utils.workdir import DATA_ACCOUNT, SHOWN_DATA, atomic_write

_STYLES = {"prompt": "dim", "draft": "yellow strike", "context": "dim", "raised": "green", "lowered": "red"}
_RESET_STYLE = "bold magenta"


def show_data(config: ConfigDict, workdir: Path | None, count: int) -> None:
    """Prints the first `count` records of each path as they are trained on, and the account of the path.

    With a workdir, leaves there `data.jsonl`, a line for each record that is used, and `account.json`. Reads the
    tokenizer of the recipe's model and none of its weights. Raises InputError as training does; where no row of a path
    can be used, its account is left in the workdir.
    """
    check(config)
    if not any(data_paths(config, utility=utility) for utility in (False, True)):
        raise InputError("neither data.path nor data.utility_path is set")
    try:
        _show(config, workdir, count)
    except NoUsableRow as error:
        if workdir is not None:
            atomic_write(
                workdir / DATA_ACCOUNT, json.dumps(error.report.account(), indent=1, ensure_ascii=False) + "\n"
            )
        raise


def _show(config: ConfigDict, workdir: Path | None, count: int) -> None:
    sources = read_sources(config)
    model = config.model
    tokenizer = load_tokenizer(model.path, chat_template=model.chat_template, revision=model.revision or None)
    config = pin_date(config, tokenizer)
    if config.data.backtrack:
        tokenizer = with_reset(tokenizer)
    spec = tree_spec(config, tokenizer)
    examples, lines = [], []
    for source in sources:
        encoded = encode_source(source, tokenizer, spec, config)
        trees = TreeSource([example for _, example in encoded], spec, config.data.seed)
        for number, (preference, example) in enumerate(encoded):
            if number < count:
                title = f"record {number + 1} of {len(encoded)}   {preference.origin}"
                console.print(_drawn(title, trees.tree(0, number), len(example.prompt), tokenizer, spec))
            lines.append(json.dumps(_record(source, preference, example, tokenizer), ensure_ascii=False) + "\n")
        examples += [example for _, example in encoded]
    _say_legend()
    warn_if_nothing_is_taken_back(examples, spec)
    if workdir is not None:
        atomic_write(workdir / SHOWN_DATA, "".join(lines))
        atomic_write(workdir / DATA_ACCOUNT, json.dumps(_account(sources), indent=1, ensure_ascii=False) + "\n")
        console.print(
            f"{len(lines)} records in {bold(workdir / SHOWN_DATA)}, their account in {bold(workdir / DATA_ACCOUNT)}",
            highlight=False,
        )


# ------------------------------------------------------------------------------------------------------- files


def _record(source: Source, preference: Preference, example: Example, tokenizer: ChatTokenizer) -> dict:
    """Returns a used record: its texts, and the tokens of the prompt with each reply up to its end of turn."""
    record = {
        "source": source.path,
        "origin": preference.origin,
        "prompt": list(preference.prompt),
        "chosen": preference.chosen,
        "rejected": preference.rejected,
        "backtracks": preference.backtracks,
    }
    for side, reply in (("", example.chosen), ("rejected_", example.rejected)):
        if reply is not None:
            ids = [*example.prompt, *reply]
            record |= {f"{side}text": _decode(tokenizer, ids), f"{side}ids": list(map(int, ids))}
    return record


def _account(sources: Sequence[Source]) -> dict:
    """Returns the account of all paths together, and under `sources` that of each."""
    accounts = [source.report.account() | {"path": source.path, "utility": source.utility} for source in sources]
    dropped = sum((Counter(account["dropped"]) for account in accounts), Counter())
    return {
        "read_as": ", ".join(dict.fromkeys(account["read_as"] for account in accounts)),
        "used": sum(account["used"] for account in accounts),
        "dropped": dict(dropped.most_common()),
        "unused_columns": sorted({column for account in accounts for column in account["unused_columns"]}),
        "sources": accounts,
    }


# ----------------------------------------------------------------------------------------------------- drawing


@dataclasses.dataclass
class _Run:
    """Tokens of a tree that follow one another with the same part in the loss."""

    first: int
    last: int
    kind: str


def _runs(tree: TokenTrees, prompt_length: int) -> Iterator[_Run]:
    """Yields the runs of a tree in depth-first order; a run ends where the tree branches."""
    children = Counter(int(parent) for parent in tree.parent)
    run = None
    for index in range(tree.length):
        kind = _kind(tree, index, prompt_length)
        follows = run is not None and tree.parent[index] == run.last and children[run.last] == 1
        if follows and kind == run.kind:
            run.last = index
            continue
        if run is not None:
            yield run
        run = _Run(index, index, kind)
    if run is not None:
        yield run


def _kind(tree: TokenTrees, index: int, prompt_length: int) -> str:
    if index < prompt_length:
        return "prompt"
    weight = float(tree.loss_weights[index])
    return "context" if not weight else "raised" if weight > 0 else "lowered"


def _drawn(title: str, tree: TokenTrees, prompt_length: int, tokenizer: ChatTokenizer, spec: TreeSpec) -> Tree:
    """Returns the tree of one record as lines: its runs with their parts in the loss."""
    root = Tree(Text(title, style="bold"), guide_style="dim")
    places: dict[int, Tree] = {NO_PARENT: root}  # by the last token of each run
    for run in _runs(tree, prompt_length):
        ids = tree.tokens[run.first : run.last + 1]
        at = places[int(tree.parent[run.first])]
        places[run.last] = at.add(_line(run, ids, tree, tokenizer, spec))
    return root


def _line(run: _Run, ids: np.ndarray, tree: TokenTrees, tokenizer: ChatTokenizer, spec: TreeSpec) -> Text:
    resets = spec.reset_id is not None and spec.reset_id in ids
    kind = "draft" if run.kind == "context" and not resets else run.kind
    weights = sorted({round(float(weight), 4) for weight in tree.loss_weights[run.first : run.last + 1]})
    part = f"{kind} {' '.join(f'{weight:+g}' for weight in weights)}" if any(weights) else kind
    line = Text(f"{part:<12} ", style="cyan")
    for token in _pieces(ids, spec.reset_id):
        is_reset = spec.reset_id is not None and spec.reset_id in token
        line.append(_visible(_decode(tokenizer, token)), style=_RESET_STYLE if is_reset else _STYLES[kind])
    return line


def _pieces(ids: np.ndarray, reset_id: int | None) -> Iterator[np.ndarray]:
    """Yields the ids in parts, [RESET] in one of its own."""
    borders = [] if reset_id is None else [at for place in np.flatnonzero(ids == reset_id) for at in (place, place + 1)]
    yield from (part for part in np.split(ids, borders) if len(part))


def _visible(text: str) -> str:
    return text.replace("\n", "⏎")


def _decode(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    return tokenizer.hf.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _say_legend() -> None:
    legend = Text("prompt", style=_STYLES["prompt"]) + Text(" and ") + Text("draft", style=_STYLES["draft"])
    legend += Text(" are context; of the rest the likelihood is ") + Text("raised", style=_STYLES["raised"])
    legend += Text(" or ") + Text("lowered", style=_STYLES["lowered"]) + Text(", by the weight beside it")
    console.print(legend)
