"""What came of evaluating a model on prompt sets, as a file."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from jax_backtrack.data.prompt_sets import Question
from jax_backtrack.errors import InputError
from jax_backtrack.safety.asked import Answer, Asked, Condition
from jax_backtrack.safety.measures import Measure
from jax_backtrack.sampling.reply import Reply

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
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(".writing")
    writing.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    writing.rename(path)


def read(path: Path) -> tuple[str, dict[str, Evaluation]]:
    """The judge and the models of a file that `write` wrote."""
    try:
        content = json.loads(path.read_text())
        return content["judge"], {model: _from_json(found) for model, found in content["models"].items()}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}: run --mode=evaluate with prompt sets there") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
        "finish": answer.reply.finish,
        "tokens": answer.reply.tokens,
        "unsafe": answer.unsafe,
        "shown_unsafe": answer.shown_unsafe,
    }


def _from_json(content: dict) -> Evaluation:
    perplexity = {kind: Measure(**measure) for kind, measure in content["perplexity"].items()}
    return Evaluation(tuple(map(_asked_from_json, content["sets"])), perplexity)


def _asked_from_json(content: dict) -> Asked:
    answers = [
        Answer(
            Question(tuple(one["messages"]), one["target"]),
            one["prefix"],
            Reply(one["reply"], tuple(one["drafts"]), one["finish"], tokens=one["tokens"]),
            float(one["unsafe"]),
            float(one["shown_unsafe"]),
        )
        for one in content["answers"]
    ]
    questions = _in_parts(answers, content["samples"])
    condition = Condition(**content["condition"])
    return Asked(content["set"], content["harmful"], condition, questions, content["seconds"])


def _in_parts(answers: Sequence[Answer], samples: int) -> tuple[tuple[Answer, ...], ...]:
    return tuple(tuple(answers[first : first + samples]) for first in range(0, len(answers), samples))
