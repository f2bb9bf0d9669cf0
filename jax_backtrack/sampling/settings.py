"""Settings of sampling, and the two halves of them that the compiled loop takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_backtrack.hub.load import DTYPES
from jax_backtrack.utils.settings import field, section

_MAX_STEPS = 64  # of one call of the loop

# How the loop takes a setting. The other settings are read on the host.
STATIC = "static"  # compiled in: another value is another compilation
TRACED = "traced"  # a number that it is called with
OPTIONAL = "optional"  # traced, and compiled in whether it has its default, at which nothing is computed for it
NO_REPLY = "no reply"  # not at all, and no single reply depends on it


@section("sample")
class SamplingParams:
    """Sampling, in every mode that writes replies."""

    max_new_tokens: int = field(
        256,
        "Most tokens of a reply. In the reset mode `keep` its drafts and resets count; in the others each draft may be "
        "as long again.",
        unit="tokens",
        least=1,
    )
    temperature: float = field(0.0, "Temperature; 0 takes the likeliest token.", least=0, in_loop=OPTIONAL)
    top_k: int = field(
        0, "Number of likeliest tokens that are drawn from; 0 for all.", unit="tokens", least=0, in_loop=STATIC
    )
    top_p: float = field(
        1.0, "Share of the distribution that is drawn from; 1 for all.", unit="share", above=0, most=1, in_loop=OPTIONAL
    )
    min_p: float = field(
        0.0,
        "Share of the likeliest token's probability that a token must have; 0 for all.",
        unit="share",
        least=0,
        most=1,
        in_loop=OPTIONAL,
    )
    repetition_penalty: float = field(
        1.0,
        "Repetition penalty; above 1, tokens that stand in the context become less likely.",
        above=0,
        in_loop=OPTIONAL,
    )
    max_resets: int = field(
        1,
        "Number of resets that a reply may have; `[RESET]` is masked out after them.",
        unit="resets",
        least=0,
        in_loop=TRACED,
    )
    reset_bias: float = field(
        0.0,
        "Bias that is added to the logit of `[RESET]`; a lower one gives fewer resets. In Python also a list, one bias "
        "for each position after the prompt, the last one for all later ones.",
        unit="nats",
        in_loop=TRACED,
    )
    stop_strings: tuple[str, ...] = field(
        (),
        "Texts that end a reply, which ends before them.",
        problem=lambda texts: None if all(texts) else "it must be a list of texts that are not empty",
    )
    logprobs: bool = field(
        False,
        "True keeps the log-probability of every token, and of `[RESET]` in its place, in a reply's `trace`.",
        in_loop=STATIC,
    )
    cache_dtype: str = field("", 'Dtype of keys and values; `""`: `model.compute_dtype`.', choices=("", *DTYPES))
    max_num_seqs: int = field(16, "Prompts in flight at once.", unit="prompts", least=1, in_loop=NO_REPLY)
    n: int = field(
        1, "Number of replies per prompt; evaluation has `evaluate.samples`.", unit="replies", least=1, in_loop=NO_REPLY
    )
    seed: int = field(0, "Seed that the seeds of replies are derived from.", least=0, in_loop=NO_REPLY)
    hold_back: int = field(
        0,
        "Newest tokens that stay unseen in `--mode=chat` and `--mode=web`: a reset within so many shows nothing.",
        unit="tokens",
        least=0,
        in_loop=NO_REPLY,
    )
    limit: int = field(0, "Prompts of a file that are used; 0 for all.", unit="prompts", least=0, in_loop=NO_REPLY)

    def __post_init__(self):
        for setting in self.settings:
            name = setting.short_name
            value = getattr(self, name)
            if isinstance(value, (np.generic, np.ndarray)):
                value = value.tolist()
            by_position = name == "reset_bias" and isinstance(value, (list, tuple)) and value
            for entry in value if by_position else [value]:
                dataclasses.replace(setting, name=name).check(entry)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)

    def decisive(self) -> dict:
        """Returns by name the settings that a reply depends on, beside its prompt and its seed."""
        return {name: getattr(self, name) for name, how in _IN_LOOP.items() if how != NO_REPLY}


_IN_LOOP = {setting.short_name: setting.in_loop for setting in SamplingParams.settings}


@dataclasses.dataclass(frozen=True)
class _Static:
    """Holds what the loop is compiled for, beside the settings that are `STATIC`.

    reset_mode: "keep" | "rewind" | "resample"
    reset_id:   id of [RESET], or None for a model without it
    stop_ids:   ids that end a reply
    unused_ids: ids that no token has, which are never drawn: first and one after the last of each run
    steps:      the most steps of one call
    used:       names of the `OPTIONAL` settings that have another value than their default
    """

    reset_mode: str
    reset_id: int | None
    stop_ids: tuple[int, ...]
    unused_ids: tuple[tuple[int, int], ...] = ()
    steps: int = _MAX_STEPS
    used: frozenset[str] = frozenset()

    def uses(self, setting: str) -> bool:
        """Returns whether this `OPTIONAL` setting has another value than its default."""
        return setting in self.used


COMPILED_FOR = ("reset_mode", "reset_id", "stop_ids", "unused_ids")  # what no setting of `SamplingParams` holds


def _half(name: str, kinds: tuple[str, ...], **options) -> type:
    fields = [
        (setting.name, setting.type, dataclasses.field(default=setting.default))
        for setting in dataclasses.fields(SamplingParams)
        if _IN_LOOP[setting.name] in kinds
    ]
    return dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__module__": __name__}, **options)


# Another `StaticParams` is another compilation.
StaticParams = _half("StaticParams", (STATIC,), bases=(_Static,))
# Scalars, float32 or int32, but for `reset_bias`: float32 `[B, positions]` or `[1, positions]`, by the position after
# the prompt that is written; the last one for all positions after it.
TracedParams = jax.tree_util.register_dataclass(_half("TracedParams", (TRACED, OPTIONAL)))


def split_params(params: SamplingParams, **compiled_for) -> tuple[StaticParams, TracedParams]:
    """Returns what the loop is compiled for, and what it is called with.

    compiled_for: fields of `StaticParams` that no setting holds
    """
    defaults = SamplingParams()
    optional = [name for name, how in _IN_LOOP.items() if how == OPTIONAL]
    static = StaticParams(
        **compiled_for,
        steps=steps_per_call(params.max_new_tokens),
        used=frozenset(name for name in optional if getattr(params, name) != getattr(defaults, name)),
        **{name: getattr(params, name) for name, how in _IN_LOOP.items() if how == STATIC},
    )
    return static, TracedParams(
        **{traced_field.name: _array(params, traced_field) for traced_field in dataclasses.fields(TracedParams)}
    )


def _array(params: SamplingParams, traced_field: dataclasses.Field) -> jax.Array:
    number = jnp.asarray(getattr(params, traced_field.name), jnp.int32 if traced_field.type is int else jnp.float32)
    return jnp.atleast_2d(number) if traced_field.name == "reset_bias" else number


def steps_per_call(new_tokens: int) -> int:
    """Returns the steps of one call of the loop, for replies of up to so many tokens."""
    return min(new_tokens, _MAX_STEPS)
