"""Seeds of replies, from the one seed of a recipe."""

import numpy as np


def reply_seeds(seed: int, count: int) -> list[int]:
    """Returns the seeds of the first `count` replies, 32 bits each, as SeedSequence spreads them.

    A reply's seed depends on `seed` and its number alone. Those of two recipes' seeds are unrelated: had they been
    counted up, run 1 would have repeated all but one of run 0's.
    """
    return np.random.SeedSequence(seed).generate_state(count).tolist()


def reply_seed(seed: int, number: int) -> int:
    """Returns the seed of one reply, numbered from 0, as `reply_seeds` has it."""
    return reply_seeds(seed, number + 1)[number]
