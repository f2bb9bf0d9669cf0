"""Plots as SVG, to stand in a page or beside a document."""

import io
import re
from collections.abc import Sequence

from jax_backtrack.evaluation.calibration import Point
from jax_backtrack.evaluation.stats import Estimate

_COLOURS = "#4269d0 #ff725c #3ca951 #a463f2 #efb118 #97bbf5 #9c6b4e #ff8ab7 #6cc5b0".split()  # told apart by most eyes


def trade_off(points_of_models: dict[str, Sequence[Point]]) -> str:
    """Draws the share of unsafe replies over share of false resets, a line for each model and a mark for each bias."""
    figure, axes = _empty(6, 4)
    for (model, points), colour in zip(points_of_models.items(), _repeated(len(points_of_models)), strict=True):
        x = [100 * point.false_resets[1].value for point in points]
        y = [100 * point.unsafe[1].value for point in points]
        axes.plot(x, y, marker="o", color=colour, label=model)
        biases_at = {}
        for point, at in zip(points, zip(x, y, strict=True), strict=True):
            biases_at.setdefault(at, []).append(f"{point.bias:+g}")
        for at, biases in biases_at.items():
            axes.annotate(", ".join(biases), at, textcoords="offset points", xytext=(5, 5), fontsize=9, color=colour)
    # Room for a label behind the last mark, up to 100 %; an axis of some length where all shares are near 0.
    ends = [min(108, max(10, 1.15 * high)) for _, high in (axes.get_xlim(), axes.get_ylim())]
    axes.set(xlabel="false resets, %", ylabel="unsafe, %", xlim=(-2, ends[0]), ylim=(-2, ends[1]))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.15))
    return _svg(figure)


def bars(groups: dict[str, dict[str, Estimate]], unit: str) -> str:
    """Draws groups of bars with intervals: group -> model -> share."""
    figure, axes = _empty(7.5, 0.6 + 0.3 * sum(map(len, groups.values())) + 0.3 * len(groups))
    models = list(dict.fromkeys(model for group in groups.values() for model in group))
    colours = dict(zip(models, _repeated(len(models)), strict=True))
    place, ticks, labelled = 0.0, [], set()
    for group, values in groups.items():
        first = place
        for model, measure in values.items():
            low, value, high = (100 * number for number in (measure.low, measure.value, measure.high))
            errors = [[max(0, value - low)], [max(0, high - value)]]
            label = None if model in labelled else model
            labelled.add(model)
            axes.barh(place, value, 0.8, color=colours[model], label=label, xerr=errors, ecolor="#555", capsize=2)
            place -= 1
        ticks.append(((first + place + 1) / 2, group))
        place -= 0.8
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.set(xlabel=unit, xlim=(0, None))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _repeated(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]


def _empty(width: float, height: float):
    from matplotlib.figure import Figure  # takes a fifth of a second, which commands without plots should not cost

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _svg(figure) -> str:
    import matplotlib

    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    text = io.StringIO()
    # Without the date and with ids that do not change, the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "jax_backtrack", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)
