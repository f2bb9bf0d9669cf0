"""Backtracking SFT of Gemma-2-2B, all parameters, on v5e-4 and up; set `data.path` and `data.utility_path`."""

from configs import sft_llama


def get_config():
    """As for Llama-3-8B, with the batch of a quarter of the chips and a vocabulary of twice the size."""
    config = sft_llama.get_config()
    config.model.path = "google/gemma-2-2b"
    config.model.chat_template = "gemma2"
    config.train.batch_size = 32
    config.train.logits_chunk_size = 32
    config.train.remat = "attention"
    config.train.nu_dtype = "bfloat16"
    config.sample.max_num_seqs = 32
    return config
