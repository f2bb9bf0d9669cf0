"""Trains by jax_backtrack as `benchmarks.alternate` says: `python -m benchmarks.our_worker '{...}'`.

Rows are built on the clock, one batch after the other, where training prefetches them.
"""

import functools
import json
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_backtrack
from benchmarks import pairs
from benchmarks.channel import Channel, peak_bytes
from jax_backtrack.backtracking.trees import NO_PARENT, Cuts, TokenTrees, pack, stack, tree_length
from jax_backtrack.data.process_local_batch import ProcessLocalBatch
from jax_backtrack.data.rows import PackedRows, TreeSource
from jax_backtrack.distributed.mesh import platform, rows_sharding
from jax_backtrack.models.flops import step_flops
from jax_backtrack.models.lora import split
from jax_backtrack.models.transformer import Compute
from jax_backtrack.training.reference import reference_logps
from jax_backtrack.training.step import Batch, TrainConfig, compile_step, init_state

SFT_UPDATES = 64  # updates' rows that are planned; training goes round them
STRIDE = 128  # row lengths that are tried are multiples of this
CHECKED = 2  # examples on which both sides are compared


def is_real(rows: TokenTrees) -> np.ndarray:
    """bool `[S]`: padding is a root without a subtree."""
    index = np.arange(rows.length)
    return ~((rows.parent == NO_PARENT) & (rows.subtree_end == index + 1))


def empty_item(max_seq_len: int) -> dict:
    """A row of padding, as `PackedRows` would give it."""
    return {"rows": pack([], max_seq_len), "reference": np.zeros((max_seq_len, 2), np.float32)}


def units_per_example(source: TreeSource) -> int:
    return 2 if source.spec.backtrack else 1


def epoch_rows(source: TreeSource, max_seq_len: int) -> PackedRows:
    """About one epoch; its last rows, which are hardly filled, left out."""
    tokens = sum(source.length(0, number) for number in range(len(source.examples)))
    return PackedRows(source, max_seq_len, max(1, tokens // max_seq_len))


def units_per_row(source: TreeSource, max_seq_len: int) -> float:
    rows = epoch_rows(source, max_seq_len)
    return units_per_example(source) * np.mean([len(rows.members(number)) for number in range(len(rows))])


def best_max_seq_len(source: TreeSource, batch_size: int, effective_batch: float) -> int:
    """The row length with which an update has nearest to `effective_batch` units on average."""
    # Other epochs of SFT may draw other drafts: room for the longest.
    lengths = [
        tree_length(example, source.spec, Cuts(draft=len(example.rejected) - 1, guard=len(example.chosen) - 1))
        for example in source.examples
    ]
    longest = max(max(lengths), sum(source.length(0, number) for number in range(CHECKED)))
    tried = {}
    length = -(-longest // STRIDE) * STRIDE
    while True:
        tried[length] = batch_size * units_per_row(source, length) - effective_batch
        if tried[length] >= 0:
            return min(tried, key=lambda each: abs(tried[each]))
        length += STRIDE


class Trainer:
    """The model, its step, and the rows it is trained on."""

    def __init__(self, settings: dict):
        self.source = pairs.read_source(settings["data"])
        self.batch_size = settings["batch_size"]
        self.max_seq_len = settings["max_seq_len"] or best_max_seq_len(
            self.source, self.batch_size, settings["effective_batch"]
        )
        self.logits_chunk_size = settings["logits_chunk_size"]
        compute = Compute.suited_to(platform(None), dtype=settings["dtype"])
        self.model, tokenizer = jax_backtrack.load(settings["model"], compute=compute)
        if settings["dtype"] == "float32":  # of a GPU it would be TF32, which is not what torch computes
            jax.config.update("jax_default_matmul_precision", "highest")
        self.plan = TrainConfig(
            objective=self.source.spec.objective,
            beta=settings["beta"],
            rpo_alpha=0.0,
            steps=10**6,
            learning_rate=settings["learning_rate"],
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            logits_chunk_size=self.logits_chunk_size,
            reset_id=tokenizer.reset_id,
        )
        # In DPO as many as there is a reference for.
        updates = (
            settings["reference_units"] // settings["effective_batch"] if settings["reference_units"] else SFT_UPDATES
        )
        self.rows = PackedRows(self.source, self.max_seq_len, max(2, updates) * self.batch_size)
        self.units = units_per_example(self.source)
        self.flops = step_flops(self.model.config, self.batch_size, self.max_seq_len)
        self.number = 0
        self.checked: np.ndarray | None = None  # the reference's sides of the first examples' pairs

    def reference(self, folder: Path) -> dict:
        """Sets the sides of the checked examples and of those in the rows; tells what the latter took, without
        compiling.

        What every pass costs anew, whatever it computes (the hash of the weights), is spread over the whole data.
        """
        make = functools.partial(
            reference_logps,
            self.model,
            self.source,
            folder=folder,
            max_seq_len=self.max_seq_len,
            batch_size=self.batch_size,
            chunk=self.logits_chunk_size,
        )
        checked, _ = make(list(range(CHECKED)))
        self.checked = checked[:CHECKED]
        needed = self.rows.examples()
        start = time.perf_counter()
        logps, computed = make(needed)
        first = time.perf_counter() - start
        start = time.perf_counter()
        _, computed_again = make(needed)
        again = time.perf_counter() - start
        pairs_done = computed * self.units
        per_pair = (first - again) / pairs_done + again / (len(self.source.examples) * self.units)
        self.rows.reference = logps
        return dict(
            seconds_per_unit=per_pair,
            units=pairs_done,
            again_computed=computed_again,
            again_seconds=again,
        )

    def start(self) -> None:
        """Makes the state; the model's parameters move into it."""
        graph, trained, self.frozen = split(self.model)
        self.local_batch = ProcessLocalBatch(rows_sharding(self.model.compute.mesh), self.batch_size)
        self.state = init_state(trained, self.plan)
        self.compiled = compile_step(graph, self.plan, self.state)

    def update(self, items: list[dict]) -> dict:
        batch = Batch(stack([item["rows"] for item in items]), np.stack([item["reference"] for item in items]))
        self.state, metrics = self.compiled(self.state, self.frozen, self.local_batch.to_global(batch))
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def first_update(self) -> dict:
        """Loss and gradient norm on the checked examples alone."""
        checked = TreeSource(self.source.examples[:CHECKED], self.source.spec, self.source.seed)
        rows = PackedRows(checked, self.max_seq_len, 1)
        if len(rows.members(0)) < CHECKED:
            raise SystemExit(f"--max-seq-len={self.max_seq_len} does not hold the first {CHECKED} examples: raise it")
        rows.reference = self.checked
        metrics = self.update([rows[0], *(empty_item(self.max_seq_len) for _ in range(self.batch_size - 1))])
        return dict(loss=metrics["loss"], gradient_norm=metrics["grad_norm"])

    def run(self, steps: int) -> dict:
        """Some updates on the clock, and what they held."""
        done = []
        start = time.perf_counter()
        for _ in range(steps):
            numbers = [(self.number * self.batch_size + row) % len(self.rows) for row in range(self.batch_size)]
            items = [self.rows[number] for number in numbers]
            self.update(items)
            self.number += 1
            done += list(zip(numbers, items, strict=True))
        seconds = time.perf_counter() - start
        return dict(
            seconds=seconds,
            flops=steps * self.flops,
            units=self.units * sum(len(self.rows.members(number)) for number, _ in done),
            computed=self.max_seq_len * len(done),
            real=int(sum(is_real(item["rows"]).sum() for _, item in done)),
        )

    def packed(self) -> dict:
        """Of about one epoch: units per update, and tokens per unit as they lie in the rows, padding aside."""
        rows = epoch_rows(self.source, self.max_seq_len)
        units = self.units * sum(len(rows.members(number)) for number in range(len(rows)))
        real = sum(int(is_real(rows[number]["rows"]).sum()) for number in range(len(rows)))
        return dict(units_per_update=self.batch_size * units / len(rows), real_per_unit=real / units)


def product_flops(dtype: str) -> float:
    """Floating-point operations per second of a product of large matrices: the best of a few tries."""
    size = 2048 if platform(None) == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def device_peak_bytes() -> int:
    """The most memory in use so far: of the device, or of the process where that is the CPU."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else peak_bytes()


def main():
    channel = Channel()
    settings = json.loads(sys.argv[1])
    trainer = Trainer(settings)
    check, reference = {}, None
    if trainer.plan.objective == "dpo":
        with tempfile.TemporaryDirectory() as folder:
            reference = trainer.reference(Path(folder))
        chosen, rejected = np.moveaxis(trainer.checked[:, : trainer.units], -1, 0)
        check["margins"] = (chosen - rejected).ravel().tolist()
    trainer.start()
    check |= trainer.first_update()
    trainer.run(settings["warm_up"])
    channel.send(
        check=check,
        reference=reference,
        max_seq_len=trainer.max_seq_len,
        batch_size=trainer.batch_size,
        device=jax.devices()[0].device_kind,
        product_flops=product_flops(settings["dtype"]),
        **trainer.packed(),
    )
    while steps := channel.steps_asked():
        channel.send(**trainer.run(steps))
    channel.send(peak_bytes=device_peak_bytes())


if __name__ == "__main__":
    main()
