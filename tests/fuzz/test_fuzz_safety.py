"""Files of evaluations and of fitted judges, as they are read back."""

import functools

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

from configs import base
from jax_backtrack.evaluation import results
from jax_backtrack.evaluation.compare import compare
from jax_backtrack.evaluation.judges import probe
from jax_backtrack.evaluation.judges.probe import Heads
from jax_backtrack.utils.console import console
from jax_backtrack.utils.workdir import EVALUATION
from tests.fuzz.odd import TEXT, changed, dumps, mangled
from tests.fuzz.trials import fuzz

# -------------------------------------------------------------------------------------------------- evaluations

REPLIES = ("Sorry, no.", "Sure, here it is: a")


def response(number: int) -> dict:
    return {
        "question": {
            "messages": [{"role": "user", "content": f"question {number}"}],
            "target": "Sure",
            "value": "",
        },
        "prefix": "",
        "reply": {
            "text": REPLIES[number % 2],
            "drafts": ["Sure"] if number % 2 else [],
            "finish_reason": "stop",
            "trace": None,
            "num_tokens": 4,
        },
        "unsafe": 0.75 * (number % 2),
        "stream_unsafe": 0.9,
    }


def asked(name: str, harmful: bool, samples: int, reset_bias: float | None = None) -> dict:
    return {
        "name": name,
        "harmful": harmful,
        "judge": "refusals",
        "condition": {"prefill": 0, "attack": "", "reset_bias": reset_bias, "resets": True},
        "measures": {"reset": {"value": 0.5, "low": 0.1, "high": 0.9, "count": 2}},
        "responses": [[response(number)] * samples for number in range(2)],
    }


def content(model: str) -> dict:
    found = {
        "perplexity": {"safety": {"value": 3.0, "low": 2.0, "high": 4.0, "count": 9}},
        "results": [asked("AdvBench", True, 2), asked("XSTest", False, 1)],
    }
    return {"schema_version": results.SCHEMA_VERSION, "models": {model: found}}


evaluations = changed(st.just(content("backtracking"))).map(dumps).map(str.encode)


@fuzz("evaluation.json, and --mode=compare", text=st.one_of(evaluations, mangled(evaluations, most=1, kinds=TEXT)))
def test_evaluations(text, tmp_path):
    for name, held in (("baseline", dumps(content("SFT")).encode()), ("backtracking", text)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / EVALUATION).write_bytes(held)
    with console.capture():
        compare([tmp_path / "baseline", tmp_path / "backtracking"], tmp_path, base.get_config().evaluate)
    assert (tmp_path / "comparison.html").read_text()


# ------------------------------------------------------------------------------------------------ fitted judges


@functools.cache
def judge_files() -> tuple[dict, dict[str, np.ndarray]]:
    """What `probe.save` writes of a judge that reads with two layers of a tiny model, whose path is left open."""
    replies = [f"{'sorry no' if number % 2 else 'sure yes'} {number % 7}" for number in range(40)]
    unsafe = np.arange(40) % 2 == 0
    hidden = np.random.default_rng(0).normal(size=(40, 72)) + unsafe[:, None]
    heads = Heads.fit(replies, hidden, unsafe)
    words = sorted(heads.vocabulary, key=heads.vocabulary.get)
    arrays = {name: np.ascontiguousarray(value) for name, value in vars(heads).items() if name != "vocabulary"}
    return {"model": "MODEL", "layers": 2, "tokens": 16, "words": words}, arrays


settings = st.deferred(lambda: changed(st.just(judge_files()[0])).map(dumps).map(str.encode))
arrays = st.deferred(lambda: st.just(save(judge_files()[1])))


@fuzz(
    "fitted judges",
    files=st.one_of(
        st.tuples(settings, arrays),
        st.tuples(mangled(settings, most=1, kinds=TEXT), arrays),
        st.tuples(settings, mangled(arrays, most=1)),
    ),
)
def test_fitted_judges(files, tmp_path):
    (tmp_path / "judge.json").write_bytes(files[0])
    (tmp_path / "judge.safetensors").write_bytes(files[1])
    heads, path, layers, tokens = probe.read(tmp_path)
    assert layers > 0 < tokens and isinstance(path, str)
    chances = heads(["Sorry, no.", "Sure, yes 3"], np.zeros((2, len(heads.mean_F))))
    assert ((chances >= 0) & (chances <= 1)).all()
