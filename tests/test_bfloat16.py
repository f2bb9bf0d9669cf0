"""Training with bfloat16 activations follows training in float32 within a band, on real weights."""

import json

from tests import processes

STEPS = 3
# Of the loss, relative to that of float32 at the same update. Ten updates need wider ones (docs/RELIABILITY.md).
BAND = 0.1


# Trains with each, in a process of its own, because a model of this size is run by code that is compiled with care.
PROGRAM = f"""
import sys
from pathlib import Path
from configs import sft_smollm
from jax_backtrack.training.loop import train
smollm, folder = sys.argv[1:]
for dtype in ("float32", "bfloat16"):
    config = sft_smollm.get_config()
    config.model.path, config.model.compute_dtype = smollm, dtype
    config.data.path, config.data.limit = "testbed", 20
    config.train.update(dict(steps={STEPS}, batch_rows=1, row_length=192, warmup_steps=0, learning_rate=1e-4))
    config.train.checkpoint_every = 0
    train(config, Path(folder) / dtype)
"""


def test_the_loss_stays_within_the_band(smollm_gguf, tmp_path):
    output, errors = (process := processes.start("-c", PROGRAM, smollm_gguf, tmp_path, XLA_FLAGS="")).communicate()
    assert process.returncode == 0, output + errors
    exact, rounded = (
        [json.loads(line)["loss"] for line in (tmp_path / dtype / "metrics.jsonl").read_text().splitlines()]
        for dtype in ("float32", "bfloat16")
    )
    apart = [abs(one - other) / one for one, other in zip(exact, rounded, strict=True)]
    assert len(apart) == STEPS and 0 < max(apart) < BAND
