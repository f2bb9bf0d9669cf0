"""Shows evaluations as one table and a few transcripts, and writes them as JSON."""

import dataclasses
import json
from pathlib import Path

from rich.text import Text

from jax_backtrack.evaluation.evaluate import Evaluation
from jax_backtrack.evaluation.measures import Measure
from jax_backtrack.utils.console import console
from jax_backtrack.utils.drafts import struck
from jax_backtrack.utils.tables import add_figures, add_names, new_table
from jax_backtrack.utils.workdir import atomic_write

# Shares -> headings. With one reset a reply the mean number of resets is the share of replies with one.
_COLUMNS = {
    "unsafe": "unsafe",
    "unsafe_prefilled": "unsafe, prefilled",
    "useful": "useful",
    "won": "preferred to the first",
    "false_resets": "false resets",
    "prefilled_reset": "reset, prefilled",
    "reset_word_leak": "reset word leak",
}


def show(evaluations: dict[str, Evaluation]) -> None:
    """Prints one row per model, each value with its 95 % interval below it."""
    measures = next(iter(evaluations.values())).measures
    count = next(iter(measures.values())).count
    title = f"testbed, {count} held-out prompts per cell, 95 % intervals"
    if leak := measures.get("reset_word_leak"):
        title += f"; reset word leak of all {leak.count} replies"
    table = new_table(title)
    add_names(table, "model", evaluations)
    there = {measure for evaluation in evaluations.values() for measure in evaluation.measures}
    columns = {measure: heading for measure, heading in _COLUMNS.items() if measure in there}
    for heading in columns.values():
        add_figures(table, heading)
    for name, evaluation in evaluations.items():
        table.add_row(name, *(_cell(evaluation.measures.get(measure)) for measure in columns))
    console.print(table)


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
                        "finish_reason": answer.reply.finish_reason,
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
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _cell(measure: Measure | None) -> str:
    if measure is None:
        return ""
    low, value, high = (f"{100 * number:.1f}" for number in (measure.low, measure.value, measure.high))
    return f"{value} %\n{low}–{high}"
