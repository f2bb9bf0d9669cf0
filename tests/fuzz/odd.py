"""Valid inputs made odd: values of JSON and bytes of files, changed in a few places."""

import copy
import json
import random

from hypothesis import strategies as st

# What files really hold by mistake, and what was seen to break readers: wrong types, numbers that no machine word holds
# or that are none, text that is no Unicode, what spells a control token, and nesting as deep as a reader may follow.
_ODD = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 2**31, 2**63, -(2**63), 10**30, 10**400, 1e-320, 1e39, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "\n", "\ud800", "a\udfffb", "\x00", "\u2028", "\ufeff", "nan",
    "1", "1e5", "None", "null", "[RESET]", "<|im_end|>", "<|im_start|>system\n", "\n\nHuman: Hi\n\nAssistant:", "user",
    "assistant", "safe", "..", "../x", "/", "~", "x" * 300, [], {}, [[]], [None], [{}], [""], ["a", 1], {"": ""},
    {"role": "user"}, {"role": "user", "content": "Hi"}, [{"role": "user", "content": "Hi"}],
    [{"role": "assistant", "content": "Hi"}],
)  # fmt: skip

_texts = st.one_of(st.text(), st.sampled_from([text for text in _ODD if isinstance(text, str)]))

odd_values = st.one_of(
    st.sampled_from(_ODD),
    st.sampled_from(_ODD),
    st.text(max_size=8),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([20, 200, 900, 960, 980, 990]).map(lambda depth: Nested(depth)),
)


class Nested:
    """A list in a list in a list, so deep; `dumps` writes it, which json could not."""

    def __init__(self, depth: int):
        self.depth = depth

    def __repr__(self):
        return f"Nested({self.depth})"

    def __deepcopy__(self, _memo):
        return self


def dumps(value) -> str:
    """JSON, with what is Nested as deep as it says."""
    if isinstance(value, Nested):
        return "[" * value.depth + "]" * value.depth
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumps(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumps, value)) + "]"
    return json.dumps(value)


# Where and what is changed comes of a seed: drawn by hypothesis, most places would be the first one.
_seeds = st.integers(0, 2**64 - 1).map(random.Random)


@st.composite
def changed(draw, values, most: int = 2):
    """One of the values of JSON, with up to `most` changes: something lost, renamed, doubled, swapped or odd."""
    value, chosen = copy.deepcopy(draw(values)), draw(_seeds)
    for _ in range(chosen.randint(0, most)):
        places = list(_places(value))
        if not places:
            break
        holder, key = chosen.choice(places)
        # Half of the changes leave a text a text: so that what lies behind the first check is reached.
        match chosen.choice(["text"] * 6 + ["odd", "odd", "odd", "lose", "rename", "double", "swap"]):
            case "text" if isinstance(holder[key], str):
                at = chosen.randint(0, len(holder[key]))
                holder[key] = holder[key][:at] + draw(_texts) + holder[key][at:]
            case "odd" | "text":
                holder[key] = copy.deepcopy(draw(odd_values))
            case "lose":
                del holder[key]
            case "rename" if isinstance(holder, dict):
                holder[chosen.choice([key[:-1], key + "s", key.upper(), key.replace("_", "-")])] = holder.pop(key)
            case "double" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case _:
                other, other_key = chosen.choice(places)
                # Of copies, or a value would come to hold itself.
                holder[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(holder[key])
    return value


def _places(value):
    """Holder and key of everything inside a value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(children):
        yield value, key
        yield from _places(child)


_NUMBERS = (0, 1, 2, 8, 9, 127, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
_PUT_IN = (b"\xff\xfe", b"\n", b"\x00", b'"', b"[", b"}", b"\xed\xa0\x80", b"\\ud800", b"1e999", b"NaN")
# Kinds of changes of a binary file, and of one of text, most of which leave it one.
BINARY = ("number",) * 6 + ("letters", "cut", "lose", "double", "put in", "flip")
TEXT = ("letters",) * 12 + ("number", "cut", "lose", "double", "put in", "flip")


@st.composite
def mangled(draw, data, most: int = 3, kinds=BINARY):
    """Bytes with up to `most` changes: cut, lost, doubled, put in, or overwritten by letters or by numbers."""
    data, chosen = bytearray(draw(data)), draw(_seeds)
    for _ in range(chosen.randint(0, most)):
        at, length = chosen.randint(0, len(data)), chosen.choice([1, 1, 2, 4, 8, 40])
        match chosen.choice(kinds):
            case "number":
                size = min(length, 8)
                data[at : at + size] = (chosen.choice(_NUMBERS) % 256**size).to_bytes(size, "little")
            case "letters":
                data[at : at + length] = bytes(chosen.choices(b"abc XYZ", k=min(length, len(data) - at)))
            case "cut":
                del data[at:]
            case "lose":
                del data[at : at + length]
            case "double":
                data[at:at] = data[at : at + length]
            case "put in":
                data[at:at] = chosen.choice(_PUT_IN)
            case "flip" if at < len(data):
                data[at] ^= 1 << chosen.randint(0, 7)
    return bytes(data)
