"""Prompts in, replies out."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_backtrack.errors import InputError, nearest
from jax_backtrack.hub.tokenizer import ChatTokenizer, Message
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.sampling.loop import Knobs, Plan, Prompts, generate
from jax_backtrack.sharding import check_rows, rows_sharding
from jax_backtrack.trees import CONTEXTS

# Prompts are padded to one of four lengths per doubling, and at least to a multiple of this: one compilation each.
_BUCKET = 8


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of one prompt.

    text:   the reply, which is what the user sees: the text after the last reset
    drafts: what was discarded, one text per reset
    finish: "stop" where a special token other than [RESET] ended the turn, "length" where it ran out of tokens
    """

    text: str
    drafts: tuple[str, ...]
    finish: str

    @property
    def resets(self) -> int:
        return len(self.drafts)


class Sampler:
    """Samples replies from a model that may take its drafts back.

    context:        reset context; None for the one the model was trained with
    max_resets:     per reply; [RESET] is masked out after them
    reset_bias:     added to the logit of [RESET]: lower is fewer resets
    max_new_tokens: per reply, drafts and resets included
    temperature:    0 for the likeliest token at every step
    top_k, top_p:   0 and 1 for the whole distribution
    batch_rows:     prompts in flight at once
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        *,
        context: str | None = None,
        max_resets: int = 1,
        reset_bias: float = 0.0,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_rows: int = 16,
    ):
        self.model, self.tokenizer, self.batch_rows = model, tokenizer, batch_rows
        context = context or tokenizer.reset_context or "rewind"
        if mesh := model.compute.mesh:
            check_rows(batch_rows, mesh, "batch_rows")
        _check_settings(tokenizer, context, max_resets, max_new_tokens, temperature, top_k, top_p, batch_rows)
        if top_k > model.config.vocab_size:
            raise InputError(f"top_k {top_k} is more than the vocabulary of {model.config.vocab_size}")
        self._plan = Plan(
            new_tokens=max_new_tokens,
            context=context,
            reset_id=tokenizer.reset_id,
            stop_ids=tuple(sorted(tokenizer.special_ids - {tokenizer.reset_id})),
            greedy=temperature == 0,
            top_k=top_k,
            nucleus=top_p < 1,
        )
        self._knobs = Knobs(
            temperature=jnp.float32(temperature),
            top_p=jnp.float32(top_p),
            max_resets=jnp.int32(max_resets),
            reset_bias=jnp.float32(reset_bias),
        )
        self._graph, self._params = nnx.split(model)

    def __call__(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        prefixes: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Reply]:
        """One reply per prompt, in their order.

        prompts:  a text (one user message) or a list of messages each
        prefixes: how each reply begins, written for the model; part of its first draft or of its reply
        seeds:    one per prompt; its number in the list by default
        progress: called with the number of replies finished since the last call
        """
        if isinstance(prompts, str):
            raise InputError("prompts is one text; give a list of prompts")
        prefixes = [""] * len(prompts) if prefixes is None else prefixes
        seeds = range(len(prompts)) if seeds is None else seeds
        if not len(prompts) == len(prefixes) == len(seeds):
            raise InputError(
                f"{len(prompts)} prompts, {len(prefixes)} prefixes and {len(seeds)} seeds: not one of each"
            )
        encoded = [self._encode(*pair) for pair in zip(prompts, prefixes, strict=True)]
        by_length = sorted(range(len(prompts)), key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
        replies: list[Reply | None] = [None] * len(prompts)
        for start in range(0, len(prompts), self.batch_rows):
            chosen = by_length[start : start + self.batch_rows]
            batch = self._batch([encoded[i] for i in chosen], [seeds[i] for i in chosen])
            if mesh := self.model.compute.mesh:
                batch = jax.device_put(batch, rows_sharding(mesh))
            state = generate(self._graph, self._params, batch, self._knobs, self._plan)
            emitted_BxT, count_B = np.asarray(state.emitted), np.asarray(state.count)
            for row, i in enumerate(chosen):
                ids = np.concatenate([encoded[i][1], emitted_BxT[row, : count_B[row]]])
                replies[i] = self._reply(ids)
            progress(len(chosen))
        return replies

    def _encode(self, prompt: str | Sequence[Message], prefix: str) -> tuple[np.ndarray, np.ndarray]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        prompt_ids, prefix_ids = self.tokenizer.render(messages), self.tokenizer.encode(prefix)
        written, limit = len(prompt_ids) + len(prefix_ids), self.model.config.max_position_embeddings
        if written + self._plan.new_tokens > limit:
            raise InputError(
                f"a prompt of {written} tokens and max_new_tokens {self._plan.new_tokens} exceed the model's {limit} "
                f"positions: {str(prompt)[:40]!r}..."
            )
        return prompt_ids, prefix_ids

    def _batch(self, encoded: Sequence[tuple[np.ndarray, np.ndarray]], seeds: Sequence[int]) -> Prompts:
        longest = max(len(prompt) + len(prefix) for prompt, prefix in encoded)
        bucket = max(_BUCKET, 2 ** (longest.bit_length() - 3))
        tokens_BxP = np.zeros((self.batch_rows, -(-longest // bucket) * bucket), np.int32)
        length_B = np.ones(self.batch_rows, np.int32)
        reply_start_B = np.ones(self.batch_rows, np.int32)
        seed_B = np.zeros(self.batch_rows, np.uint32)
        for row, (prompt, prefix) in enumerate(encoded):
            length_B[row], reply_start_B[row], seed_B[row] = len(prompt) + len(prefix), len(prompt), seeds[row]
            tokens_BxP[row, : length_B[row]] = np.concatenate([prompt, prefix])
        return Prompts(tokens_BxP, length_B, reply_start_B, seed_B, np.arange(self.batch_rows) < len(encoded))

    def _reply(self, ids: np.ndarray) -> Reply:
        """Splits what a row emitted at its resets."""
        stopped = len(ids) > 0 and ids[-1] in self._plan.stop_ids
        is_reset = ids == self._plan.reset_id if self._plan.reset_id is not None else np.zeros(len(ids), bool)
        *drafts, reply = np.split(ids, np.flatnonzero(is_reset))
        return Reply(
            text=self.tokenizer.decode(reply),
            drafts=tuple(self.tokenizer.decode(draft) for draft in drafts),
            finish="stop" if stopped else "length",
        )


def _check_settings(tokenizer, context, max_resets, max_new_tokens, temperature, top_k, top_p, batch_rows) -> None:
    if context not in CONTEXTS:
        raise InputError(f"reset context {context!r}: {nearest(context, CONTEXTS)}")
    trained = tokenizer.reset_context
    if trained and (context == "rewind") != (trained == "rewind") and context != "resample":
        raise InputError(f"reset context {context!r}: the model was trained with {trained!r}; use that or 'resample'")
    if context == "resample" and temperature == 0 and tokenizer.reset_id is not None and max_resets:
        raise InputError("the reset context 'resample' needs a temperature above 0: the same draft would return")
    for name, value, least in (
        ("max_resets", max_resets, 0),
        ("max_new_tokens", max_new_tokens, 1),
        ("temperature", temperature, 0),
        ("top_k", top_k, 0),
        ("batch_rows", batch_rows, 1),
    ):
        if value < least:
            raise InputError(f"{name} is {value}; it must be at least {least}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1")
