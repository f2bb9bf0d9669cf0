"""Prompts in, replies out."""

import copy
import dataclasses
import functools
import numbers
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_backtrack.backtracking.trees import CONTEXTS
from jax_backtrack.distributed.mesh import check_rows, platform, row_parts
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.hub.load import DTYPES
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.models.unstacked import apart
from jax_backtrack.sampling.batching import Batch, Engine, Request, common_beginning, pools, steps_of
from jax_backtrack.sampling.cache_trace import Look, looks
from jax_backtrack.sampling.loop import Knobs, Plan
from jax_backtrack.sampling.replies import Reply, Writing
from jax_backtrack.sampling.streams import Event, events
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, Message
from jax_backtrack.utils.console import warn
from jax_backtrack.utils.fingerprint import fingerprint
from jax_backtrack.utils.resume_cache import ResumeCache, key_of

# Settings that need not be whole numbers.
_REAL = ("temperature", "top_p", "min_p", "repetition_penalty")
Prompt = str | Sequence[Message] | np.ndarray


class Sampler:
    """Samples replies from a model that may take its drafts back.

    context:        reset context; None for the one the model was trained with, which is to be given where the model's
                    file has [RESET] and does not say it
    max_resets:     per reply; [RESET] is masked out after them
    reset_bias:     added to the logit of [RESET]: lower is fewer resets. One number, or one for each position behind
                    the prompt, of which the last holds for all later ones
    max_new_tokens: of a reply. In the context `keep` its drafts and resets count, as they stay in the context; in the
                    others each draft may be as long again
    temperature:    0 for the likeliest token at every step
    top_k, top_p, min_p: 0, 1 and 0 for the whole distribution; they cut it in this order
    repetition_penalty: above 1 makes tokens that stand in the context less likely
    stop_strings:   a reply ends before the first of these that it comes to
    log_probs:      keep log-probabilities of every token and of [RESET], in `Reply.trace`
    batch_rows:     prompts in flight at once
    cache_dtype:    of keys and values, "float32" or "bfloat16"; None for the model's compute dtype

    On one CPU it keeps a second copy of the weights, laid out for single tokens.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        *,
        context: str | None = None,
        max_resets: int = 1,
        reset_bias: float | Sequence[float] = 0.0,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_strings: Sequence[str] = (),
        log_probs: bool = False,
        batch_rows: int = 16,
        cache_dtype: str | None = None,
    ):
        self.model, self.tokenizer, self.batch_rows = model, tokenizer, batch_rows
        self._new_tokens, self._stop_strings = max_new_tokens, _checked_stop_strings(stop_strings)
        tokenizer.check_opening()
        _ask_for_context(tokenizer, context, max_resets)
        context = context or tokenizer.reset_context or "rewind"
        if mesh := model.compute.mesh:
            check_rows(batch_rows, mesh, "batch_rows")
        _check_context(tokenizer, context, max_resets, temperature)
        _check_numbers(
            top_p=(top_p, 0, 1),
            repetition_penalty=(repetition_penalty, 0, None),
            max_resets=(max_resets, 0, None),
            max_new_tokens=(max_new_tokens, 1, None),
            temperature=(temperature, 0, None),
            top_k=(top_k, 0, model.config.vocab_size),
            min_p=(min_p, 0, 1),
            batch_rows=(batch_rows, 1, None),
        )
        if not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1")
        if repetition_penalty <= 0:
            raise InputError(f"repetition_penalty is {repetition_penalty}; it must be above 0")
        if cache_dtype is not None and cache_dtype not in DTYPES:
            raise InputError(f"cache_dtype {cache_dtype!r}: {nearest(cache_dtype, DTYPES)}")
        plan = Plan(
            context=context,
            reset_id=tokenizer.reset_id,
            stop_ids=tuple(sorted(tokenizer.special_ids - {tokenizer.reset_id})),
            greedy=temperature == 0,
            top_k=top_k,
            top_p=top_p < 1,
            min_p=min_p > 0,
            penalty=repetition_penalty != 1,
            log_probs=log_probs,
            steps=steps_of(max_new_tokens),
            unused_ids=tokenizer.unused_ids(model.config.vocab_size),
        )
        knobs = Knobs(
            temperature=jnp.float32(temperature),
            top_p=jnp.float32(top_p),
            min_p=jnp.float32(min_p),
            penalty=jnp.float32(repetition_penalty),
            max_resets=jnp.int32(max_resets),
            reset_bias=_reset_bias(reset_bias),
        )
        graph, params = nnx.split(model)
        layers = apart(model) if _reads_layers_apart(model) else None
        self._engine = Engine(model, graph, params, layers, plan, knobs, cache_dtype or model.compute.dtype)

    @property
    def compiled(self) -> list[str]:
        """The programs that this sampler has used, each compiled once: what it does and for which sizes."""
        return list(self._engine.compiled)

    def with_resets(self, *, reset_bias: float | Sequence[float] | None = None, max_resets: int | None = None):
        """The same sampler with another `reset_bias` or `max_resets`; programs are shared, so nothing compiles again
        for another number."""
        knobs = self._engine.knobs
        if reset_bias is not None:
            knobs = dataclasses.replace(knobs, reset_bias=_reset_bias(reset_bias))
        if max_resets is not None:
            _check_numbers(max_resets=(max_resets, 0, None))
            knobs = dataclasses.replace(knobs, max_resets=jnp.int32(max_resets))
        other = copy.copy(self)
        other._engine = dataclasses.replace(self._engine, knobs=knobs)
        return other

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int = 1,
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        progress: Callable[[int], None] = lambda done: None,
        resume_cache: ResumeCache | None = None,
    ) -> list[Reply]:
        """`samples` replies per prompt, prompt after prompt in their order.

        prompts:  a text (one user message), a list of messages, or the ids of a prompt as it stands, an array, each
        prefixes: how each prompt's reply begins, written for the model; part of its first draft or of its reply
        seeds:    one per reply; its number in the list by default. The same prompt, seed and settings give the same
                  reply whatever else is sampled, except where rounding decides between two tokens
        progress: called with the number of replies finished since the last call
        resume_cache: where replies are kept as they are finished; those that it has already are not sampled again
        """
        if isinstance(prompts, str):
            raise InputError("prompts is one text; give a list of prompts")
        prefixes = [""] * len(prompts) if prefixes is None else prefixes
        seeds = range(len(prompts) * samples) if seeds is None else seeds
        if samples < 1 or len(prompts) != len(prefixes) or len(prompts) * samples != len(seeds):
            raise InputError(
                f"{len(prompts)} prompts, {samples} samples of each, {len(prefixes)} prefixes and {len(seeds)} seeds: "
                "not one prefix for each prompt and one seed for each sample"
            )
        encoded = [self._encode(*pair) for pair in zip(prompts, prefixes, strict=True)]
        requests = [Request(i, *encoded[i // samples], seed=seed) for i, seed in enumerate(seeds)]
        keys = [] if resume_cache is None else [self._key(request) for request in requests]
        replies = {i: Reply.from_json(kept) for i, key in enumerate(keys) if (kept := resume_cache.get(key))}
        progress(len(replies))
        missing = [request for request in requests if request.number not in replies]
        writings = {request.number: self._writing(request) for request in missing}
        for pool in pools(missing, self.batch_rows):
            batch = self._batch(pool, self.batch_rows)
            for updates in batch.run(pool):
                before = len(replies)
                for update in updates:
                    writing = writings[update.number]
                    writing.take(update.ids, update.done, update.log_probs, update.reset_log_probs)
                    if writing.finish:
                        batch.cancel(update.number)
                        replies[update.number] = writing.reply()
                        if resume_cache is not None:
                            resume_cache.add(keys[update.number], replies[update.number].to_json())
                progress(len(replies) - before)
        return [replies[number] for number in range(len(requests))]

    def stream(self, prompt: Prompt, *, prefix: str = "", seed: int = 0, hold_back: int = 0) -> Iterator[Event]:
        """One reply as it is written: `Token`s of whole words, `Retract` where a draft is taken back, at last `Done`.

        hold_back: tokens that stay unseen behind the newest one, so that a draft that is taken back within so many
                   tokens of its beginning, or of an error, has not been shown so far

        A sampler with `log_probs` says of each token how likely [RESET] was in its place (`Token.pieces`).
        """
        if hold_back < 0:
            raise InputError(f"hold_back is {hold_back}; it must be at least 0")
        request = Request(0, *self._encode(prompt, prefix), seed=seed)
        batch = self._batch([request], row_parts(self.model.compute.mesh))
        return events(batch, request, self._writing(request), hold_back)

    def looks(self, prompts: Sequence[Prompt], *, prefixes: Sequence[str] | None = None) -> Iterator[Look]:
        """The cache at every step of the loop, for whoever wants to see a reset; all prompts are in flight at once.

        Prompts and prefixes as above; the seed of a prompt is its number.
        """
        prefixes = [""] * len(prompts) if prefixes is None else prefixes
        pairs = zip(prompts, prefixes, strict=True)
        requests = [Request(number, *self._encode(*pair), seed=number) for number, pair in enumerate(pairs)]
        parts = row_parts(self.model.compute.mesh)
        return looks(self._batch(requests, -(-len(requests) // parts) * parts), requests)

    @functools.cached_property
    def weights_hash(self) -> str:
        """Of the model's weights, by which a `ResumeCache` tells what was computed with them."""
        return fingerprint(self._engine.params)

    def _key(self, request: Request) -> str:
        """Of all that a reply depends on."""
        knobs = {name: np.asarray(value).tolist() for name, value in vars(self._engine.knobs).items()}
        plan = dataclasses.asdict(self._engine.plan)
        how = plan, knobs, self._new_tokens, self._stop_strings, self._engine.cache_dtype, self.model.compute.dtype
        model = self.weights_hash, dataclasses.asdict(self.model.config)
        return key_of(model, how, request.prompt_ids.tolist(), request.prefix_ids.tolist(), request.seed)

    def _batch(self, requests: Sequence[Request], rows: int) -> Batch:
        longest = max(request.length for request in requests)
        return Batch(self._engine, rows, longest, self._new_tokens, common_beginning(requests))

    def _writing(self, request: Request) -> Writing:
        return Writing(self.tokenizer, request.prefix_ids, self._engine.plan.stop_ids, self._stop_strings)

    def _encode(self, prompt: Prompt, prefix: str) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        prompt_ids = prompt if isinstance(prompt, np.ndarray) else self.tokenizer.render(prompt)
        prefix_ids = self.tokenizer.begin_reply(prefix)
        if wrong := [index for index in prompt_ids.tolist() if not 0 <= index < self.model.config.vocab_size]:
            raise InputError(
                f"a prompt has the id {wrong[0]}; the model's ids end before {self.model.config.vocab_size}"
            )
        written, limit = len(prompt_ids) + len(prefix_ids), self.model.config.max_position_embeddings
        if written + self._new_tokens > limit:
            raise InputError(
                f"a prompt of {written} tokens and max_new_tokens {self._new_tokens} exceed the model's {limit} "
                f"positions: {str(prompt)[:40]!r}..."
            )
        return prompt_ids, prefix_ids


def _reset_bias(reset_bias: float | Sequence[float]) -> jax.Array:
    """`[1, T]`."""
    try:
        bias_T = np.atleast_1d(np.asarray(reset_bias, np.float32))
    except (TypeError, ValueError):
        bias_T = np.zeros(0)
    if isinstance(reset_bias, (str, bool)) or bias_T.ndim != 1 or not bias_T.size or not np.isfinite(bias_T).all():
        raise InputError(f"reset_bias is {reset_bias!r:.60}; it must be a finite number or a list of such")
    return jnp.asarray(bias_T[None])


def _reads_layers_apart(model: Transformer) -> bool:
    mesh = model.compute.mesh
    return platform(mesh) == "cpu" and (mesh is None or mesh.size == 1) and model.blocks.adapters is None


def _ask_for_context(tokenizer: ChatTokenizer, context: str | None, max_resets: int) -> None:
    """Assumes no reset context where the model's file has [RESET] and does not say what it was trained for."""
    if not tokenizer.asks_reset_context or tokenizer.reset_context or max_resets == 0:
        return
    if context is None:
        raise InputError(
            "the model has [RESET], but its file does not say which reset context it was trained with: set it, in a "
            f"recipe reset.context, in Python Sampler(context=...), to one of {', '.join(CONTEXTS)}"
        )
    warn(
        f"the model's file does not say which reset context it was trained with; {context!r} is taken, as was asked for"
    )


def _check_context(tokenizer: ChatTokenizer, context: str, max_resets: int, temperature: float) -> None:
    if context not in CONTEXTS:
        raise InputError(f"reset context {context!r}: {nearest(context, CONTEXTS)}")
    trained = tokenizer.reset_context
    if trained and (context == "rewind") != (trained == "rewind") and context != "resample":
        raise InputError(f"reset context {context!r}: the model was trained with {trained!r}; use that or 'resample'")
    if context == "resample" and temperature == 0 and tokenizer.reset_id is not None and max_resets:
        raise InputError("the reset context 'resample' needs a temperature above 0: the same draft would return")


def _check_numbers(**bounds: tuple[float, float, float | None]) -> None:
    for name, (value, least, most) in bounds.items():
        kind, called = (numbers.Real, "number") if name in _REAL else (numbers.Integral, "whole number")
        if not isinstance(value, kind) or isinstance(value, bool) or value != value:
            raise InputError(f"{name} is {value!r:.60}; it must be a {called}")
        if value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")
        if most is not None and value > most:
            raise InputError(f"{name} is {value}; it must be at most {most}")


def _checked_stop_strings(stop_strings: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop_strings, str) or not all(isinstance(text, str) and text for text in stop_strings):
        raise InputError(f"stop_strings is {stop_strings!r:.60}; it must be a list of texts that are not empty")
    return tuple(stop_strings)
