"""Every benchmark of a device, one after the other, as a GPU is to be measured: lines, tables, and all of it as JSON.

    python -m benchmarks.gpu --data=../shared/data/hh-rlhf/harmless-base.jsonl.gz

In bfloat16: DPO and SFT beside TRL with 8 units an update, a step by its rows, sampling beside transformers. torch
takes the GPU where it finds one. JAX's share of it, and so torch's room beside it, is what each takes up when it needs
it. The last line is a JSON object: command -> what that benchmark gave in its own last line.

On a CPU it runs as well, for a day; `--rounds=1 --examples=16 --prompts=4 --batches=1` shows there that it works.
"""

import argparse
import json
import subprocess
import sys

from benchmarks.worker import platforms, say


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preferences, as data.path of a recipe")
    parser.add_argument("--rounds", type=int, default=5, help="of every benchmark; figures are medians")
    parser.add_argument("--examples", type=int, default=256, help="of the data that are trained on")
    parser.add_argument("--reference-pairs", type=int, default=32, help="of the timed reference pass of DPO")
    parser.add_argument("--rows", default="1,2,4,8", help="of a step, by commas")
    parser.add_argument("--batches", default="1,16,64", help="of what is written, by commas")
    parser.add_argument("--prompts", type=int, default=256, help="that are replied to")
    options = parser.parse_args()
    data, rounds = f"--data={options.data}", options.rounds
    beside_trl = [data, f"--rows={options.examples}", f"--bfloat16-rounds={rounds}", "--only=bfloat16,8x1"]
    commands = [
        ["benchmarks.dpo", *beside_trl, f"--reference-pairs={options.reference_pairs}"],
        ["benchmarks.sft", *beside_trl],
        ["benchmarks.rows", data, f"--rows={options.rows}", f"--updates={rounds}", "--dtype=bfloat16"],
        [
            "benchmarks.sampling", data, f"--rounds={rounds}", f"--batches={options.batches}",
            f"--prompts={options.prompts}", "--dtypes=bfloat16",
        ],
    ]  # fmt: skip
    say(f"JAX computes on {platforms()}")
    results, failed = {}, []
    for command in commands:
        say(" ".join(command))
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
        last = ""
        for last in process.stdout:
            print(last, end="", flush=True)
        if process.wait():
            failed.append(command[0])
        else:
            results[" ".join(command)] = json.loads(last)
    print(json.dumps(results))
    if failed:
        raise SystemExit(f"{', '.join(failed)} failed, see above")


if __name__ == "__main__":
    main()
