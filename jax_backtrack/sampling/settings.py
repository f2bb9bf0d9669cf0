"""Settings of sampling."""

from jax_backtrack.hub.load import DTYPES
from jax_backtrack.utils.settings import field, section


@section("sample")
class SampleSettings:
    """Sampling, in every mode that writes replies."""

    max_new_tokens: int = field(
        256,
        "Most tokens of a reply. In the reset mode `keep` its drafts and resets count; in the others each draft may be "
        "as long again.",
        unit="tokens",
        least=1,
    )
    temperature: float = field(0.0, "Temperature; 0 takes the likeliest token.", least=0)
    top_k: int = field(0, "Number of likeliest tokens that are drawn from; 0 for all.", unit="tokens", least=0)
    top_p: float = field(1.0, "Share of the distribution that is drawn from; 1 for all.", unit="share", above=0, most=1)
    min_p: float = field(
        0.0,
        "Share of the likeliest token's probability that a token must have; 0 for all.",
        unit="share",
        least=0,
        most=1,
    )
    repetition_penalty: float = field(
        1.0, "Repetition penalty; above 1, tokens that stand in the context become less likely.", above=0
    )
    stop_strings: tuple[str, ...] = field((), "Texts that end a reply, which ends before them.")
    cache_dtype: str = field("", 'Dtype of keys and values; `""`: `model.compute_dtype`.', choices=("", *DTYPES))
    batch_rows: int = field(16, "Prompts in flight at once.", unit="prompts", least=1)
    seed: int = field(0, "Seed of the first prompt; each next one counts up.", least=0)
    samples: int = field(1, "Replies per prompt, in `--mode=sample`.", unit="replies", least=1)
    log_probs: bool = field(
        False, "True adds the log-probability of every token, and of `[RESET]` in its place, in `--mode=sample`."
    )
    hold_back: int = field(
        0,
        "Newest tokens that stay unseen in `--mode=chat` and `--mode=web`: a reset within so many shows nothing.",
        unit="tokens",
        least=0,
    )
    limit: int = field(0, "Prompts used; 0 for all.", unit="prompts", least=0)
