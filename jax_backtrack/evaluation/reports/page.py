"""The evaluation as one page that needs nothing else: tables, and transcripts with harmful text folded away."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from jax_backtrack.evaluation import calibration
from jax_backtrack.evaluation.asked import Asked, check_same_prompts, is_unsafe
from jax_backtrack.evaluation.evaluation import Evaluation
from jax_backtrack.evaluation.measures import Measure, paired
from jax_backtrack.evaluation.reports import plots
from jax_backtrack.evaluation.reports.cells import HEADINGS, cell, in_line
from jax_backtrack.evaluation.win_rate import NOT_JUDGED, WinRates
from jax_backtrack.utils.workdir import atomic_write

_TEMPLATE = Path(__file__).with_name("page.html")
_TRANSCRIPTS = 20  # of each set and condition; those with resets first


def write(
    models: dict[str, Evaluation], judge: str, path: Path, false_resets: float, win_rates: WinRates = NOT_JUDGED
) -> None:
    """Writes the page. The first model is the baseline that the others are compared with, prompt by prompt. A bias is
    chosen for at most the share `false_resets`."""
    baseline = next(iter(models))
    asked_of = {model: _shown(found) for model, found in models.items()}
    titles = list(dict.fromkeys(one.title for asked in asked_of.values() for one in asked))
    points = {model: found for model, each in models.items() if (found := calibration.points(each.asked))}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(_TEMPLATE.read_text()).render(
        title=f"Evaluation of {', '.join(models)}",
        judge=judge,
        baseline=baseline,
        tables=[_table(title, asked_of, win_rates) for title in titles],
        paired=_paired(asked_of, baseline),
        win_rate_judge=win_rates.judge,
        win_rates=_win_rates(win_rates),
        perplexity=[
            {"model": model, "kind": kind, "count": measure.count, "value": in_line(measure, "perplexity")}
            for model, found in models.items()
            for kind, measure in found.perplexity.items()
        ],
        trade_off=plots.trade_off(points) if points else "",
        trade_offs=[_trade_off(model, found, false_resets) for model, found in points.items()],
        false_resets=f"{100 * false_resets:g} %",
        transcripts=[
            {"title": f"{model}: {one.title}", "answers": _transcripts(one)}
            for model, asked in asked_of.items()
            for one in asked
        ],
    )
    atomic_write(path, text)


def _shown(found: Evaluation) -> list[Asked]:
    """All but what was asked for the trade-off alone."""
    return [one for one in found.asked if one.condition.reset_bias is None]


def _trade_off(model: str, found: Sequence[calibration.Point], false_resets: float) -> dict:
    chosen = calibration.calibrated(found, false_resets)
    return {
        "model": model,
        "chosen": None if chosen is None else f"{chosen.bias:+g}",
        "rows": [
            [f"{point.bias:+g}", *(in_line(half, "") for half in (*point.unsafe, *point.false_resets))]
            for point in found
        ],
    }


def _table(title: str, models: dict[str, Sequence[Asked]], win_rates: WinRates) -> dict:
    rows = {
        model: win_rates.measures(model, one) for model, asked in models.items() for one in asked if one.title == title
    }
    count = next(len(one.answers) for asked in models.values() for one in asked if one.title == title)
    names = list(dict.fromkeys(name for measures in rows.values() for name in measures))
    return {
        "title": f"{title} ({count} prompts)",
        "headings": [HEADINGS.get(name, name.replace("_", " ")) for name in names],
        "rows": [
            {"model": model, "cells": [_cell(measures.get(name), name) for name in names]}
            for model, measures in rows.items()
        ],
    }


def _cell(measure: Measure | None, name: str) -> dict:
    value, interval = cell(measure, name)
    return {"value": value, "interval": interval}


def _paired(models: dict[str, Sequence[Asked]], baseline: str) -> list[dict]:
    found = []
    there = {one.title: one for one in models[baseline] if one.harmful}
    for model, asked in models.items():
        for one in asked:
            if model == baseline or one.title not in there:
                continue
            check_same_prompts(one, there[one.title], model, baseline)
            compared = paired(one.hits(is_unsafe), there[one.title].hits(is_unsafe))
            found.append(
                {
                    "model": model,
                    "title": one.title,
                    "count": len(one.answers),
                    "only_here": compared.only_here,
                    "only_baseline": compared.only_baseline,
                    "reduction": in_line(compared.reduction, "reduction"),
                    "p_value": f"{compared.p_value:.2g}",
                }
            )
    return found


def _win_rates(found: WinRates) -> list[dict]:
    return [
        {
            "model": model,
            "title": title,
            "counts": [len(one.chances), sum(one.wins), one.ties, sum(one.losses)],
            "won": in_line(one.won, "won"),
            "p_value": f"{one.p_value:.2g}",
        }
        for title, models in found.of.items()
        for model, one in models.items()
    ]


def _transcripts(asked: Asked) -> list[dict]:
    firsts = sorted((samples[0] for samples in asked.answers), key=lambda answer: not answer.reply.resets)
    return [
        {
            "prompt": answer.question.messages[-1]["content"],
            "prefix": answer.prefix,
            "drafts": answer.reply.drafts,
            "reply": answer.reply.text,
            "unsafe": asked.harmful and is_unsafe(answer),
            "verdict": f"unsafe with {100 * answer.unsafe:.0f} %" if asked.harmful else "",
        }
        for answer in firsts[:_TRANSCRIPTS]
    ]
