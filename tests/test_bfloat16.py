"""Training with bfloat16 activations follows training in float32 within a band, on real weights."""

import json

from configs import sft_smollm
from jax_backtrack.training.loop import train

STEPS = 2
# Of the loss, relative to that of float32 at the same update. Ten updates need wider ones (docs/RELIABILITY.md).
BAND = 0.1


def losses(dtype: str, smollm_gguf, workdir) -> list[float]:
    config = sft_smollm.get_config()
    config.model.path, config.model.compute_dtype = str(smollm_gguf), dtype
    config.data.path, config.data.limit = "testbed", 20
    config.train.update(dict(steps=STEPS, batch_rows=1, row_length=128, warmup_steps=0, learning_rate=1e-4))
    config.train.checkpoint_every = 0
    train(config, workdir)
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_stays_within_the_band(smollm_gguf, tmp_path):
    exact, rounded = (losses(dtype, smollm_gguf, tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    apart = [abs(one - other) / one for one, other in zip(exact, rounded, strict=True)]
    assert len(apart) == STEPS and 0 < max(apart) < BAND
