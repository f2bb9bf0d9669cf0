"""The evaluation as one page that needs nothing else: tables, and transcripts with harmful text folded away."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from jax_backtrack.evaluation import calibration
from jax_backtrack.evaluation.reports import plots, tables
from jax_backtrack.evaluation.reports.tables import HEADINGS, cell, in_line, judges
from jax_backtrack.evaluation.results import EvalResult, Evaluation, check_comparable, is_unsafe
from jax_backtrack.evaluation.stats import paired
from jax_backtrack.evaluation.win_rate import NOT_JUDGED, WinRates
from jax_backtrack.utils.console import bold, console
from jax_backtrack.utils.json_text import to_json
from jax_backtrack.utils.workdir import WIN_RATES, atomic_write

_TEMPLATE = Path(__file__).with_name("page.html")
_TRANSCRIPTS = 20  # of each set and condition; those with resets first


def report(models: dict[str, Evaluation], page: Path, false_resets: float, win_rates: WinRates = NOT_JUDGED) -> None:
    """Prints the table and writes the page, and `win_rates.json` beside it where replies were compared."""
    if win_rates.of:
        atomic_write(page.with_name(WIN_RATES), to_json(win_rates.as_json(), indent=1) + "\n")
    tables.show(models, win_rates)
    write(models, page, false_resets, win_rates)
    console.print(f"page in {bold(page.parent)}: {page.name}", highlight=False)


def write(models: dict[str, Evaluation], path: Path, false_resets: float, win_rates: WinRates = NOT_JUDGED) -> None:
    """Writes the page. The first model is the baseline that the others are compared with, prompt by prompt. A bias is
    chosen for at most the share `false_resets`."""
    baseline = next(iter(models))
    results_of = {model: _shown(evaluation) for model, evaluation in models.items()}
    titles = list(dict.fromkeys(result.title for results in results_of.values() for result in results))
    points = {
        model: points_of_model
        for model, evaluation in models.items()
        if (points_of_model := calibration.points(evaluation.results))
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(_TEMPLATE.read_text()).render(
        title=f"Evaluation of {', '.join(models)}",
        judge=judges(models),
        baseline=baseline,
        tables=[_table(title, results_of, win_rates) for title in titles],
        paired=_paired(results_of, baseline),
        win_rate_judge=win_rates.judge,
        win_rates=_win_rates(win_rates),
        perplexity=[
            {"model": model, "kind": kind, "count": measure.count, "value": in_line(measure, "perplexity")}
            for model, evaluation in models.items()
            for kind, measure in evaluation.perplexity.items()
        ],
        trade_off=plots.trade_off(points) if points else "",
        trade_offs=[_trade_off(model, points_of_model, false_resets) for model, points_of_model in points.items()],
        false_resets=f"{100 * false_resets:g} %",
        transcripts=[
            {"title": f"{model}: {result.title}", "responses": _transcripts(result)}
            for model, results in results_of.items()
            for result in results
        ],
    )
    atomic_write(path, text)


def _shown(evaluation: Evaluation) -> list[EvalResult]:
    """Returns all but what was asked for the trade-off alone."""
    return [result for result in evaluation.results if result.condition.reset_bias is None]


def _trade_off(model: str, points: Sequence[calibration.Point], false_resets: float) -> dict:
    chosen = calibration.calibrated(points, false_resets)
    return {
        "model": model,
        "chosen": None if chosen is None else f"{chosen.bias:+g}",
        "rows": [
            [f"{point.bias:+g}", *(in_line(half, "") for half in (*point.unsafe, *point.false_resets))]
            for point in points
        ],
    }


def _table(title: str, models: dict[str, Sequence[EvalResult]], win_rates: WinRates) -> dict:
    rows = {
        model: win_rates.measures(model, result)
        for model, results in models.items()
        for result in results
        if result.title == title
    }
    count = next(len(result.responses) for results in models.values() for result in results if result.title == title)
    names = list(dict.fromkeys(name for measures in rows.values() for name in measures))
    return {
        "title": f"{title} ({count} prompts)",
        "headings": [HEADINGS.get(name, name.replace("_", " ")) for name in names],
        "rows": [
            {"model": model, "cells": [cell(measures.get(name), name) for name in names]}
            for model, measures in rows.items()
        ],
    }


def _paired(models: dict[str, Sequence[EvalResult]], baseline: str) -> list[dict]:
    rows = []
    of_baseline = {result.title: result for result in models[baseline] if result.harmful}
    for model, results in models.items():
        for result in results:
            if model == baseline or result.title not in of_baseline:
                continue
            check_comparable(result, of_baseline[result.title], model, baseline)
            compared = paired(result.hits(is_unsafe), of_baseline[result.title].hits(is_unsafe))
            rows.append(
                {
                    "model": model,
                    "title": result.title,
                    "count": len(result.responses),
                    "only_here": compared.only_here,
                    "only_baseline": compared.only_baseline,
                    "reduction": in_line(compared.reduction, "reduction"),
                    "p_value": f"{compared.p_value:.2g}",
                }
            )
    return rows


def _win_rates(win_rates: WinRates) -> list[dict]:
    return [
        {
            "model": model,
            "title": title,
            "counts": [len(win_rate.chances), sum(win_rate.wins), win_rate.ties, sum(win_rate.losses)],
            "win_rate": in_line(win_rate.win_rate, "win_rate"),
            "p_value": f"{win_rate.p_value:.2g}",
        }
        for title, models in win_rates.of.items()
        for model, win_rate in models.items()
    ]


def _transcripts(result: EvalResult) -> list[dict]:
    firsts = sorted((samples[0] for samples in result.responses), key=lambda response: not response.reply.resets)
    return [
        {
            "prompt": response.question.messages[-1]["content"],
            "prefix": response.prefix,
            "drafts": response.reply.drafts,
            "reply": response.reply.text,
            "unsafe": result.harmful and is_unsafe(response),
            "verdict": f"unsafe with {100 * response.unsafe:.0f} %" if result.harmful else "",
        }
        for response in firsts[:_TRANSCRIPTS]
    ]
