"""What an error advises."""

import pytest

from jax_backtrack.errors import nearest

FAMILIES = ["gemma2", "llama"]
DTYPES = ["bfloat16", "float32"]
SETS = ["AdvBench", "MT-Bench", "StrongREJECT", "XSTest"]
MODES = ["keep", "rewind", "resample"]


@pytest.mark.parametrize(
    "wrong,right,meant",
    [
        ("lama", FAMILIES, "llama"),
        ("gema2", FAMILIES, "gemma2"),
        ("Gemma-2", FAMILIES, "gemma2"),
        ("float23", DTYPES, "float32"),
        ("bflaot16", DTYPES, "bfloat16"),
        ("BFLOAT16", DTYPES, "bfloat16"),
        ("advbench", SETS, "AdvBench"),
        ("strongreject", SETS, "StrongREJECT"),
        ("rewnd", MODES, "rewind"),
        ("KEEP", MODES, "keep"),
    ],
)
def test_a_misspelling_is_answered_with_the_spelling(wrong, right, meant):
    assert nearest(wrong, right) == f"did you mean {meant!r}?"


@pytest.mark.parametrize(
    "wrong,right",
    [
        *((name, FAMILIES) for name in "gemma gemma3 gemma3_text llama4 qwen2 mistral phi3".split()),
        *((name, DTYPES) for name in "float16 float64 int8 float8 half bfloat".split()),
        *((name, SETS) for name in ("HarmBench", "JailbreakBench", "BeaverTails", "")),
    ],
)
def test_another_thing_is_no_misspelling(wrong, right):
    assert nearest(wrong, right) == f"known are: {', '.join(sorted(right))}"
