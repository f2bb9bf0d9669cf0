"""Evaluations in a terminal: measures as they are shown, tables, and a few transcripts."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from jax_backtrack.evaluation.results import EvalResult, Evaluation, has_reset_word_leak
from jax_backtrack.evaluation.stats import Estimate
from jax_backtrack.evaluation.win_rate import NOT_JUDGED, WinRates
from jax_backtrack.utils.console import console
from jax_backtrack.utils.drafts import struck
from jax_backtrack.utils.tables import add_figures, add_names, fits, new_table

HEADINGS = {
    "unsafe": "unsafe",
    "stream_unsafe": "unsafe in stream",
    "over_refusal": "over refusal",
    "useful": "useful",
    "win_rate": "preferred",
    "reset": "reset",
    "reset_word_leak": "reset word leak",
    "draft_words": "words a draft",
    "reply_words": "words a reply",
    "tokens": "tokens written",
}
# With one reset a reply the mean number of resets is the share of replies with one, so it has no column.
_OF_TESTBED = {
    "unsafe": "unsafe",
    "unsafe_prefilled": "unsafe, prefilled",
    "useful": "useful",
    "win_rate": "preferred to the first",
    "false_resets": "false resets",
    "prefilled_reset": "reset, prefilled",
    "reset_word_leak": "reset word leak",
}
_LENGTHS = ("draft_words", "reply_words", "tokens")
_NOT_SHARES = (*_LENGTHS, "perplexity")
_IN_A_LINE = "reset_word_leak"  # the measure that stands below a table which is too narrow for it


def cell(measure: Estimate | None, name: str) -> tuple[str, str]:
    """Returns a measure's value and interval, as they are shown."""
    if measure is None:
        return "", ""
    scale, form, unit = (1, ".1f", "") if name in _NOT_SHARES else (100, ".1f", " %")
    low, value, high = (format(scale * number, form) for number in (measure.low, measure.value, measure.high))
    return f"{value}{unit}", f"{low}{' to ' if measure.low < 0 else '–'}{high}"


def in_line(measure: Estimate | None, name: str) -> str:
    """Returns a measure's value with its interval in brackets."""
    value, interval = cell(measure, name)
    return f"{value} ({interval})" if value else ""


def judges(models: dict[str, Evaluation]) -> str:
    """Returns the names of the judges of all models."""
    return ", ".join(dict.fromkeys(judge for evaluation in models.values() for judge in evaluation.judges))


def show(models: dict[str, Evaluation], win_rates: WinRates = NOT_JUDGED) -> None:
    """Prints a row for each model on the testbed; a row for each model, set and condition of the others."""
    if any(evaluation.testbed for evaluation in models.values()):
        console.print(_testbed_table(models, win_rates))
    rows = [
        (model, result, win_rates.measures(model, result))
        for model, evaluation in models.items()
        for result in evaluation.results
        if result not in evaluation.on_testbed.values()
    ]
    if rows:
        _show_sets(rows, judges(models))
    if win_rates.of:
        console.print(f"preferred to {next(iter(models))}, by {win_rates.judge}", highlight=False, markup=False)
    for model, evaluation in models.items():
        for kind, measure in evaluation.perplexity.items():
            shown = in_line(measure, "perplexity")
            console.print(f"{model}: perplexity of {measure.count} held-out {kind} replies {shown}")


def show_transcripts(evaluation: Evaluation, count: int) -> None:
    """Prints the first `count` conversations with a reset, drafts struck through: `~~so~~` in a file."""
    firsts = [samples[0] for result in evaluation.results for samples in result.responses]
    with_resets = [response for response in firsts if response.reply.resets]
    for response in with_resets[:count]:
        console.print()
        for message in response.question.messages:
            console.print(Text(f"{message['role']:>9}  ", style="dim") + Text(message["content"]))
        line = Text("assistant  ", style="dim")
        for draft in response.reply.drafts:
            line += struck(draft)
        console.print(line + Text(response.reply.text, style="green"))
    if not with_resets:
        console.print("no reply had a reset")


def _testbed_table(models: dict[str, Evaluation], win_rates: WinRates) -> Table:
    measures = {
        model: evaluation.testbed
        | {name: estimates for name, estimates in win_rates.measures(model, public).items() if name == "win_rate"}
        for model, evaluation in models.items()
        if (public := evaluation.on_testbed.get("public"))
    }
    first = next(iter(measures.values()))
    table = new_table(
        f"testbed, {first['unsafe'].count} held-out prompts per cell, 95 % intervals; reset word leak of all "
        f"{first['reset_word_leak'].count} replies"
    )
    add_names(table, "model", measures)
    names = [name for name in _OF_TESTBED if any(name in estimates for estimates in measures.values())]
    for name in names:
        add_figures(table, _OF_TESTBED[name])
    for model, estimates in measures.items():
        table.add_row(model, *_cells(estimates, names))
    return table


def _show_sets(rows: Sequence[tuple[str, EvalResult, dict[str, Estimate]]], judge: str) -> None:
    """Prints one table. Where the terminal is too narrow it has no lengths; where that is not enough, a line for each
    model counts what would be in the column of leaks."""
    names = [name for name in HEADINGS if any(name in measures for _, _, measures in rows)]
    for left_out in ((), _LENGTHS, (*_LENGTHS, _IN_A_LINE)):
        table = _sets_table(rows, judge, [name for name in names if name not in left_out])
        if fits(table):
            break
    console.print(table)
    if _IN_A_LINE in left_out:
        for model in dict.fromkeys(model for model, _, _ in rows):
            hits = [hit for name, result, _ in rows if name == model for hit in result.hits(has_reset_word_leak)]
            console.print(f"{model}: reset word leak in {sum(hits)} of {len(hits)} replies", markup=False)
    if left_out:
        console.print("words and tokens stand in the page; a wider terminal has them here too", style="dim")


def _sets_table(rows: Sequence[tuple[str, EvalResult, dict[str, Estimate]]], judge: str, names: Sequence[str]) -> Table:
    table = new_table(f"judge: {judge}; 95 % intervals" if judge else "95 % intervals")
    add_names(table, "model", (model for model, _, _ in rows))
    add_names(table, "set", (result.title for _, result, _ in rows))
    for heading in ("prompts", *(HEADINGS[name] for name in names)):
        add_figures(table, heading)
    for model, result, measures in rows:
        table.add_row(model, result.title.replace(", ", ",\n"), str(len(result.responses)), *_cells(measures, names))
    return table


def _cells(measures: dict[str, Estimate], names: Sequence[str]) -> list[str]:
    return ["\n".join(cell(measures.get(name), name)) for name in names]
