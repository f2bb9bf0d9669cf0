"""Backtracking DPO of SmolLM2-135M; set `model.path` to the workdir of an SFT run, and `data.path`."""

from configs import sft_smollm


def get_config():
    """As the SFT recipe, with the learning rate of a second stage."""
    config = sft_smollm.get_config()
    config.objective = "dpo"
    config.train.learning_rate = 2e-5
    config.train.chosen_weight = 0.5
    config.train.row_length = 1024
    config.train.batch_rows = 2
    return config
