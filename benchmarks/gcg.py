"""GCG beside nanogcg on SmolLM2-135M and the CPU.

    python -m benchmarks.gcg --prompts=../shared/data/prompts/advbench.csv

Both search a suffix of 20 tokens to the same prompt for the same target, with 512 candidates a step among the 256 best
tokens of each place, in processes of their own that take turns. The time is that of whole steps after a first one.
nanogcg's suffixes are scored by ours too, and both losses must be the same. nanogcg tries ASCII tokens only, ours all.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.channel import Channel
from benchmarks.worker import Worker, print_table, say, write_model
from jax_backtrack.safety import prompt_sets

SIDES = ("ours", "nanogcg")
WIDTH, TOP_K = 512, 256


def main():
    if len(sys.argv) > 1 and sys.argv[1] in SIDES:
        return work(*sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="a prompt set with targets, as AdvBench")
    parser.add_argument("--number", type=int, default=0, help="of the prompt")
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    options = parser.parse_args()
    _, questions = prompt_sets.read(options.prompts, harmful=True)
    question = questions[options.number]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_model("", scratch / "model")
        asked = json.dumps(dict(messages=question.messages, target=question.target))
        workers = {
            side: Worker("benchmarks.gcg", side, str(scratch / "model"), asked, log=scratch / f"{side}.log")
            for side in SIDES
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


def work(side: str, model: str, asked: str) -> None:
    channel = Channel()
    search = {"ours": ours, "nanogcg": nanogcg}[side](model, **json.loads(asked))
    channel.send(ready=side)
    for line in sys.stdin:
        start = time.perf_counter()
        answer = search(json.loads(line))
        channel.send(seconds=time.perf_counter() - start, **answer)


def ours(model: str, messages, target: str):
    import jax_backtrack
    from jax_backtrack.models.transformer import Compute
    from jax_backtrack.safety.gcg import Attack, Objective, Settings

    model, tokenizer = jax_backtrack.load(model, compute=Compute(attention="blocks"))
    objective = Objective.of(tokenizer, messages, target)
    attack = Attack(model, tokenizer, objective, Settings(steps=10**6, width=WIDTH, top_k=TOP_K))
    run = attack.run()

    def search(asked: dict) -> dict:
        if "score" in asked:
            return dict(loss=float(attack.losses(tokenizer.encode(asked["score"])[None])[0]))
        return dict(losses=[next(run).loss for _ in range(asked["steps"])])

    return search


def nanogcg(model: str, messages, target: str):
    import nanogcg as library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(model)
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    suffix = [library.GCGConfig().optim_str_init]

    def search(asked: dict) -> dict:
        config = library.GCGConfig(
            num_steps=asked["steps"], optim_str_init=suffix[0], search_width=WIDTH, topk=TOP_K, verbosity="ERROR"
        )
        found = library.run(model, tokenizer, list(messages), target, config)
        suffix[0] = found.strings[-1]
        return dict(losses=found.losses, suffix=found.strings[-1])

    return search


if __name__ == "__main__":
    main()
