"""Language models that take back what they should not have begun to say."""

from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from jax_backtrack.sampling.replies import Reply, Trace
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.streams import Done, Piece, Retract, Token

__all__ = ["Done", "Piece", "Reply", "Retract", "Sampler", "Token", "Trace", "load", "save"]
