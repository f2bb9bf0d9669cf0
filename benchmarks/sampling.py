"""Sampling beside transformers and tunix, and beside the speed of memory, on SmolLM2-135M.

    python -m benchmarks.sampling --tunix-python=TUNIX/bin/python
    python -m benchmarks.sampling --data=../shared/data/hh-rlhf/harmless-base.jsonl.gz --only=replies

"write": the same random prompts of 64 tokens, and 64 tokens written behind each of them, in a batch of 1 and of 16.
Every side takes turns, in a process of its own; a figure is the median over the rounds. The time of a step is that of
writing 64 tokens less that of writing one, so that reading the prompts and starting do not count.

"resets": a step of 16 rows that each take a draft back after 16 tokens, beside one of rows that do not.

"replies": prompts of HH-RLHF and whole replies to them, of up to 256 tokens: here by continuous batching, there in
batches of 16 in order of length. Both write the likeliest token, so replies should be the same: it counts those that
are.

The roofline of a batch is what a step must read, the weights and the cached tokens, over what the device, on a CPU two
threads of it, reads per second in the same run. transformers runs with its dynamic and its static cache. tunix
(google-tunix) asks for another version of transformers than this project, so it needs an environment of its own:
`--tunix-python` names its Python, and without it tunix is left out.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks import pairs
from benchmarks.worker import Worker, print_table, say, write_model

PROMPT, NEW, LONGEST, DRAFT = 64, 64, 256, 16
OURS = "ours"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix-python", default="", help="the Python of an environment with google-tunix")
    parser.add_argument("--data", default="", help="HH-RLHF, for the prompts of 'replies'")
    parser.add_argument("--prompts", type=int, default=1000, help="how many of them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,16", help="of 'write', by commas")
    parser.add_argument("--only", default="write,resets,replies", help="what is measured, by commas")
    parser.add_argument("--dtypes", default="float32", help="by commas; bfloat16 is slow without its instructions")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        config, tokenizer = write_model("", scratch / "model")
        for dtype in options.dtypes.split(","):
            workers = _start(options, scratch, dtype)
            try:
                if "write" in options.only:
                    for rows in map(int, options.batches.split(",")):
                        results += _write(workers, rows, dtype, config, options.rounds)
                if "resets" in options.only:
                    results += _resets(workers[OURS], dtype, options.rounds)
                if "replies" in options.only and options.data:
                    asked = [
                        example.prompt.tolist() for example in pairs.usable(options.data, tokenizer, options.prompts)
                    ]
                    results += _replies(workers, asked, dtype)
            finally:
                for worker in workers.values():
                    worker.kill()
    _print(results)


def _start(options, scratch: Path, dtype: str) -> dict[str, Worker]:
    sides = {OURS: sys.executable, "transformers dynamic": sys.executable, "transformers static": sys.executable}
    if options.tunix_python:
        sides["tunix"] = options.tunix_python
    return {
        side: Worker(
            "benchmarks.sample_worker",
            side,
            str(scratch / "model"),
            dtype,
            log=scratch / f"{side} {dtype}.log",
            python=python,
        )
        for side, python in sides.items()
    }


def _ask(worker: Worker, **asked) -> dict:
    return worker.ask(json.dumps(asked))


def _write(workers, rows: int, dtype: str, config, rounds: int) -> list[dict]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(100, 40000, (rows, PROMPT)).tolist()
    for side, worker in workers.items():
        seconds = sum(_ask(worker, write=count, prompts=prompts)["seconds"] for count in (1, NEW))
        say(f"{dtype}, batch {rows}: {side} warmed up in {seconds:.0f} s")
    steps = {side: [] for side in workers}
    bandwidths = []
    for number in range(rounds):
        bandwidths.append(_ask(workers[OURS], bandwidth=True)["result"])
        for side, worker in workers.items():
            one, all = (_ask(worker, write=count, prompts=prompts)["seconds"] for count in (1, NEW))
            steps[side].append((all - one) / (NEW - 1))
        said = ", ".join(f"{side} {1e3 * steps[side][-1]:.1f} ms" for side in workers)
        say(f"{dtype}, batch {rows}, round {number + 1} of {rounds}: {said}; {bandwidths[-1] / 1e9:.1f} GB/s")
    size = 2 if dtype == "bfloat16" else 4
    cached = rows * (PROMPT + NEW / 2) * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    least = size * (_weights(config) + cached) / statistics.median(bandwidths)
    return [
        dict(
            what=f"write, batch {rows}",
            side=side,
            dtype=dtype,
            milliseconds=1e3 * statistics.median(taken),
            tokens_per_second=rows / statistics.median(taken),
            of_roofline=least / statistics.median(taken),
            times=statistics.median(taken) / statistics.median(steps[OURS]),
        )
        for side, taken in (steps | {"roofline": [least]}).items()
    ]


def _weights(config) -> int:
    """Parameters that a step reads: every layer's, and the table that gives the logits."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def _resets(ours: Worker, dtype: str, rounds: int) -> list[dict]:
    """Each row writes a draft of DRAFT tokens, [RESET] and NEW tokens; beside NEW tokens, in the same cache."""
    prompts = np.random.default_rng(1).integers(100, 40000, (16, PROMPT)).tolist()
    asked = {"none": (dict(write=NEW), NEW), "every row": (dict(write=NEW, reset_after=DRAFT), DRAFT + 1 + NEW)}
    taken = {name: [] for name in asked}
    for number in range(rounds + 1):
        one = _ask(ours, prompts=prompts, write=1)["seconds"]
        for name, (how, steps) in asked.items():
            seconds = _ask(ours, prompts=prompts, **how)["seconds"]
            taken[name] += [(seconds - one) / (steps - 1)] if number else []
        if number:
            said = ", ".join(f"{name} {1e3 * times[-1]:.1f} ms" for name, times in taken.items())
            say(f"{dtype}, resets, round {number} of {rounds}: {said}")
    # Rounds are compared each for itself: the machine's speed drifts by more than a reset could cost.
    times = statistics.median(every / none for none, every in zip(*taken.values(), strict=True))
    return [
        dict(
            what=f"resets of {name}",
            side=OURS,
            dtype=dtype,
            milliseconds=1e3 * statistics.median(each),
            times=1.0 if name == "none" else times,
        )
        for name, each in taken.items()
    ]


def _replies(workers, asked, dtype: str) -> list[dict]:
    found, taken = {}, {}
    for side in (OURS, "transformers dynamic"):
        _ask(workers[side], reply=LONGEST, prompts=asked[:32])  # compiles
        answer = _ask(workers[side], reply=LONGEST, prompts=asked)
        found[side], taken[side] = answer["result"], answer["seconds"]
        say(f"{dtype}, {len(asked)} replies: {side} {taken[side]:.0f} s")
    lengths = [len(reply) for reply in found[OURS]]
    same = sum(ours == theirs for ours, theirs in zip(*found.values(), strict=True))
    say(f"replies of {min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} on average; {same} equal")
    return [
        dict(
            what=f"{len(asked)} replies",
            side=side,
            dtype=dtype,
            replies_per_second=len(asked) / seconds,
            tokens_per_second=sum(map(len, found[side])) / seconds,
            times=seconds / taken[OURS],
            equal=same,
        )
        for side, seconds in taken.items()
    ]


COLUMNS = {
    "what": "{}",
    "side": "{}",
    "dtype": "{}",
    "milliseconds": "{:.1f}",
    "tokens_per_second": "{:.1f}",
    "replies_per_second": "{:.3f}",
    "of_roofline": "{:.0%}",
    "times": "{:.2f} x",
}


def _print(results: list[dict]) -> None:
    table = [[name.replace("_", " ") for name in COLUMNS]]
    table += [[form.format(row[name]) if name in row else "" for name, form in COLUMNS.items()] for row in results]
    print_table(table)
    print("milliseconds are of one step of the whole batch; 'times' is the time taken, ours being 1")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
