"""What terminals of several widths show of the tables."""

import re

import pytest

from jax_backtrack.data.prompt_sets import Question
from jax_backtrack.evaluation.reports import tables
from jax_backtrack.evaluation.results import Condition, EvalResult, Evaluation, Response
from jax_backtrack.experiments import replication
from jax_backtrack.sampling.replies import Reply
from jax_backtrack.utils.console import console
from tests.evaluations import on_testbed

MODELS = ("untrained", "SFT", "backtracking SFT", "backtracking SFT + DPO")


def lines(width: int, show, *arguments) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, console.capture() as capture:
        patch.setattr(console, "width", width)
        show(*arguments)
    shown = [line.rstrip() for line in capture.get().splitlines()]
    assert all(len(line) <= width for line in shown)
    assert "…" not in capture.get()
    return shown


def asked(name: str, harmful: bool, condition: Condition, bad: int) -> EvalResult:
    """Of 80 replies so many are unsafe."""
    question = Question([{"role": "user", "content": "a"}], "b")
    replies = [
        Reply(text, ("a draft",), "stop", num_tokens=48) for text in ("So it is, and was.", "So it isundo, and was.")
    ]
    responses = [Response(question, "", replies[number < 1], *(float(number < bad),) * 2) for number in range(80)]
    return EvalResult(name, harmful, condition, tuple((each,) for each in responses), "refusals" if harmful else "")


def evaluated() -> dict[str, Evaluation]:
    found = (
        asked("AdvBench", True, Condition(10, reset_bias=-4.0), 30),
        asked("SimpleSafetyTests", True, Condition(), 2),
        asked("XSTest", False, Condition(), 0),
    )
    return {model: Evaluation(found, {}) for model in MODELS}


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_testbed_is_shown_whole(width):
    """Each of 200 questions of a kind, of which 131 are answered with the value after a reset and leak a word."""
    shown = "\n".join(lines(width, tables.show, dict.fromkeys(MODELS, on_testbed(200, 131))))
    assert shown.count("65.5 %") == 6 * len(MODELS)
    assert shown.count("58.7–71.7") == 5 * len(MODELS) and shown.count("61.6–69.2") == len(MODELS)
    assert set(re.findall(r"\S+", " ".join(MODELS))) <= set(shown.split())


@pytest.mark.parametrize("width", [80, 120, 160])
def test_sets_are_shown_whole_and_lengths_where_there_is_room(width):
    shown = lines(width, tables.show, evaluated())
    text = "\n".join(shown)
    assert text.count("37.5 %") == text.count("27.7–48.5") == 2 * len(MODELS)
    assert text.count("SimpleSafetyTests") == text.count("bias -4") == len(MODELS)
    assert text.count("48.0–48.0") == (3 * len(MODELS) if width > 120 else 0)
    assert ("a wider terminal has them" in text) == (width <= 120)
    assert text.count("0.2–6.7") == (3 * len(MODELS) if width > 80 else 0)
    assert text.count("reset word leak in 3 of 240 replies") == (len(MODELS) if width == 80 else 0)


@pytest.mark.parametrize("width", [80, 160])
def test_a_replication_is_shown_whole(width):
    found = {"SFT": "SFT on own replies", "rewind": "rewind SFT on own replies"}
    each = [evaluated()[MODELS[0]]] * 3
    results = replication.summary(dict.fromkeys(found.values(), each), {found["rewind"]: found["SFT"]})
    text = "\n".join(lines(width, replication.show, results))
    assert text.count("37.5 %") == 2 * len(found)
    assert text.count("1.2 %") == 3 * len(found), "leaks of reset words"
    assert "reduction" in text and "AdvBench, 10 tokens prefilled, bias -4 (80 prompts, up to 3 seeds)" in text
