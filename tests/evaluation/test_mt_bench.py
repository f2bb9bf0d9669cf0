"""MT-Bench's questions, answered in FastChat's format."""

import json

import pytest

from jax_backtrack import Sampler, SamplingParams
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation import mt_bench
from tests import tiny


def test_both_turns_are_answered_and_the_second_sees_the_first(reset_tokenizer, tmp_path, shared):
    sampler = Sampler(
        tiny.model(vocab_size=49152, max_position_embeddings=2048), reset_tokenizer, SamplingParams(max_new_tokens=4)
    )
    questions = mt_bench.read(str(shared / "data/prompts/mt_bench_question.jsonl"))
    assert len(questions) == 80
    mt_bench.write_answers(sampler, questions[:3], "tiny", tmp_path / "w" / "answers.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "w" / "answers.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [question["question_id"] for question in questions[:3]]
    for line, question in zip(lines, questions[:3], strict=True):
        assert line.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        (choice,) = line["choices"]
        first, second = choice["turns"]
        said = [{"role": "user", "content": question["turns"][0]}, {"role": "assistant", "content": first}]
        (again,) = sampler([[*said, {"role": "user", "content": question["turns"][1]}]])
        assert choice["index"] == 0 and second == again.text


@pytest.mark.parametrize(
    "text,message",
    [
        ("{}", "question 1 has no list of texts `turns`"),
        ('{"turns": ["a", " "]}', "question 1 has no list"),
        ('{"turns": ["a"]}', "has no `question_id`"),
        ("{", "line 1: not JSON"),
    ],
)
def test_broken_questions_are_named(tmp_path, text, message):
    (tmp_path / "question.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        mt_bench.read(str(tmp_path / "question.jsonl"))
