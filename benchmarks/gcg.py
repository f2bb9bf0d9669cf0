"""GCG beside nanogcg on SmolLM2-135M.

    python -m benchmarks.gcg --prompts=../shared/data/prompts/advbench.csv --nanogcg-python=NANOGCG/bin/python

Both search a suffix of 20 tokens to the same prompt for the same target, with 512 candidates a step among the 256 best
tokens of each place, in processes of their own that take turns. The time is that of whole steps after a first one.
nanogcg's suffixes are scored by ours too, and both losses must be the same. nanogcg tries ASCII tokens only, ours all.
It asks for transformers before 5, so it needs an environment of its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import jax

from benchmarks.worker import Worker, print_table, say, write_model
from jax_backtrack.data import prompt_sets

SIDES = ("ours", "nanogcg")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="a prompt set with targets, as AdvBench")
    parser.add_argument("--nanogcg-python", required=True, help="the Python of an environment with nanogcg")
    parser.add_argument("--number", type=int, default=0, help="of the prompt")
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # of this process, which only writes the model
    _, questions = prompt_sets.read(options.prompts, harmful=True)
    question = questions[options.number]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_model("", scratch / "model")
        asked = json.dumps(dict(messages=question.messages, target=question.target))
        pythons = dict(zip(SIDES, (sys.executable, options.nanogcg_python), strict=True))
        workers = {
            side: Worker(
                "benchmarks.gcg_worker", side, str(scratch / "model"), asked, log=scratch / f"{side}.log", python=python
            )
            for side, python in pythons.items()
        }
        try:
            results = _measure(workers, options.rounds, options.steps)
        finally:
            for worker in workers.values():
                worker.kill()
    table = [["side", "s a step", "steps", "best loss"]]
    table += [
        [one["side"], f"{one['seconds']:.2f}", str(one["steps"]), f"{one['best']:.3f}"] for one in results["sides"]
    ]
    print_table(table)
    print(f"ours does {results['times']:.2f} x the steps; losses of one suffix differ by {results['differs']:.1e}")
    print(json.dumps(results))


def _measure(workers: dict[str, Worker], rounds: int, steps: int) -> dict:
    taken, losses = {side: [] for side in SIDES}, {side: [] for side in SIDES}
    differs = 0.0
    for number in range(rounds + 1):
        for side in SIDES:
            answer = workers[side].ask(json.dumps(dict(steps=steps if number else 1)))
            losses[side] += answer["losses"]
            if number:
                taken[side].append(answer["seconds"] / steps)
            if side == "nanogcg":
                score = workers["ours"].ask(json.dumps(dict(score=answer["suffix"])))["loss"]
                differs = max(differs, abs(score - answer["losses"][-1]))
        if number:
            said = ", ".join(f"{side} {taken[side][-1]:.1f} s a step" for side in SIDES)
            say(f"round {number} of {rounds}: {said}")
    sides = [
        dict(side=side, seconds=statistics.median(taken[side]), steps=len(losses[side]), best=min(losses[side]))
        for side in SIDES
    ]
    times = statistics.median(theirs / ours for ours, theirs in zip(*taken.values(), strict=True))
    return dict(sides=sides, times=times, differs=differs)


if __name__ == "__main__":
    main()
