"""Language models that take back what they should not have begun to say."""

from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from jax_backtrack.sampling.sampler import Reply, Sampler

__all__ = ["Reply", "Sampler", "load", "save"]
