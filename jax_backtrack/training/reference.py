"""The frozen reference of DPO: two numbers per pair, computed once and kept under a hash of all they depend on."""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jax_backtrack.data.examples import content_hash
from jax_backtrack.data.process_local_batch import packed_batches
from jax_backtrack.data.rows import TreeSource
from jax_backtrack.distributed.mesh import on_host, platform
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.training.step import logps
from jax_backtrack.utils.fingerprint import fingerprint
from jax_backtrack.utils.workdir import atomic_write

PORTION = 2048  # examples after which what was computed is written: a run that is stopped loses no more
PAIRS = 2  # the most pairs that a tree holds: a backtrack or plain pair, and a guard pair


def reference_hash(model: Transformer, source: TreeSource) -> str:
    """Returns a hash of the reference's weights, configuration, dtype and kind of device, the examples, and how trees
    are made of them. Two kinds of device multiply float32 differently."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(fingerprint(nnx.state(model, nnx.Param)).encode())
    digest.update(content_hash(source.examples).encode())
    facts = dataclasses.asdict(source.spec) | {"seed": source.seed, "compute": model.compute.dtype}
    facts["device"] = platform(model.compute.mesh), jax.config.jax_default_matmul_precision
    facts["holds"] = "the sides of each pair"
    facts["model"] = dataclasses.asdict(model.config)
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def reference_logps(
    model: Transformer,
    source: TreeSource,
    needed: Sequence[int],
    *,
    folder: Path,
    max_seq_len: int,
    batch_size: int,
    chunk: int,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[np.ndarray, int]:
    """Returns the reference's log-probabilities of the needed examples' pairs (`losses.pair_logps`), float32
    `[examples, PAIRS, 2]`, and of how many examples they were computed.

    What was computed before for this reference and these examples stands in `folder` and is not computed again;
    examples that nobody needed so far have NaN. It is written after every `PORTION` examples. `progress` is called with
    the number of examples done since its last call. Of several processes all must call this and all get the same; the
    first one reads and writes the folder.
    """
    file = folder / f"{reference_hash(model, source)}.npy"
    result = _read(file, len(source.examples))
    missing = [index for index in needed if np.isnan(result[index]).any()]
    progress(len(needed) - len(missing))
    if not missing:
        return result, 0
    for start in range(0, len(missing), PORTION):
        portion = missing[start : start + PORTION]
        result[portion] = 0
        result[portion, : source.spec.pairs] = tree_logps(
            model, source, portion, max_seq_len=max_seq_len, batch_size=batch_size, chunk=chunk, progress=progress
        )
        if jax.process_index() == 0:
            content = io.BytesIO()
            np.save(content, result)
            atomic_write(file, content.getvalue())
    return result, len(missing)


def tree_logps(
    model: Transformer,
    source: TreeSource,
    indices: Sequence[int],
    *,
    max_seq_len: int,
    batch_size: int,
    chunk: int,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Returns both sides of the pairs of these examples' trees in the first epoch, float32 `[len(indices), pairs, 2]`.
    In SFT a tree is one pair, whose chosen side is the weighted sum of the tree's log-probabilities. Of several
    processes all must call this, and all get the same."""
    graph, params = nnx.split(model)
    packed = [row.members for row in source.best_fit_pack(0, indices, max_seq_len)]
    pairs, all_logps = source.spec.pairs, {}
    tree = functools.partial(source.tree, 0)
    for members, batch in packed_batches(packed, tree, max_seq_len, batch_size, model.compute.mesh):
        logps_BxSx2 = on_host(logps(graph, params, batch, chunk))
        for number, row in enumerate(members):
            all_logps.update(zip(row, logps_BxSx2[number, : len(row) * pairs].reshape(-1, pairs, 2), strict=True))
        progress(sum(map(len, members)))
    return np.array([all_logps[index] for index in indices])


def _read(file: Path, examples: int) -> np.ndarray:
    """Returns what process 0 finds in the file, NaN where there is nothing, on every process."""
    nothing = np.full((examples, PAIRS, 2), np.nan, np.float32)
    array = np.load(file) if jax.process_index() == 0 and file.exists() else nothing
    return np.array(multihost_utils.broadcast_one_to_all(array))
