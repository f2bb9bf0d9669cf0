"""Reads a compiled program's text: what it computes and moves, with every loop counted as often as it runs.

XLA's own cost analysis counts the body of a loop once, and knows nothing of what collectives move.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable

from jax_backtrack.errors import InputError

# What goes from slice to slice leaves the program: the runtime carries it, over the data centre's network.
BETWEEN_SLICES = "between slices"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f8": 8, "s4": 4, "u4": 4}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """Returns the computation that an attribute such as `body=` names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match and match[1]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run of a computation costs a device.

    flops:       multiplications and additions of matrix products
    collectives: channel -> (kind, bytes that leave the device); parts of one asynchronous collective share a channel
    """

    flops: float = 0
    collectives: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.collectives | other.collectives)

    def times(self, count: int) -> "Cost":
        """Returns the cost of `count` runs."""
        moved = {channel: (kind, count * size) for channel, (kind, size) in self.collectives.items()}
        return Cost(count * self.flops, moved)

    def bytes_by_kind(self) -> dict[str, float]:
        """Bytes that leave the device, per kind of collective."""
        total = dict.fromkeys((*COLLECTIVES, BETWEEN_SLICES), 0.0)
        for kind, size in self.collectives.values():
            total[kind] += size
        return total


class HloProgram:
    """A compiled program, from `compiled.as_text()`."""

    def __init__(self, text: str):
        self._computations: dict[str, list[Instruction]] = {}
        self._costs: dict[str, Cost] = {}
        entry = current = None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self._computations.setdefault(header[1], [])
                entry = header[1] if line.startswith("ENTRY") else entry
            elif current is not None and (match := _INSTRUCTION.match(line)):
                current.append(_parse(match[2], match[3], bool(match[1])))
        if entry is None:
            raise InputError("the program's text has no ENTRY computation")
        self._entry = entry

    def cost(self) -> Cost:
        """Returns what a run costs one device. A condition's costliest branch counts; a loop that may end early counts
        as often as it can run."""
        return self._cost(self._entry)

    def arrays(self) -> Iterable[tuple[str, tuple[int, ...]]]:
        """Yields the dtype and shape of every array that an instruction makes, those inside fusions too."""
        for instructions in self._computations.values():
            for instruction in instructions:
                yield from _arrays(instruction.type)

    def kernels(self) -> dict[str, int]:
        """Returns, by the name of every Pallas kernel, the bytes of VMEM that it needs."""
        return {
            call.name: sum(int(part["size"]) for part in _config(call, "used_scoped_memory_configs") or [])
            for call in self.instructions("custom-call")
            if '"tpu_custom_call"' in call.attributes
        }

    def instructions(self, opcode: str) -> Iterable[Instruction]:
        """Returns all instructions of one kind."""
        return (
            instruction
            for lines in self._computations.values()
            for instruction in lines
            if instruction.opcode == opcode
        )

    @staticmethod
    def shapes(instruction: Instruction) -> list[tuple[str, tuple[int, ...]]]:
        """Returns the dtype and shape of what one instruction makes; of several arrays if it is a tuple."""
        return _arrays(instruction.type)

    def _cost(self, name: str) -> Cost:
        if name not in self._costs:
            types = {instruction.name: instruction.type for instruction in self._computations[name]}
            total = Cost()
            for instruction in self._computations[name]:
                total += self._cost_of(instruction, types)
            self._costs[name] = total
        return self._costs[name]

    def _cost_of(self, instruction: Instruction, types: dict[str, str]) -> Cost:
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode == "while":
            return self._cost(instruction.called("body")).times(self._trips(instruction))
        if instruction.opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            branches = _NAME.findall(listed[1]) if listed else [
                instruction.called("true_computation"), instruction.called("false_computation")
            ]  # fmt: skip
            return max((self._cost(branch) for branch in branches), key=lambda cost: cost.flops)
        if instruction.opcode in ("fusion", "async-start") and (called := instruction.called("calls")):
            return self._cost(called)
        if instruction.opcode == "call" and (called := instruction.called("to_apply")):
            return self._cost(called)
        if instruction.opcode in ("convolution", "dot"):
            shapes = [_arrays(types[operand])[0][1] for operand in instruction.operands]
            count = _convolution_flops if instruction.opcode == "convolution" else _dot_flops
            return Cost(count(instruction, *shapes, _arrays(instruction.type)[0][1]))
        if instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.attributes:
            estimate = (_config(instruction, "custom_call_config") or {}).get("cost_estimate", {})
            return Cost(float(estimate.get("flops", 0)))
        if instruction.opcode == "send" and "megascale" in instruction.attributes:
            return Cost(
                collectives={instruction.name: (BETWEEN_SLICES, _bytes(*_arrays(types[instruction.operands[0]])[0]))}
            )
        if kind in COLLECTIVES:
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            size = sum(_bytes(*_arrays(types[operand])[0]) for operand in instruction.operands if operand in types)
            return Cost(
                collectives={
                    channel[1] if channel else instruction.name: (kind, _sent(kind, size, instruction.attributes))
                }
            )
        return Cost()

    def _trips(self, loop: Instruction) -> int:
        """Returns how often a loop runs at most: the bound that its counter is compared with, over its step."""
        bounds = list(self._integers(loop.called("condition"), "constant"))
        if not bounds:
            raise InputError(f"loop {loop.name} of the compiled program has no bound that can be read")
        counter = next(self._integers(loop.called("condition"), "get-tuple-element"), None)
        return math.ceil(max(bounds) / self._step(loop.called("body"), counter))

    def _step(self, body: str, counter: int | None) -> int:
        """Returns what a loop's body adds to its counter, entry `counter` of what it carries. XLA unrolls some by 2."""
        by_name = {instruction.name: instruction for instruction in self._computations[body]}
        carried = next(
            (instruction for instruction in by_name.values() if instruction.opcode == "tuple" and instruction.is_root),
            None,
        )
        if counter is None or carried is None:
            return 1
        update = by_name.get(carried.operands[counter])
        if update is None or update.opcode != "add":
            return 1
        steps = [int(by_name[name].operands[0]) for name in update.operands if by_name[name].opcode == "constant"]
        return steps[0] if steps else 1

    def _integers(self, name: str, opcode: str) -> Iterable[int]:
        """Returns a condition's integer constants, or the indices of the integers that it takes from the carry."""
        for instruction in self._computations[name]:
            if instruction.opcode == "fusion":
                yield from self._integers(instruction.called("calls"), opcode)
            elif instruction.opcode == opcode and re.match(r"[su]32\[\]", instruction.type):
                yield int(
                    instruction.operands[0]
                    if opcode == "constant"
                    else re.search(r"index=(\d+)", instruction.attributes)[1]
                )


def _parse(name: str, rest: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opened = rest.index("(", end)
    closed = _closing(rest, opened)
    inside = rest[opened + 1 : closed]
    operands = tuple(_NAME.findall(inside)) or (inside,)
    return Instruction(name, rest[:end], rest[end:opened].strip(), operands, rest[closed + 1 :], is_root)


def _closing(text: str, opened: int) -> int:
    depth = 0
    for place in range(opened, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise InputError(f"unbalanced parentheses in a line of the compiled program: {text[:80]}")


def _arrays(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(type_text)
    ]


def _bytes(dtype: str, shape: tuple[int, ...]) -> float:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 0)
    return math.prod(shape) * bits / 8


def _config(instruction: Instruction, key: str):
    """Returns a part of the instruction's backend configuration."""
    start = instruction.attributes.find("backend_config=")
    if start < 0:
        return None
    return json.JSONDecoder().raw_decode(instruction.attributes, start + len("backend_config="))[0].get(key)


def _sent(kind: str, operand_bytes: float, attributes: str) -> float:
    """Bytes that one device sends, by the least that the collective needs on a ring of its group."""
    if kind == "collective-permute":
        return operand_bytes
    size = _group_size(attributes)
    return (
        operand_bytes
        * {
            "all-gather": size - 1,
            "all-reduce": 2 * (size - 1) / size,
            "reduce-scatter": (size - 1) / size,
            "all-to-all": (size - 1) / size,
        }[kind]
    )


def _group_size(attributes: str) -> int:
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    raise InputError(f"a collective of the compiled program has groups that cannot be read: {attributes[:120]}")


def _dot_flops(instruction: Instruction, left: tuple[int, ...], _right, out: tuple[int, ...]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    return 2 * math.prod(out) * math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis)


def _convolution_flops(
    instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """Counts a matrix product, which a TPU program writes as a convolution; padding does not count."""
    left_labels, right_labels, out_labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    groups = int((re.search(r"batch_group_count=(\d+)", instruction.attributes) or [0, "1"])[1])
    settings = dict(
        re.findall(r"(\w+)=([\d_x\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or [0, ""])[1])
    )

    def of_axis(name: str, axis: int, parse: Callable, default):
        return parse(settings[name].split("x")[axis]) if name in settings else default

    valid = 1
    for axis in range(sum(label.isdecimal() for label in out_labels)):
        window = right[right_labels.index(str(axis))]
        size = left[left_labels.index(str(axis))]
        stride = of_axis("stride", axis, int, 1)
        low = of_axis("pad", axis, lambda pair: int(pair.split("_")[0]), 0)
        holes, dilation = of_axis("lhs_dilate", axis, int, 1), of_axis("rhs_dilate", axis, int, 1)
        valid *= sum(
            0 <= (at := place * stride + tap * dilation - low) <= (size - 1) * holes and at % holes == 0
            for place in range(out[out_labels.index(str(axis))])
            for tap in range(window)
        )
    features = right[right_labels.index("i")] * right[right_labels.index("o")]
    return 2 * valid * features * left[left_labels.index("b")] / groups
