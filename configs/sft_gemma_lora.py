"""Backtracking SFT of Gemma-2-2B by adapters, on one chip of 16 GB (v5e-1, Colab); set the data paths."""

from configs import sft_gemma


def get_config():
    """The model is frozen in bfloat16; what is trained is 0.8 % of it, and the rows of [RESET]."""
    config = sft_gemma.get_config()
    config.model.param_dtype = "bfloat16"
    config.lora.rank = 16
    config.train.batch_size = 8
    config.train.learning_rate = 2e-4
    config.train.reset_weight = 5.0  # as in sft_smollm.py
    config.sample.max_num_seqs = 8
    return config
