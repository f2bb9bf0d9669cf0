"""The demo: SmolLM2-135M untrained, after plain SFT, after backtracking SFT, and after backtracking DPO, side by side.

    python main.py --config=demo.py --workdir=runs/demo --mode=run-stages

It runs on the testbed (`jax_backtrack/data/testbed.py`), on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import sft_smollm


def get_config():
    """The stages, in the order in which they run; each is a recipe of its own."""
    config = ConfigDict()
    config.stages = ConfigDict()
    config.order = ("untrained", "SFT", "backtracking SFT", "backtracking SFT + DPO")  # a ConfigDict sorts its keys
    config.stages["untrained"] = _stage(steps=0, backtrack=False)
    config.stages["SFT"] = _stage(steps=20, backtrack=False)
    config.stages["backtracking SFT"] = _stage(steps=28, backtrack=True)
    config.stages["backtracking SFT + DPO"] = _dpo(steps=12)
    return config


def _stage(steps: int, backtrack: bool):
    config = sft_smollm.get_config()
    config.data.path = "testbed"
    config.data.backtrack = backtrack
    config.train.steps = steps
    config.train.max_seq_len = 256
    config.train.batch_size = 2
    config.train.learning_rate = 2e-4
    config.train.warmup_steps = 5
    config.train.reset_weight = 1.0
    config.train.logits_chunk_size = 32
    config.train.checkpoint_every_steps = 0
    config.sample.max_new_tokens = 20
    config.sample.max_num_seqs = 100
    config.evaluate.prompts = 200
    return config


def _dpo(steps: int):
    config = _stage(steps, backtrack=True)
    config.objective = "dpo"
    config.model.path = "{workdir}/backtracking_SFT"
    config.data.limit = 72
    config.train.learning_rate = 2e-5
    config.train.rpo_alpha = 0.5
    return config
