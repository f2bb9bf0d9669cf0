"""Answers MT-Bench's questions in FastChat's format, for its judges (Zheng et al. 2023, arXiv 2306.05685)."""

import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jax_backtrack.data.reading.prompt_files import prompt_rows
from jax_backtrack.errors import InputError
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.seeds import reply_seeds
from jax_backtrack.utils.console import bold, console, progress_bar
from jax_backtrack.utils.json_text import to_json
from jax_backtrack.utils.resume_cache import resume_cache_of
from jax_backtrack.utils.workdir import atomic_write


def read(path: str) -> list[dict]:
    """Reads the questions of FastChat's `question.jsonl`: objects with `question_id` and `turns`, a list of texts."""
    questions = [row for _, row in prompt_rows(path)]
    for number, question in enumerate(questions, start=1):
        turns = question.get("turns")
        if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns)):
            raise InputError(f"evaluate.mt_bench: {path}, question {number} has no list of texts `turns`")
        if "question_id" not in question:
            raise InputError(f"evaluate.mt_bench: {path}, question {number} has no `question_id`")
    return questions


def write_answers(sampler: Sampler, questions: Sequence[dict], model: str, path: Path) -> None:
    """Answers all turns, each after the visible replies to those before it, and writes one line for each question."""
    conversations, turns = [[] for _ in questions], max(len(question["turns"]) for question in questions)
    seed_TxN = np.reshape(reply_seeds(sampler.params.seed, turns * len(questions)), (turns, -1)).tolist()
    with resume_cache_of(path) as resume_cache:
        for turn in range(turns):
            numbers = [number for number, question in enumerate(questions) if turn < len(question["turns"])]
            for number in numbers:
                conversations[number].append({"role": "user", "content": questions[number]["turns"][turn]})
            with progress_bar(f"MT-Bench, turn {turn + 1}", len(numbers)) as advance:
                replies = sampler(
                    [conversations[number] for number in numbers],
                    n=1,
                    seeds=[seed_TxN[turn][number] for number in numbers],
                    progress=advance,
                    resume_cache=resume_cache,
                )
            for number, reply in zip(numbers, replies, strict=True):
                conversations[number].append({"role": "assistant", "content": reply.text})
        lines = [_line(*answered, model) for answered in zip(questions, conversations, strict=True)]
        atomic_write(path, "".join(lines))
    console.print(f"answers to {len(questions)} questions in {bold(path)}", highlight=False)


def _line(question: dict, conversation: Sequence[dict], model: str) -> str:
    answer = {
        "question_id": question["question_id"],
        "answer_id": uuid.uuid4().hex,
        "model_id": model,
        "choices": [{"index": 0, "turns": [message["content"] for message in conversation[1::2]]}],
        "tstamp": time.time(),
    }
    return to_json(answer) + "\n"
