"""Backtracking DPO of Llama-3-8B, all parameters, on v5e-16 and up. Set `model.path` (an SFT workdir), `data.path`."""

from configs import sft_llama


def get_config():
    """As the SFT recipe, with the learning rate of a second stage."""
    config = sft_llama.get_config()
    config.objective = "dpo"
    config.train.steps = 200
    config.train.learning_rate = 5e-7
    return config
