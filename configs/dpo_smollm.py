"""Backtracking DPO of SmolLM2-135M; set `model.path` to the workdir of an SFT run, and `data.path`."""

from configs import sft_smollm


def get_config():
    """As the SFT recipe, with the learning rate of a second stage."""
    config = sft_smollm.get_config()
    config.objective = "dpo"
    config.train.learning_rate = 2e-5
    config.train.rpo_alpha = 0.5
    config.train.max_seq_len = 1024
    config.train.batch_size = 2
    return config
