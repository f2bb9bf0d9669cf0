"""A workdir: the names of its files, which are written whole or not at all, and none of which may lead out of it."""

from pathlib import Path

from jax_backtrack.errors import InputError

# Left by training.
RECIPE = "recipe.json"  # that the run was begun with
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB_RUN = "wandb_run.json"
CHECKPOINTS = "checkpoints"
EXPORT = "export"  # the trained model, a Hugging Face folder
# Left by the other modes.
SAMPLES = "samples.jsonl"
MT_BENCH = "mt_bench.jsonl"
SHOWN_DATA, DATA_ACCOUNT = "data.jsonl", "account.json"
COMPILED = "compile.json"


def atomic_write(path: Path, text: str) -> None:
    """Writes a file under another name first: it is there whole, or as it was before. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f"{path.name}.writing")
    writing.write_text(text, encoding="utf-8")
    writing.rename(path)


def check_links(workdir: Path) -> None:
    """Raises InputError where an entry of the workdir is a link out of it. The workdir itself may be a link."""
    if not workdir.is_dir():
        return
    root = workdir.resolve()
    for entry in sorted(workdir.iterdir()):
        if entry.is_symlink() and not (target := entry.resolve()).is_relative_to(root):
            raise InputError(
                f"{entry} is a link to {target}, out of the workdir: nothing is written or deleted through it. "
                "Put the whole workdir where there is room"
            )
