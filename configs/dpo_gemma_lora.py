"""Backtracking DPO of Gemma-2-2B by adapters, on one chip of 16 GB. Set `model.path` (an SFT workdir), `data.path`."""

from configs import sft_gemma_lora


def get_config():
    """As the SFT recipe, with the learning rate of a second stage. The reference is the frozen model."""
    config = sft_gemma_lora.get_config()
    config.objective = "dpo"
    config.train.steps = 200
    config.train.learning_rate = 2e-5
    return config
