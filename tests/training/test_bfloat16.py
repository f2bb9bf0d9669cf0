"""Training with bfloat16 activations follows training in float32 within a band, on real weights."""

import json

from tests import processes

STEPS = 3
# Of the loss, relative to that of float32 at the same update. Ten updates need wider ones (docs/RELIABILITY.md).
BAND = 0.1


def losses(dtype: str, smollm_gguf, workdir) -> list[float]:
    """Of a run in a process of its own, because a model of this size is run by code that is compiled with care."""
    flags = {
        "model.path": smollm_gguf,
        "model.compute_dtype": dtype,
        "data.path": "testbed",
        "data.limit": 20,
        "train.steps": STEPS,
        "train.batch_size": 1,
        "train.max_seq_len": 192,
        "train.warmup_steps": 0,
        "train.learning_rate": 1e-4,
        "train.checkpoint_every_steps": 0,
    }
    command = ["main.py", "--config=sft_smollm.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in flags.items()]
    process = processes.start(*command, XLA_FLAGS="")
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_stays_within_the_band(smollm_gguf, tmp_path):
    exact, rounded = (losses(dtype, smollm_gguf, tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    apart = [abs(one - other) / one for one, other in zip(exact, rounded, strict=True)]
    assert len(apart) == STEPS and 0 < max(apart) < BAND
