"""SFT beside TRL, on SmolLM2-135M: learned replies per second with the same token ids, cuts and settings.

    python -m benchmarks.sft --data=../shared/data/hh-rlhf/harmless-base.jsonl.gz
    python -m benchmarks.sft --data=FILE --only=backtracking,packed
    python -m benchmarks.sft --data=FILE --bfloat16-rounds=1 --only=bfloat16,2x1

"backtracking": every example has two replies to learn, the chosen one after the prompt and, with [RESET] before it,
after a draft of the rejected one. "plain": the chosen one after the prompt. Loss falls on the replies alone.

TRL runs with 8 replies an update, as 8 at once and as 4 times 2, and packed (strategy "bfd" into rows of 512 tokens),
as two such rows at once and as two times one. TRL lays the packed rows of a micro-batch into one, without padding. On
the CPU attention then has a dense mask over that row: sequences do not see each other, which the check before the
timing confirms by their loss, but products between them are computed all the same. How the figures are made: see
`benchmarks.alternate`. Needs requirements-dev.txt.
"""

from benchmarks import alternate
from benchmarks.alternate import Setting

FORMS = ("backtracking", "plain")


def settings() -> list[Setting]:
    ways = ((2, 4, False), (8, 1, False), (1, 2, True), (2, 1, True))
    float32 = [
        Setting(form, per_device, times, packing=packing) for form in FORMS for per_device, times, packing in ways
    ]
    return float32 + [
        Setting(form, size, 1, dtype="bfloat16", on_request=size == 8) for form in FORMS for size in (2, 8)
    ]


def main():
    alternate.run(alternate.arguments(__doc__).parse_args(), "sft", "replies", settings())


if __name__ == "__main__":
    main()
