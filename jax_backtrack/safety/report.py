"""Shows evaluations as one table and a few transcripts, and writes them as JSON."""

import dataclasses
import json
from pathlib import Path

from rich.table import Table
from rich.text import Text

from jax_backtrack.progress import console
from jax_backtrack.safety.evaluate import Evaluation
from jax_backtrack.safety.measures import Measure
from jax_backtrack.sampling.chat import struck
from jax_backtrack.tables import add_figures, add_names, fits, new_table
from jax_backtrack.workdir import write_whole

# Measure -> heading, and whether it is a share to be shown in percent.
_COLUMNS = {
    "unsafe": ("unsafe", True),
    "unsafe_prefilled": ("unsafe, prefilled", True),
    "useful": ("useful", True),
    "won": ("preferred to the first", True),
    "false_resets": ("false resets", True),
    "resets": ("resets, prefilled", False),
    "prefilled_reset": ("reset, prefilled", True),
    "reset_word_leak": ("reset word leak", True),
}
_LEAST_NEEDED = "resets"  # left out of a table that is too wide: with one reset a reply it is the share of replies


def show(evaluations: dict[str, Evaluation]) -> None:
    """Prints one row per model, each value with its 95 % interval below it.

    The mean number of resets is left out where the terminal is too narrow for it.
    """
    there = {measure for evaluation in evaluations.values() for measure in evaluation.measures}
    columns = {measure: column for measure, column in _COLUMNS.items() if measure in there}
    table = _table(evaluations, columns)
    if not fits(table):
        table = _table(evaluations, {name: column for name, column in columns.items() if name != _LEAST_NEEDED})
    console.print(table)


def _table(evaluations: dict[str, Evaluation], columns: dict[str, tuple[str, bool]]) -> Table:
    measures = next(iter(evaluations.values())).measures
    count = next(iter(measures.values())).count
    title = f"testbed, {count} held-out prompts per cell, 95 % intervals"
    if leak := measures.get("reset_word_leak"):
        title += f"; reset word leak of all {leak.count} replies"
    table = new_table(title)
    add_names(table, "model", evaluations)
    for heading, _ in columns.values():
        add_figures(table, heading)
    for name, evaluation in evaluations.items():
        cells = [_cell(evaluation.measures.get(measure), share) for measure, (_, share) in columns.items()]
        table.add_row(name, *cells)
    return table


def show_transcripts(evaluation: Evaluation, count: int) -> None:
    """Prints the first `count` conversations with a reset, drafts struck through: `~~so~~` in a file."""
    with_resets = [answer for answers in evaluation.answers.values() for answer in answers if answer.reply.resets]
    for answer in with_resets[:count]:
        console.print()
        for message in answer.question.messages:
            console.print(Text(f"{message['role']:>9}  ", style="dim") + Text(message["content"]))
        line = Text("assistant  ", style="dim")
        for draft in answer.reply.drafts:
            line += struck(draft)
        console.print(line + Text(answer.reply.text, style="green"))
    if not with_resets:
        console.print("no reply had a reset")


def write(evaluations: dict[str, Evaluation], path: Path) -> None:
    """Writes measures and every reply of each model to a JSON file."""
    content = {
        name: {
            "measures": {measure: dataclasses.asdict(value) for measure, value in evaluation.measures.items()},
            "answers": {
                condition: [
                    {
                        "messages": answer.question.messages,
                        "value": answer.question.value,
                        "prefix": answer.prefix,
                        "reply": answer.reply.text,
                        "drafts": answer.reply.drafts,
                        "finish": answer.reply.finish,
                        "gives_value": answer.gives_value,
                        "leaks_reset_word": answer.leaks_reset_word,
                    }
                    for answer in answers
                ]
                for condition, answers in evaluation.answers.items()
            },
        }
        for name, evaluation in evaluations.items()
    }
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _cell(measure: Measure | None, share: bool) -> str:
    if measure is None:
        return ""
    scale, digits = (100, 1) if share else (1, 2)
    low, value, high = (f"{scale * number:.{digits}f}" for number in (measure.low, measure.value, measure.high))
    return f"{value}{' %' if share else ''}\n{low}–{high}"
