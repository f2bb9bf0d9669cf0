"""What the table and the transcripts show."""

import json

from jax_backtrack.data import testbed
from jax_backtrack.evaluation.evaluate import Answered, Evaluation, evaluate
from jax_backtrack.evaluation.measures import rate
from jax_backtrack.evaluation.reports import report
from jax_backtrack.sampling.sampler import Reply
from jax_backtrack.utils.console import console

private, public = testbed.questions("test", 2)
answers = {
    "private": [Answered(private, "", Reply(private.decline, (), "stop"))],
    "prefilled": [Answered(private, private.prefix, Reply(private.decline, (private.prefix,), "stop"))],
    "public": [Answered(public, "", Reply("[b]no markup[/b]", (), "length"))],
}
measures = {name: rate([True, False]) for name in report._COLUMNS}
evaluation = Evaluation(measures, answers)


def shown(function, *arguments) -> str:
    with console.capture() as capture:
        function(*arguments)
    return " ".join(capture.get().split())


def test_the_table_has_every_measure_with_its_interval():
    text = shown(report.show, {"one": evaluation, "another": evaluation})
    assert "testbed, 2 held-out prompts per cell" in text
    assert text.count("50.0 %") == 14 and text.count("9.5–90.5") == 14


def test_a_column_of_what_no_model_was_judged_by_is_left_out():
    plain = {name: measure for name, measure in measures.items() if name != "won"}
    without = Evaluation(plain, answers)
    assert "preferred" not in shown(report.show, {"one": without})
    assert "preferred to" in shown(report.show, {"one": without, "another": evaluation})


def test_a_word_that_leaks_counts_over_all_conditions(tmp_path):
    """One of three replies: a word of [RESET] is glued to what was written for the model."""

    class Asked:
        def __call__(self, messages, prefills, **_):
            return [Reply(prefix + "undo" if prefix else "Sorry.", (), "stop") for prefix in prefills]

    found = evaluate(Asked(), 1)
    assert found.measures["reset_word_leak"] == rate([True, False, False])
    assert "reset word leak of all 3 replies" in shown(report.show, {"one": found})
    report.write({"one": found}, tmp_path / "evaluation.json")
    written = json.loads((tmp_path / "evaluation.json").read_text())["one"]["answers"]
    assert [written[condition][0]["leaks_reset_word"] for condition in written] == [False, True, False]


def test_a_transcript_shows_the_discarded_draft():
    text = shown(report.show_transcripts, evaluation, 3)
    assert f"~~{private.prefix}~~ [RESET] {private.decline}" in text
    assert text.count("[RESET]") == 1


def test_no_transcript_without_a_reset():
    without = Evaluation(measures, {"public": answers["public"]})
    assert shown(report.show_transcripts, without, 3) == "no reply had a reset"


def test_what_is_written_can_be_judged_again(tmp_path):
    report.write({"one": evaluation}, tmp_path / "w" / "evaluation.json")
    content = json.loads((tmp_path / "w" / "evaluation.json").read_text())["one"]
    assert content["measures"]["unsafe"] == {
        "value": 0.5,
        "low": measures["unsafe"].low,
        "high": measures["unsafe"].high,
        "count": 2,
    }
    (answer,) = content["answers"]["prefilled"]
    assert answer["drafts"] == [private.prefix] and answer["reply"] == private.decline
    assert answer["value"] == private.value and not answer["gives_value"]
