"""Backtracking SFT of SmolLM2-135M on preference pairs; set `data.path`."""

from configs import base


def get_config():
    """Sized for a CPU: short rows, few of them."""
    config = base.get_config()
    config.objective = "sft"
    config.train.steps = 100
    config.train.batch_size = 4
    config.train.max_seq_len = 512
    config.train.learning_rate = 2e-4
    config.train.warmup_steps = 3
    # One [RESET] stands against two replies, of some 40 tokens each in HH-RLHF: here it is a twentieth of the loss's
    # weight, about what it is in the demo.
    config.train.reset_weight = 5.0
    config.sample.max_new_tokens = 96
    return config
