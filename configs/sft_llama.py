"""Backtracking SFT of Llama-3-8B, all parameters, on v5e-16 and up; set `data.path` and `data.utility_path`."""

from configs import base


def get_config():
    """Sized for 16 GB per chip: 128 rows of 1,024 tokens a step, 8 a chip on v5e-16."""
    config = base.get_config()
    config.model.path = "meta-llama/Meta-Llama-3-8B"
    config.model.chat_template = "llama3"
    config.model.compute_dtype = "bfloat16"
    config.train.batch_size = 128
    config.train.max_seq_len = 1024
    config.train.steps = 500
    config.train.learning_rate = 1e-5
    config.train.warmup_steps = 20
    config.train.remat = "full"
    config.train.mu_dtype = "bfloat16"
    config.mesh.data = -1
    config.mesh.fsdp = -1
    config.sample.max_num_seqs = 128
    return config
