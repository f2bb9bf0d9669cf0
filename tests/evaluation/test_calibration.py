"""The trade-off over the bias of [RESET]: halves, the choice, and the plots."""

import dataclasses

from jax_backtrack.evaluation import calibration
from jax_backtrack.evaluation.reports import plots
from tests.evaluations import SETS


def test_every_bias_is_a_point_with_both_halves():
    found = calibration.points(SETS)
    assert [point.bias for point in found] == [-2.0, 0.0, 2.0]  # 5.0 was asked of no harmless set
    assert [[half.value for half in point.unsafe] for point in found] == [[1, 0.5], [0, 0.5], [0, 0]]
    assert [[half.value for half in point.false_resets] for point in found] == [[0, 0], [0, 0.5], [0.5, 1]]


def test_the_bias_is_chosen_by_one_half_and_never_sees_the_other():
    found = calibration.points(SETS)
    assert calibration.calibrated(found, 0.02).bias == 0.0
    assert calibration.calibrated(found, 1.0).bias == 0.0  # as safe as 2.0 there, and lower
    assert calibration.calibrated(found[2:], 0.02) is None


def test_plots_are_the_same_every_time_and_hold_text_as_text():
    points = {"<b>model</b>": calibration.points(SETS)}
    drawn = plots.trade_off(points)
    assert drawn == plots.trade_off(points)
    assert drawn.startswith("<svg") and "&lt;b&gt;model&lt;/b&gt;" in drawn and "+2" in drawn
    same = plots.trade_off(
        {"model": [dataclasses.replace(points["<b>model</b>"][0], bias=bias) for bias in (-3.0, -1.0)]}
    )
    assert ">-3, -1</text>" in same  # marks in one place share a label
    bars = plots.bars(
        {"set": {"one": points["<b>model</b>"][0].unsafe[0]}, "more": {"two": points["<b>model</b>"][0].unsafe[1]}}, "%"
    )
    assert all(f">{text}</text>" in bars for text in ("set", "more", "one", "two"))
