"""What came of evaluating a model on prompt sets, as a file."""

import dataclasses
import json
import math
import reprlib
from pathlib import Path

from jax_backtrack.data.prompt_sets import Question
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.asked import Answer, Asked, Condition, has_reset_word_leak
from jax_backtrack.evaluation.measures import Measure
from jax_backtrack.sampling.replies import Reply
from jax_backtrack.tokenizer.chat_tokenizer import check_messages
from jax_backtrack.utils.unicode import is_unicode
from jax_backtrack.utils.workdir import atomic_write

EVALUATION = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """asked: every set in every condition; perplexity: of held-out preferred replies, by the kind of data"""

    asked: tuple[Asked, ...]
    perplexity: dict[str, Measure] = dataclasses.field(default_factory=dict)

    def of(self, title: str) -> Asked | None:
        """The set in the condition of this title."""
        return next((one for one in self.asked if one.title == title), None)


def write(models: dict[str, Evaluation], judge: str, path: Path) -> None:
    """Writes measures and every reply of each model, judged, to a JSON file; whole or not at all."""
    content = {"judge": judge, "models": {model: _as_json(found) for model, found in models.items()}}
    atomic_write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> tuple[str, dict[str, Evaluation]]:
    """The judge and the models of a file that `write` wrote."""
    try:
        content = json.loads(path.read_text())
        models = {_text(model): _from_json(found) for model, found in content["models"].items()}
        if not models:
            raise ValueError("it has no models")
        return _text(content["judge"]), models
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}: run --mode=evaluate with prompt sets there") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is no evaluation of prompt sets: {type(error).__name__} {error}") from None


def _as_json(found: Evaluation) -> dict:
    return {
        "perplexity": {kind: dataclasses.asdict(measure) for kind, measure in found.perplexity.items()},
        "sets": [_asked_as_json(asked) for asked in found.asked],
    }


def _asked_as_json(asked: Asked) -> dict:
    return {
        "set": asked.name,
        "harmful": asked.harmful,
        "condition": dataclasses.asdict(asked.condition),
        "samples": len(asked.answers[0]),
        "seconds": asked.seconds,
        "measures": {name: dataclasses.asdict(measure) for name, measure in asked.measures.items()},
        "answers": [_answer_as_json(answer) for samples in asked.answers for answer in samples],
    }


def _answer_as_json(answer: Answer) -> dict:
    return {
        "messages": list(answer.question.messages),
        "target": answer.question.target,
        "prefix": answer.prefix,
        "reply": answer.reply.text,
        "drafts": list(answer.reply.drafts),
        "finish_reason": answer.reply.finish_reason,
        "leaks_reset_word": has_reset_word_leak(answer),
        "tokens": answer.reply.num_tokens,
        "unsafe": answer.unsafe,
        "shown_unsafe": answer.shown_unsafe,
    }


def _from_json(content: dict) -> Evaluation:
    perplexity = {_text(kind): _measure(measure) for kind, measure in content["perplexity"].items()}
    return Evaluation(tuple(map(_asked_from_json, content["sets"])), perplexity)


def _asked_from_json(content: dict) -> Asked:
    answers, samples = list(map(_answer_from_json, content["answers"])), content["samples"]
    if not answers or _whole(samples) < 1 or len(answers) % samples:
        raise ValueError(f"{len(answers)} answers are not {samples} of each prompt")
    condition = Condition(**content["condition"])
    _whole(condition.prefill), _text(condition.attack), _flag(condition.resets)
    if condition.reset_bias is not None:
        _number(condition.reset_bias)
    questions = tuple(tuple(answers[first : first + samples]) for first in range(0, len(answers), samples))
    return Asked(_text(content["set"]), _flag(content["harmful"]), condition, questions, _number(content["seconds"]))


def _answer_from_json(content: dict) -> Answer:
    check_messages(content["messages"])
    drafts = content["drafts"]
    if not isinstance(drafts, list):
        raise TypeError(f"the drafts are {reprlib.repr(drafts)}, no list")
    reply = Reply(
        _text(content["reply"]),
        tuple(map(_text, drafts)),
        _text(content["finish_reason"]),
        num_tokens=_whole(content["tokens"]),
    )
    return Answer(
        Question(tuple(content["messages"]), _text(content["target"])),
        _text(content["prefix"]),
        reply,
        _probability(content["unsafe"]),
        _probability(content["shown_unsafe"]),
    )


def _measure(content: dict) -> Measure:
    measure = Measure(**content)
    for number in (measure.value, measure.low, measure.high):
        float(_is_a(number, (int, float), "number"))  # which may be infinite, as a perplexity
    _whole(measure.count)
    return measure


def _text(value) -> str:
    _is_a(value, str, "text")
    if not is_unicode(value):
        raise ValueError(f"{reprlib.repr(value)} is not valid Unicode")
    return value


def _flag(value) -> bool:
    return _is_a(value, bool, "true or false")


def _whole(value) -> int:
    if not 0 <= _is_a(value, int, "whole number") < 2**63:
        raise ValueError(f"{reprlib.repr(value)} is too large, or below 0")
    return value


def _number(value) -> float:
    if not math.isfinite(number := float(_is_a(value, (int, float), "number"))):
        raise ValueError(f"{value} is not finite")
    return number


def _probability(value) -> float:
    if not 0 <= (number := _number(value)) <= 1:
        raise ValueError(f"{number} is no probability")
    return number


def _is_a(value, kind, name: str):
    """The value; TypeError where it is not of this kind. To Python True and False are whole numbers, here not."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{reprlib.repr(value)} is no {name}")
    return value
