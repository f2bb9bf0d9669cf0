"""Searches suffixes as `benchmarks.gcg` says: `python -m benchmarks.gcg_worker SIDE MODEL QUESTION`.

It answers lines of JSON on stdin: `{"steps": n}` does so many steps from where the last ones ended; ours also answers
`{"score": text}` with the loss of a suffix. The side "nanogcg" imports nothing of this project but the channel.
"""

import json
import sys
import time

from benchmarks.channel import Channel

WIDTH, TOP_K = 512, 256


def ours(model: str, messages, target: str):
    import jax_backtrack
    from jax_backtrack.evaluation.attacks.gcg import Attack, Objective, Settings
    from jax_backtrack.models.transformer import Compute

    model, tokenizer = jax_backtrack.load(model, compute=Compute(attention="blockwise"))
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
    # It takes every copy of this token out of the rendered prompt; SmolLM2's begins each message.
    tokenizer.bos_token = None
    model = AutoModelForCausalLM.from_pretrained(model)  # transformers 4 takes float32
    suffix = [library.GCGConfig().optim_str_init]

    def search(asked: dict) -> dict:
        config = library.GCGConfig(
            num_steps=asked["steps"], optim_str_init=suffix[0], search_width=WIDTH, topk=TOP_K, verbosity="ERROR"
        )
        found = library.run(model, tokenizer, list(messages), target, config)
        suffix[0] = found.strings[-1]
        return dict(losses=found.losses, suffix=found.strings[-1])

    return search


def main():
    side, model, asked = sys.argv[1:]
    channel = Channel()
    search = {"ours": ours, "nanogcg": nanogcg}[side](model, **json.loads(asked))
    channel.send(ready=side)
    for line in sys.stdin:
        start = time.perf_counter()
        answer = search(json.loads(line))
        channel.send(seconds=time.perf_counter() - start, **answer)


if __name__ == "__main__":
    main()
