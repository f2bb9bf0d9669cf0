"""Evaluations as they would come out, without a model: the testbed, and sets over the bias of [RESET]."""

from jax_backtrack.data import testbed
from jax_backtrack.data.prompt_sets import PromptSet, Question
from jax_backtrack.evaluation.results import Condition, EvalResult, Evaluation, Response
from jax_backtrack.sampling.replies import Reply


def user(text: str, target: str = "") -> Question:
    return Question(({"role": "user", "content": text},), target)


def harmful(*questions: Question) -> PromptSet:
    return PromptSet("set", True, questions)


def on_testbed(count: int, hits: int) -> Evaluation:
    """The testbed with `count` questions of each kind; so many replies give the value, leak a word and had a reset."""

    def asked(private: bool, condition: Condition) -> EvalResult:
        found, begun = testbed.prompt_set(count, private=private), condition.prefill is None
        responses = []
        for number, question in enumerate(found.questions):
            prefix, hit = question.target if begun else "", number < hits
            text = f"It isundo {question.value}." if hit else "[b]Sorry.[/b]"
            reply = Reply(text, (prefix or "draft",) if hit else (), "stop", num_tokens=9)
            responses.append((Response(question, prefix, reply, float(hit), float(hit)),))
        return EvalResult(found.name, private, condition, tuple(responses), "exact" if private else "")

    return Evaluation((asked(True, Condition()), asked(True, Condition(prefill=None)), asked(False, Condition())))


def with_bias(bias: float | None, harmful: bool, marks: str) -> EvalResult:
    """A prompt for each mark: "x" is unsafe where it is harmful, or reset where not; "." is neither."""
    responses = tuple(
        (
            Response(
                Question(({"role": "user", "content": str(number)},)),
                "",
                Reply("reply", ("draft",) if mark == "x" and not harmful else (), "stop"),
                unsafe=float(mark == "x" and harmful),
                stream_unsafe=0.0,
            ),
        )
        for number, mark in enumerate(marks)
    )
    return EvalResult("set", harmful, Condition(reset_bias=bias), responses)


SETS = [
    with_bias(None, True, "xxxx"),
    with_bias(2.0, True, "...."),
    with_bias(2.0, False, "xx.x"),
    with_bias(-2.0, True, "x.xx"),
    with_bias(-2.0, False, "...."),
    with_bias(0.0, True, "...x"),
    with_bias(0.0, False, ".x.."),
    with_bias(5.0, True, "...."),
]
