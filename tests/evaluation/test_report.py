"""What the table and the transcripts show."""

import json

from jax_backtrack.data import testbed
from jax_backtrack.evaluation import results
from jax_backtrack.evaluation.reports import tables
from jax_backtrack.evaluation.results import EvalResult, Evaluation, Response
from jax_backtrack.evaluation.stats import wilson
from jax_backtrack.evaluation.win_rate import WinRate, WinRates
from jax_backtrack.sampling.replies import Reply
from jax_backtrack.utils.console import console
from tests.evaluations import on_testbed

HALF = on_testbed(2, 1)


def shown(function, *arguments) -> str:
    with console.capture() as capture:
        function(*arguments)
    return " ".join(capture.get().split())


def won(*models: str) -> WinRates:
    """Each of two replies is preferred in one of two questions."""
    rate = WinRate(((0.9, 0.9), (0.1, 0.1)))
    return WinRates("judge", {testbed.PUBLIC: dict.fromkeys(models, rate)})


def test_the_table_has_every_measure_with_its_interval():
    text = shown(tables.show, {"one": HALF, "another": HALF}, won("one", "another"))
    assert "testbed, 2 held-out prompts per cell" in text and "reset word leak of all 6 replies" in text
    assert text.count("50.0 %") == 14 and text.count("9.5–90.5") == 12 and text.count("18.8–81.2") == 2
    assert "judge:" not in text  # nothing is shown twice


def test_a_column_of_what_no_model_was_judged_by_is_left_out():
    assert "preferred" not in shown(tables.show, {"one": HALF})
    assert "preferred to" in shown(tables.show, {"one": HALF, "another": HALF}, won("another"))


def test_the_row_of_the_testbed_is_that_of_its_conditions(tmp_path):
    """A word that leaks counts over all of them: here one of three replies glues one to what was written for it."""
    private, prefilled, public = on_testbed(1, 0).results
    ((response,),) = prefilled.responses
    glued = Response(response.question, response.prefix, Reply(f"{response.prefix}undo", (), "stop"), 0.0, 0.0)
    found = Evaluation((private, EvalResult(*list(vars(prefilled).values())[:3], ((glued,),), "exact"), public))
    assert found.testbed["reset_word_leak"] == wilson([True, False, False])
    assert found.testbed["unsafe"] == found.testbed["useful"] == found.testbed["prefilled_reset"] == wilson([False])
    results.write({"one": found}, tmp_path / "evaluation.json")
    written = json.loads((tmp_path / "evaluation.json").read_text())["models"]["one"]
    assert [one["responses"][0][0]["leaks_reset_word"] for one in written["results"]] == [False, True, False]
    assert written["testbed"]["reset_word_leak"] == vars(wilson([True, False, False]))
    assert Evaluation(found.results[:2]).testbed == {}


def test_a_transcript_shows_the_discarded_draft():
    text = shown(tables.show_transcripts, Evaluation(HALF.results[1:2]), 3)
    ((response,), _) = HALF.results[1].responses
    assert f"~~{response.prefix}~~ [RESET] {response.reply.text}" in text
    assert text.count("[RESET]") == 1


def test_no_transcript_without_a_reset():
    assert shown(tables.show_transcripts, on_testbed(1, 0), 3) == "no reply had a reset"


def test_what_is_written_can_be_judged_again(tmp_path):
    results.write({"one": HALF}, tmp_path / "w" / "evaluation.json")
    content = json.loads((tmp_path / "w" / "evaluation.json").read_text())["models"]["one"]
    assert content["testbed"]["unsafe"] == vars(wilson([True, False]))
    question = HALF.results[1].responses[0][0].question
    (first,), (second,) = content["results"][1]["responses"]
    assert first["reply"]["drafts"] == [question.target] and first["question"]["value"] == question.value
    assert question.value in first["reply"]["text"] and first["unsafe"] == 1 and second["unsafe"] == 0
    assert results.read(tmp_path / "w" / "evaluation.json") == {"one": HALF}
