"""What a training step costs by its rows: backtracking SFT of SmolLM2-135M, by numbers of rows.

    python -m benchmarks.rows --data=../shared/data/hh-rlhf/harmless-base.jsonl.gz

Each number of rows compiles once; a figure is the median of some updates. "compilations" counts those of all updates.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax

from benchmarks import pairs
from benchmarks.our_worker import Trainer
from benchmarks.worker import platforms, print_table, say, write_model
from jax_backtrack.data.rows import TreeSource


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preferences, as data.path of a recipe")
    parser.add_argument("--rows", default="1,2,4", help="rows of an update, by commas")
    parser.add_argument("--max-seq-len", type=int, default=768)
    parser.add_argument("--updates", type=int, default=5, help="that are timed, besides a first one")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    jax.config.update("jax_platforms", platforms())
    results = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        _, tokenizer = write_model("", scratch / "model")
        source = TreeSource(pairs.usable(options.data, tokenizer, 64), pairs.make_recipe("sft", True, tokenizer), 0)
        pairs.write(scratch / "data.json", source)
        for rows in map(int, options.rows.split(",")):
            results.append(_measure(scratch, rows, options))
            say(f"{rows} rows: {results[-1]['seconds']:.4f} s")
    table = [["rows", "seconds", "seconds a row", "compilations"]]
    table += [
        [str(one["rows"]), f"{one['seconds']:.4f}", f"{one['seconds_per_row']:.4f}", str(one["compilations"])]
        for one in results
    ]
    print_table(table)
    print(json.dumps(results))


def _measure(scratch: Path, rows: int, options: argparse.Namespace) -> dict:
    trainer = Trainer(
        dict(
            data=str(scratch / "data.json"),
            model=str(scratch / "model"),
            dtype=options.dtype,
            batch_size=rows,
            max_seq_len=options.max_seq_len,
            effective_batch=0,
            reference_units=0,
            logits_chunk_size=128,
            beta=0.1,
            learning_rate=1e-5,
        )
    )
    trainer.start()
    trainer.run(1)
    taken = []
    for _ in range(options.updates):
        start = time.perf_counter()
        trainer.run(1)
        taken.append(time.perf_counter() - start)
    seconds = statistics.median(taken)
    return dict(
        rows=rows,
        max_seq_len=options.max_seq_len,
        seconds=seconds,
        seconds_per_row=seconds / rows,
        compilations=trainer.compiled._cache_size(),
    )


if __name__ == "__main__":
    main()
