"""Where the numbers of a run go: `metrics.jsonl` and TensorBoard events."""

import json
from pathlib import Path

import jax
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends one line per step to `metrics.jsonl`, and the same numbers to TensorBoard. Only process 0 writes.

    Lines of steps from `first_step` on are removed first: a resumed run writes them again.
    """

    def __init__(self, workdir: Path, first_step: int):
        self._file = self._events = None
        if jax.process_index() != 0:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step(line) < first_step] if path.exists() else []
        path.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the numbers of one step."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes both files."""
        if self._file is not None:
            self._file.close()
            self._events.close()


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the last line of a killed process may be cut short
        return 2**63
