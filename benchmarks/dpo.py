"""DPO beside TRL, on SmolLM2-135M: preference pairs per second with the same token ids, cuts and settings.

    python -m benchmarks.dpo --data=../shared/data/hh-rlhf/harmless-base.jsonl.gz
    python -m benchmarks.dpo --data=FILE --only=backtracking,2x4,precomputed
    python -m benchmarks.dpo --data=FILE --bfloat16-rounds=1 --only=bfloat16,2x1

"backtracking": every example is a backtrack pair and a guard pair; TRL computes four sequences of them, we one tree.
"plain": one pair, two sequences. Without drafts a tree still shares the prompt.

TRL runs with 8 pairs an update, as 8 at once and as 4 times 2 (which pads less), each with and without a precomputed
reference; the ways that were slower are left out unless `--only` is given (`--only=float32` runs all, for twice as
long). Before anything is timed, losses, margins and gradient norms of both sides are compared, and the run ends
where they differ. How the figures are made: see `benchmarks.alternate`. Needs requirements-dev.txt.

bfloat16 is left out unless it is asked for: on a CPU without bfloat16 instructions torch is ten times slower in it, so
for such a CPU there is a single micro-batch of 2 pairs ("2x1"); for a GPU there is one of 8 ("8x1").
"""

from benchmarks import alternate
from benchmarks.alternate import Setting

FORMS = ("backtracking", "plain")


def settings() -> list[Setting]:
    usual = {("backtracking", 2, True), ("backtracking", 8, True), ("backtracking", 2, False), ("plain", 2, True)}
    float32 = [
        Setting(form, size, times, precompute=precompute, on_request=(form, size, precompute) not in usual)
        for form in FORMS
        for precompute in (True, False)
        for size, times in ((2, 4), (8, 1))
    ]
    return float32 + [
        Setting(form, size, 1, precompute=True, dtype="bfloat16", on_request=size == 8)
        for form in FORMS
        for size in (2, 8)
    ]


def main():
    parser = alternate.arguments(__doc__)
    parser.add_argument("--reference-pairs", type=int, default=32, help="pairs of the timed reference pass")
    options = parser.parse_args()
    alternate.run(options, "dpo", "pairs", settings(), options.reference_pairs)


if __name__ == "__main__":
    main()
