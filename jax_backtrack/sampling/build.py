"""A sampler as a recipe wants it."""

from ml_collections import ConfigDict

from jax_backtrack.models.transformer import Transformer
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.settings import SamplingParams
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer


def recipe_sampler(config: ConfigDict, model: Transformer, tokenizer: ChatTokenizer) -> Sampler:
    """Returns a sampler with a recipe's settings; its reset mode counts where the model was trained to backtrack."""
    reset_mode = config.reset.mode if tokenizer.reset_mode or tokenizer.asks_reset_mode else None
    return Sampler(model, tokenizer, SamplingParams(**config.sample), reset_mode=reset_mode)
