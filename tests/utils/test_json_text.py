"""JSON that every reader takes, and what comes back of it."""

import dataclasses
import json
import math

import pytest

from jax_backtrack.utils.json_text import from_json, to_json


@dataclasses.dataclass(frozen=True)
class Inner:
    number: float
    texts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: dict[str, Inner]
    count: int | None
    flag: bool


def strict(text: str):
    """Reads JSON as it is defined: without NaN and infinities."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_written_comes_back():
    outer = Outer({"a": Inner(1.5, ("x", "\u2028")), "b": Inner(2.0)}, None, True)
    assert from_json(Outer, strict(to_json(outer))) == outer
    assert from_json(Outer, strict(to_json(vars(outer) | {"more": 3}))) == outer
    assert "\u2028" not in to_json(outer, ensure_ascii=True)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null_and_comes_back_as_nan(number):
    text = to_json({"inner": [Inner(number), {"x": (number,)}]})
    assert strict(text) == {"inner": [{"number": None, "texts": []}, {"x": [None]}]}
    assert math.isnan(from_json(Inner, strict(text)["inner"][0]).number)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"inner": {}, "count": True, "flag": True}, "True is no whole number"),
        ({"inner": {}, "count": 1, "flag": 0}, "0 is no true or false"),
        ({"inner": [], "count": 1, "flag": True}, r"\[\] is no object"),
        ({"inner": {"a": {"number": 1, "texts": "ab"}}, "count": 1, "flag": True}, "'ab' is no list"),
        ({"inner": {}, "flag": True}, "count"),
    ],
)
def test_what_is_of_another_type_is_named(value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        from_json(Outer, value)
