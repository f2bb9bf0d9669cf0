"""The frozen reference of DPO: one margin per pair, computed once and kept under a hash of all it depends on."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jax_backtrack.data.examples import content_hash
from jax_backtrack.data.rows import TreeSource, plan_rows
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.training.step import margins
from jax_backtrack.trees import pack, stack

PAIRS = 2  # the most pairs that a tree holds: a backtrack or plain pair, and a guard pair


def reference_hash(model: Transformer, source: TreeSource) -> str:
    """A hash of the reference's weights and dtype, the examples, and how trees are made of them."""
    digest = hashlib.blake2b(digest_size=16)
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        digest.update(f"{path} {param.shape} {param.dtype}".encode())
        digest.update(np.ascontiguousarray(param[...]).view(np.uint8).data)
    digest.update(content_hash(source.examples).encode())
    facts = dataclasses.asdict(source.recipe) | {"seed": source.seed, "compute": model.compute.dtype}
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def reference_margins(
    model: Transformer,
    source: TreeSource,
    *,
    folder: Path,
    row_length: int,
    batch_rows: int,
    chunk: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, bool]:
    """The reference's margin of every example's pairs, float32 `[examples, PAIRS]`, and whether it stood in `folder`.

    `progress` is called with the examples done and their number.
    """
    file = folder / f"{reference_hash(model, source)}.npy"
    total = len(source.examples)
    if file.exists():
        return np.load(file), True
    graph, params = nnx.split(model)
    result = np.zeros((total, PAIRS), np.float32)
    lengths = [source.length(0, index) for index in range(total)]
    packed = list(plan_rows(lengths, row_length))
    done = 0
    for start in range(0, len(packed), batch_rows):
        members = packed[start : start + batch_rows]
        padding = [pack([], row_length)] * (batch_rows - len(members))
        rows = [pack([source.tree(0, index) for index in row], row_length) for row in members]
        batch = stack(rows + padding)
        if model.compute.rows:
            batch = jax.device_put(batch, model.compute.rows)
        margin_BxS = np.asarray(margins(graph, params, batch, chunk))
        for number, row in enumerate(members):
            slot = 0
            for index in row:
                result[index] = margin_BxS[number, slot : slot + PAIRS]
                slot += lengths[index]
        done += sum(map(len, members))
        progress(done, total)
    folder.mkdir(parents=True, exist_ok=True)
    writing = file.with_suffix(".writing.npy")
    np.save(writing, result)
    writing.rename(file)
    return result, False
