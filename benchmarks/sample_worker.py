"""Samples as `benchmarks.sampling` says: `python -m benchmarks.sample_worker SIDE MODEL DTYPE`.

It answers lines of JSON on stdin: `{"write": n, "prompts": [ids, ...]}` writes `n` tokens behind every prompt of one
length, and `{"reply": n, "prompts": ...}` a whole reply of up to `n` tokens to each. Both take the likeliest token.
`{"bandwidth": true}`, which ours alone answers, reads memory.
The side "tunix" imports nothing of this project but the channel, so that it can run in an environment of its own.
"""

import json
import sys
import time

import numpy as np

from benchmarks.channel import Channel

BATCH = 16


class Ours:
    """jax_backtrack; with a draft of `reset_after` tokens before the reply where that is asked."""

    def __init__(self, model: str, dtype: str):
        import jax

        import jax_backtrack
        from jax_backtrack.models.transformer import Compute

        if dtype == "float32":  # of a GPU it would be TF32, which is not what torch computes
            jax.config.update("jax_default_matmul_precision", "highest")
        self._model, self._tokenizer = jax_backtrack.load(model, dtype=dtype, compute=Compute(dtype))
        self._batches = {}

    def write(self, prompts, count, reset_after=None):
        from jax_backtrack.sampling.batching import ContinuousBatch, Request

        requests = [Request(i, np.asarray(ids, np.int32), np.zeros(0, np.int32), i) for i, ids in enumerate(prompts)]
        bias = -1e9 if reset_after is None else [-1e9] * reset_after + [1e9] + [-1e9] * count
        sampler = self._sampler(max_new_tokens=count, max_num_seqs=len(prompts), bias=bias, stops=False)
        batch = ContinuousBatch(sampler._engine, len(prompts), len(prompts[0]), count)
        finished = sum(output.done for outputs in batch.run(requests) for output in outputs)
        assert finished == len(prompts)

    def reply(self, prompts, most):
        from jax_backtrack.sampling.batching import Request, group_by_length

        requests = [Request(i, np.asarray(ids, np.int32), np.zeros(0, np.int32), i) for i, ids in enumerate(prompts)]
        sampler = self._sampler(max_new_tokens=most, max_num_seqs=BATCH, bias=-1e9, stops=True)
        written = {request.number: [] for request in requests}
        for group in group_by_length(requests, BATCH):
            for outputs in sampler._batch(group, BATCH).run(group):
                for output in outputs:
                    written[output.number] += output.ids.tolist()
        return [written[request.number] for request in requests]

    def bandwidth(self) -> float:
        """Bytes per second at which the device, on a CPU two threads, reads its memory: the best of a few tries."""
        import jax
        import jax.numpy as jnp

        size = 2**26 if jax.default_backend() == "cpu" else 2**29
        array = jnp.ones((2, size), jnp.float32)
        total = jax.jit(lambda x: x.sum(axis=1))
        total(array).block_until_ready()
        best = 0.0
        for _ in range(5):
            start = time.perf_counter()
            total(array).block_until_ready()
            best = max(best, array.nbytes / (time.perf_counter() - start))
        return best

    def _sampler(self, stops: bool, bias, **settings):
        """The sampler of these settings; where nothing may stop it, [RESET] is the only stop and never comes."""
        import dataclasses

        import jax_backtrack

        key = json.dumps([stops, bias, settings])
        if key not in self._batches:
            params = jax_backtrack.SamplingParams(reset_bias=bias, **settings)
            sampler = jax_backtrack.Sampler(self._model, self._tokenizer, params)
            if not stops:
                static = dataclasses.replace(sampler._engine.static, stop_ids=(-1,))
                sampler._engine = dataclasses.replace(sampler._engine, static=static)
            self._batches[key] = sampler
        return self._batches[key]


class Transformers:
    """`generate` of transformers, with the cache that its configuration names: "dynamic" or "static"."""

    def __init__(self, model: str, dtype: str, cache: str):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(2)
        self._torch, self._cache = torch, cache
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(self._device)
        backtracking = self._model.config.backtracking
        self._reset, self._stops = backtracking["reset_token_id"], backtracking["stop_token_ids"]

    def write(self, prompts, count):
        self._generate(prompts, min_new_tokens=count, max_new_tokens=count)

    def reply(self, prompts, most):
        """In batches of prompts of like lengths, as they come in order of length."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        replies = [None] * len(prompts)
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            written = self._generate(
                [prompts[i] for i in chosen],
                max_new_tokens=most,
                eos_token_id=self._stops,
                bad_words_ids=[[self._reset]],
            )
            for i, ids in zip(chosen, written, strict=True):
                end = next((place for place, token in enumerate(ids) if token in self._stops), len(ids) - 1)
                replies[i] = ids[: end + 1]
        return replies

    def _generate(self, prompts, **settings):
        torch, width = self._torch, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            written = self._model.generate(
                ids.to(self._device),
                attention_mask=mask.to(self._device),
                do_sample=False,
                pad_token_id=0,
                cache_implementation=self._cache,
                **settings,
            )
        return written[:, width:].tolist()


class Tunix:
    """google-tunix's Sampler. Its Llama computes with its own rope_theta, which costs the same."""

    def __init__(self, model: str, dtype: str):
        from pathlib import Path

        import jax.numpy as jnp
        from tunix.models.llama3 import model as llama
        from tunix.models.llama3 import params

        config = json.loads((Path(model) / "config.json").read_text())
        self._config = llama.ModelConfig(
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            embed_dim=config["hidden_size"],
            hidden_dim=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            head_dim=config["head_dim"],
            num_kv_heads=config["num_key_value_heads"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
            weight_tying=config["tie_word_embeddings"],
        )
        self._model = params.create_model_from_safe_tensors(model, self._config, None, getattr(jnp, dtype))
        self._samplers = {}

    def write(self, prompts, count):
        from tunix.generate import sampler

        slots = len(prompts[0]) + 1 + count
        if slots not in self._samplers:
            shape = self._config.num_layers, self._config.num_kv_heads, self._config.head_dim
            self._samplers[slots] = sampler.Sampler(self._model, Ids(), sampler.CacheConfig(slots, *shape))
        made = self._samplers[slots](
            list(map(json.dumps, prompts)), max_generation_steps=count, max_prompt_length=len(prompts[0]),
            eos_tokens=[self._config.vocab_size - 1],
        )  # fmt: skip
        assert all(len(tokens) == count for tokens in made.tokens), [len(tokens) for tokens in made.tokens]


class Ids:
    """A tokenizer whose texts are lists of ids."""

    def encode(self, text):
        return json.loads(text)

    def decode(self, ids):
        return ""

    def bos_id(self):
        return None

    def eos_id(self):
        return 0

    def pad_id(self):
        return 0


SIDES = {
    "ours": Ours,
    "transformers dynamic": lambda *given: Transformers(*given, "dynamic"),
    "transformers static": lambda *given: Transformers(*given, "static"),
    "tunix": Tunix,
}


def main():
    side, model, dtype = sys.argv[1:]
    channel = Channel()
    made = SIDES[side](model, dtype)
    channel.send(ready=side)
    for line in sys.stdin:
        asked = json.loads(line)
        start, result = time.perf_counter(), None
        if "bandwidth" in asked:
            result = made.bandwidth()
        elif "write" in asked:
            more = {name: asked[name] for name in ("reset_after",) if name in asked}
            made.write(asked["prompts"], asked["write"], **more)
        else:
            result = made.reply(asked["prompts"], asked["reply"])
        channel.send(seconds=time.perf_counter() - start, result=result)


if __name__ == "__main__":
    main()
