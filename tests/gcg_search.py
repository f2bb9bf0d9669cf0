"""Searches of GCG on tiny models."""

import dataclasses

from jax_backtrack.evaluation.attacks.gcg import Attack, Objective, Settings

QUESTION = [{"role": "user", "content": "hello there"}]


SETTINGS = Settings(suffix="a b c d e f", steps=4, width=24, top_k=8, rows=6)


def attack(attacked, reset_weight: float = 0.0, **settings) -> Attack:
    model, tokenizer = attacked
    objective = Objective.of(tokenizer, QUESTION, "the end", reset_weight)
    return Attack(model, tokenizer, objective, dataclasses.replace(SETTINGS, **settings))
