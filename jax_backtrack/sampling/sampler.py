"""Prompts in, replies out."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from flax import nnx

from jax_backtrack.backtracking.trees import RESET_MODES
from jax_backtrack.distributed.mesh import check_rows, row_parts
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.models.unstacked import decode_model
from jax_backtrack.sampling.batching import ContinuousBatch, Engine, Request, group_by_length, shared_prefix
from jax_backtrack.sampling.cache_trace import CacheStep, trace_cache
from jax_backtrack.sampling.replies import Reply, Writing
from jax_backtrack.sampling.seeds import reply_seeds
from jax_backtrack.sampling.settings import COMPILED_FOR, SamplingParams, split_params
from jax_backtrack.sampling.streams import Event, events
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, Message
from jax_backtrack.utils.console import warn
from jax_backtrack.utils.fingerprint import fingerprint
from jax_backtrack.utils.resume_cache import ResumeCache, key_of

Prompt = str | Sequence[Message] | np.ndarray


class Sampler:
    """Samples replies from a model that may take its drafts back.

    params:     `SamplingParams`, whose fields are those of a recipe's section `sample`
    reset_mode: what the model sees after a reset, "keep", "rewind" or "resample"; None for the mode that the model was
                trained with, which is to be given where the model's file has [RESET] and does not say it

    On one CPU it keeps a second copy of the weights, laid out for single tokens.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        params: SamplingParams = SamplingParams(),
        *,
        reset_mode: str | None = None,
    ):
        self.model, self.tokenizer, self.params, self.max_num_seqs = model, tokenizer, params, params.max_num_seqs
        tokenizer.check_opening()
        _ask_for_mode(tokenizer, reset_mode, params.max_resets)
        reset_mode = reset_mode or tokenizer.reset_mode or "rewind"
        _check_mode(tokenizer, reset_mode, params)
        if mesh := model.compute.mesh:
            check_rows(params.max_num_seqs, mesh, "max_num_seqs")
        if params.top_k > model.config.vocab_size:
            raise InputError(f"top_k is {params.top_k}; it must be at most {model.config.vocab_size}")
        static, traced = split_params(
            params,
            reset_mode=reset_mode,
            reset_id=tokenizer.reset_id,
            stop_ids=tuple(sorted(tokenizer.special_ids - {tokenizer.reset_id})),
            unused_ids=tokenizer.unused_ids(model.config.vocab_size),
        )
        decoder = decode_model(model)
        cache_dtype = params.cache_dtype or model.compute.dtype
        self._engine = Engine(decoder, *nnx.split(decoder), static, traced, cache_dtype)

    @property
    def compiled(self) -> list[str]:
        """The programs that this sampler has used, each compiled once: what it does and for which sizes."""
        return list(self._engine.compiled)

    def with_resets(self, *, reset_bias: float | Sequence[float] | None = None, max_resets: int | None = None):
        """Returns the same sampler with another `reset_bias` or `max_resets`; nothing compiles again for another
        number."""
        changes = {"reset_bias": reset_bias, "max_resets": max_resets}
        params = dataclasses.replace(
            self.params, **{name: value for name, value in changes.items() if value is not None}
        )
        compiled_for = {name: getattr(self._engine.static, name) for name in COMPILED_FOR}
        static, traced = split_params(params, **compiled_for)
        sampler = copy.copy(self)
        sampler.params, sampler._engine = params, dataclasses.replace(self._engine, static=static, traced=traced)
        return sampler

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int | None = None,
        prefills: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        progress: Callable[[int], None] = lambda done: None,
        resume_cache: ResumeCache | None = None,
    ) -> list[Reply]:
        """Returns `n` replies per prompt, prompt after prompt in their order.

        prompts:  a text (one user message), a list of messages, or the ids of a prompt as it stands, an array, each
        n:        `params.n` where it is not given
        prefills: how each prompt's reply begins, written for the model; part of its first draft or of its reply
        seeds:    one per reply; by default they are derived from `params.seed`. The same prompt, seed and settings give
                  the same reply whatever else is sampled, except where rounding decides between two tokens
        progress: called with the number of replies finished since the last call
        resume_cache: where replies are kept as they are finished; those that it has already are not sampled again
        """
        if isinstance(prompts, str):
            raise InputError("prompts is one text; give a list of prompts")
        n = self.params.n if n is None else n
        prefills = [""] * len(prompts) if prefills is None else prefills
        seeds = reply_seeds(self.params.seed, len(prompts) * n) if seeds is None else seeds
        if n < 1 or len(prompts) != len(prefills) or len(prompts) * n != len(seeds):
            raise InputError(
                f"{len(prompts)} prompts, n = {n} replies to each, {len(prefills)} prefills and {len(seeds)} seeds: "
                "not one prefill for each prompt and one seed for each reply"
            )
        encoded = [self._encode(*pair) for pair in zip(prompts, prefills, strict=True)]
        requests = [Request(i, *encoded[i // n], seed=seed) for i, seed in enumerate(seeds)]
        keys = [] if resume_cache is None else [self._key(request) for request in requests]
        replies = {i: Reply.from_json(known) for i, key in enumerate(keys) if (known := resume_cache.get(key))}
        progress(len(replies))
        missing = [request for request in requests if request.number not in replies]
        writings = {request.number: self._writing(request) for request in missing}
        for group in group_by_length(missing, self.max_num_seqs):
            batch = self._batch(group, self.max_num_seqs)
            for outputs in batch.run(group):
                before = len(replies)
                for output in outputs:
                    writing = writings[output.number]
                    writing.take(output.ids, output.done, output.logprobs, output.reset_logprobs)
                    if writing.finish_reason:
                        batch.cancel(output.number)
                        replies[output.number] = writing.reply()
                        if resume_cache is not None:
                            resume_cache.add(keys[output.number], replies[output.number].to_json())
                progress(len(replies) - before)
        return [replies[number] for number in range(len(requests))]

    def stream(
        self, prompt: Prompt, *, prefill: str = "", seed: int | None = None, hold_back: int | None = None
    ) -> Iterator[Event]:
        """Yields one reply as it is written: `TextDelta`s of whole words, `Retraction` where a draft is taken back, at
        last `Finished`.

        seed, hold_back: those of `params` where they are not given
        hold_back:       tokens that stay unseen after the newest one shown, so that a draft that is taken back within
                         so many tokens of its beginning, or of an error, has not been shown so far

        With `params.logprobs` it says of each token how likely [RESET] was in its place (`TextDelta.pieces`).
        """
        hold_back = self.params.hold_back if hold_back is None else hold_back
        if hold_back < 0:
            raise InputError(f"hold_back is {hold_back}; it must be at least 0")
        request = Request(0, *self._encode(prompt, prefill), seed=self.params.seed if seed is None else seed)
        batch = self._batch([request], row_parts(self.model.compute.mesh))
        return events(batch, request, self._writing(request), hold_back)

    def trace_cache(self, prompts: Sequence[Prompt], *, prefills: Sequence[str] | None = None) -> Iterator[CacheStep]:
        """Yields the cache at every step of the loop; all prompts are in flight at once.

        Prompts and prefills as above; the seed of a prompt is its number.
        """
        prefills = [""] * len(prompts) if prefills is None else prefills
        pairs = zip(prompts, prefills, strict=True)
        requests = [Request(number, *self._encode(*pair), seed=number) for number, pair in enumerate(pairs)]
        parts = row_parts(self.model.compute.mesh)
        return trace_cache(self._batch(requests, -(-len(requests) // parts) * parts), requests)

    @functools.cached_property
    def weights_hash(self) -> str:
        """Returns a hash of the model's weights, by which a `ResumeCache` tells what was computed with them."""
        return fingerprint(nnx.split(self.model)[1])

    def _key(self, request: Request) -> str:
        """Returns a key of all that a reply depends on."""
        compiled_for = [repr(getattr(self._engine.static, name)) for name in COMPILED_FOR]
        settings = self.params.decisive() | {"cache_dtype": self._engine.cache_dtype}
        how = settings, compiled_for, self.model.compute.dtype
        model = self.weights_hash, dataclasses.asdict(self.model.config)
        return key_of(model, how, request.prompt_ids.tolist(), request.prefill_ids.tolist(), request.seed)

    def _batch(self, requests: Sequence[Request], slots: int) -> ContinuousBatch:
        longest = max(request.length for request in requests)
        return ContinuousBatch(self._engine, slots, longest, self.params.max_new_tokens, shared_prefix(requests))

    def _writing(self, request: Request) -> Writing:
        return Writing(self.tokenizer, request.prefill_ids, self._engine.static.stop_ids, self.params.stop_strings)

    def _encode(self, prompt: Prompt, prefill: str) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        prompt_ids = prompt if isinstance(prompt, np.ndarray) else self.tokenizer.render(prompt)
        prefill_ids = self.tokenizer.begin_reply(prefill)
        if wrong := [index for index in prompt_ids.tolist() if not 0 <= index < self.model.config.vocab_size]:
            raise InputError(
                f"a prompt has the id {wrong[0]}; the model's ids end before {self.model.config.vocab_size}"
            )
        new_tokens = self.params.max_new_tokens
        length, limit = len(prompt_ids) + len(prefill_ids), self.model.config.max_position_embeddings
        if length + new_tokens > limit:
            raise InputError(
                f"a prompt of {length} tokens and max_new_tokens {new_tokens} exceed the model's {limit} "
                f"positions: {str(prompt)[:40]!r}..."
            )
        return prompt_ids, prefill_ids


def _ask_for_mode(tokenizer: ChatTokenizer, reset_mode: str | None, max_resets: int) -> None:
    """Assumes no reset mode where the model's file has [RESET] and does not say what it was trained for."""
    if not tokenizer.asks_reset_mode or tokenizer.reset_mode or max_resets == 0:
        return
    if reset_mode is None:
        raise InputError(
            "the model has [RESET], but its file does not say which reset mode it was trained with: set it, in a "
            f"recipe reset.mode, in Python Sampler(reset_mode=...), to one of {', '.join(RESET_MODES)}"
        )
    warn(
        f"the model's file does not say which reset mode it was trained with; {reset_mode!r} is taken, as it was given"
    )


def _check_mode(tokenizer: ChatTokenizer, reset_mode: str, params: SamplingParams) -> None:
    if reset_mode not in RESET_MODES:
        raise InputError(f"reset mode {reset_mode!r}: {nearest(reset_mode, RESET_MODES)}")
    trained = tokenizer.reset_mode
    if trained and (reset_mode == "rewind") != (trained == "rewind") and reset_mode != "resample":
        raise InputError(f"reset mode {reset_mode!r}: the model was trained with {trained!r}; use that or 'resample'")
    if reset_mode == "resample" and params.temperature == 0 and tokenizer.reset_id is not None and params.max_resets:
        raise InputError("the reset mode 'resample' needs a temperature above 0: the same draft would return")
