"""What a compiled program does, from the text of its optimized HLO: FLOPs, bytes sent, kernels.

XLA's own cost analysis counts the body of a loop once; here each instruction counts as often as its loops turn.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_DTYPE_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_OPERATION = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# What slices exchange, over the data-centre network, libtpu writes as pairs of send and recv with a type.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "ragged-all-to-all", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Instruction:
    """name = shape operation(operands), attributes."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    attributes: str
    arguments: str
    root: bool


@dataclass
class Program:
    """What one device does.

    Attributes:
        flops: of matrix products and of kernels that state theirs.
        ragged_flops: of `ragged_dot`, for all rows of its operands.
        sent: bytes, by kind of collective.
        dcn: of these, the bytes that leave the slice.
        kernels: how often each TPU kernel runs.
        unknown_loops: loops that turn an unknown number of times; their bodies are counted once.
        uncounted: kernels that state no FLOPs, and how often they run.
    """

    flops: int = 0
    ragged_flops: int = 0
    sent: Counter[str] = field(default_factory=Counter)
    dcn: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    unknown_loops: int = 0
    uncounted: Counter[str] = field(default_factory=Counter)


def read_program(text: str) -> Program:
    """Walks the program from its entry."""
    return _Reader(text).read()


class _Reader:
    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        self.program = Program()

    def read(self) -> Program:
        self._visit(self.entry, 1)
        return self.program

    def _visit(self, name: str, times: int) -> None:
        computation = self.computations[name]
        for instruction in computation.values():
            operation = instruction.operation
            if operation in ("dot", "convolution"):
                self.program.flops += times * self._product_flops(instruction, computation)
            elif operation == "ragged-dot":
                self.program.ragged_flops += times * self._product_flops(instruction, computation)
            elif operation == "custom-call":
                self._custom_call(instruction, times)
            elif kind := _collective(operation):
                if name.startswith(
                    "all-reduce-scatter"
                ):  # a fusion of the TPU's: an all-reduce of which a part is kept
                    kind = "reduce-scatter"
                self.program.sent[kind] += times * _sent_bytes(kind, instruction, computation)
            elif operation == "send" and (found := _BETWEEN_SLICES.search(instruction.attributes)):
                kind = _kind_between_slices(found.group(1))
                total, dcn = _sent_between_slices(kind, instruction, computation)
                self.program.sent[kind] += times * total
                self.program.dcn[kind] += times * dcn
            turns = self._turns(instruction, computation) if operation == "while" else 1
            for called in _called(instruction):
                if not (_collective(operation) or operation in ("reduce", "sort", "scatter", "map", "reduce-window")):
                    self._visit(called, times * turns)

    def _custom_call(self, instruction: Instruction, times: int) -> None:
        found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        if found is None or found.group(1) != "tpu_custom_call":
            return
        name = re.sub(r"[.\d]+$", "", instruction.name)
        self.program.kernels[name] += times
        stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
        flops = int(stated.group(1)) if stated is not None else 0
        if name.startswith("ragged-dot"):
            self.program.ragged_flops += times * flops
        elif flops:
            self.program.flops += times * flops
        else:
            self.program.uncounted[name] += times

    def _product_flops(self, instruction: Instruction, computation: dict[str, Instruction]) -> int:
        """2 x elements of the result x length of each sum."""
        left, right = (_dims(computation[name].shape) for name in instruction.operands[:2])
        out = math.prod(_dims(instruction.shape))
        if instruction.operation == "convolution":
            return 2 * out * _convolution_length(instruction, right)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        dims = [int(dim) for dim in contracted.group(1).split(",") if dim] if contracted else []
        return 2 * out * math.prod(left[dim] for dim in dims)

    def _turns(self, loop: Instruction, computation: dict[str, Instruction]) -> int:
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if stated is not None:
            return int(stated.group(1))
        turns = self._counted_turns(loop, computation)
        if turns is None:
            self.program.unknown_loops += 1
            return 1
        return turns

    def _counted_turns(self, loop: Instruction, computation: dict[str, Instruction]) -> int | None:
        """Of `for (i = start; i < limit; i += step)`, the form that scans and the compiler's own loops have."""
        called = dict(_CALLED.findall(loop.attributes))
        condition, body = self.computations[called["condition"]], self.computations[called["body"]]
        test = _root(condition)
        direction = re.search(r"direction=(\w+)", test.attributes)
        if test.operation != "compare" or direction is None or direction.group(1) not in ("LT", "NE"):
            return None
        counter, limit = (condition[name] for name in test.operands)
        index, stop = _tuple_index(counter, condition), _constant(limit, condition)
        if index is None or stop is None:
            return None
        initial = computation[loop.operands[0]]
        if initial.operation != "tuple" or (root := _root(body)).operation != "tuple":
            return None
        start = self._value(computation[initial.operands[index]], computation, None)
        step = self._value(body[root.operands[index]], body, index)
        if start is None or not step:
            return None
        return -(-(stop - start) // step)

    def _value(
        self, instruction: Instruction, computation: dict[str, Instruction], counter: int | None, depth: int = 0
    ) -> int | None:
        """An integer made of constants and of the loop's counter, taken as 0: for the next counter that is the step."""
        operation = instruction.operation
        if depth > 20:
            return None
        if operation == "constant":
            return _constant(instruction, computation)
        if operation == "get-tuple-element":
            return 0 if counter is not None and _tuple_index(instruction, computation) == counter else None
        operands = [computation[name] for name in instruction.operands if name in computation]
        if operation in ("copy", "bitcast", "convert", "reshape") and operands:
            return self._value(operands[0], computation, counter, depth + 1)
        values = [self._value(operand, computation, counter, depth + 1) for operand in operands]
        if operation == "add" and len(values) == 2 and None not in values:
            return sum(value for value in values if value is not None)
        if operation == "fusion":
            return self._fused_value(instruction, values, depth)
        return None

    def _fused_value(self, fusion: Instruction, values: list[int | None], depth: int) -> int | None:
        inner = self.computations[dict(_CALLED.findall(fusion.attributes))["calls"]]

        def value(instruction: Instruction) -> int | None:
            if instruction.operation == "parameter":
                return values[int(instruction.arguments)]
            if instruction.operation == "constant":
                return _constant(instruction, inner)
            parts = [value(inner[name]) for name in instruction.operands]
            if instruction.operation == "add" and None not in parts:
                return sum(part for part in parts if part is not None)
            return parts[0] if instruction.operation in ("copy", "bitcast", "convert", "reshape") else None

        return value(_root(inner))


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Computations by name, each its instructions by name, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if found := _COMPUTATION.match(line):
                current = computations.setdefault(found.group(1), {})
                entry = found.group(1) if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found.group(1), found.group(2), line.lstrip().startswith("ROOT "))
            current[instruction.name] = instruction
    return computations, entry


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    # The shape of a tuple is in parentheses of its own, with layouts that hold more of them.
    start = _closing(rest, 0) if rest.startswith("(") else 0
    found = _OPERATION.search(rest, start)
    if found is None:
        return Instruction(name, rest, "", (), "", "", root)
    end = _closing(rest, found.end() - 1)
    arguments = rest[found.end() : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, rest[: found.start()], found.group(1), operands, rest[end:], arguments, root)


def _closing(text: str, start: int) -> int:
    """Just past the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _called(instruction: Instruction) -> Iterator[str]:
    for _, name in _CALLED.findall(instruction.attributes):
        yield name
    if branches := _BRANCHES.search(instruction.attributes):
        yield from re.findall(r"%?([\w.\-]+)", branches.group(1))


def _collective(operation: str) -> str | None:
    """Its kind; None for other operations and for the `-done` of a collective that was counted at its start."""
    base = operation.removesuffix("-start")
    return base if base in _KINDS else None


def _constant(instruction: Instruction, computation: dict[str, Instruction]) -> int | None:
    while instruction.operation in ("copy", "bitcast") and instruction.operands[0] in computation:
        instruction = computation[instruction.operands[0]]
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def _tuple_index(instruction: Instruction, computation: dict[str, Instruction]) -> int | None:
    """Of the loop's state, which element this is."""
    while instruction.operation in ("copy", "bitcast") and instruction.operands[0] in computation:
        instruction = computation[instruction.operands[0]]
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found.group(1)) if instruction.operation == "get-tuple-element" and found else None


def _dims(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    return [int(dim) for dim in found.group(2).split(",") if dim] if found else []


def _bytes(shape: str) -> int:
    """Of all arrays of a shape."""
    return sum(
        _DTYPE_BYTES[dtype] * math.prod(int(dim) for dim in dims.split(",") if dim)
        for dtype, dims in _ARRAY.findall(shape)
        if dtype in _DTYPE_BYTES
    )


def _convolution_length(instruction: Instruction, kernel: list[int]) -> int:
    """Of each sum: the kernel's input features times its window, where the window does not just slide over zeros.

    A batched product may be written as a convolution with a padded or dilated window over the batch, of which one place is
    real for each element of the result.
    """
    labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.attributes)
    features = kernel[labels.group(1).index("i")] if labels else math.prod(kernel)
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    terms = dict(part.split("=", 1) for part in window.group(1).split() if "=" in part) if window else {}
    sizes = [int(size) for size in terms.get("size", "1").split("x")]
    slides = [_slides(terms, place) for place in range(len(sizes))]
    return features * math.prod(size for size, slide in zip(sizes, slides, strict=True) if not slide)


def _slides(terms: dict[str, str], place: int) -> bool:
    padding = terms["pad"].split("x")[place] if "pad" in terms else "0_0"
    dilated = "lhs_dilate" in terms and terms["lhs_dilate"].split("x")[place] != "1"
    return dilated or any(int(side) for side in padding.split("_"))


def _sent_bytes(kind: str, instruction: Instruction, computation: dict[str, Instruction]) -> int:
    """By one device, over rings: all-gather (n-1)/n of the result, reduce-scatter as much of its operand, all-reduce twice
    that, all-to-all (n-1)/n, permute all. Of a ragged all-to-all, the rows that there are, of which an even router keeps 1/n."""
    operands = sum(_bytes(computation[name].shape) for name in instruction.operands if name in computation)
    n = _group_size(instruction.attributes)
    if kind == "all-gather":
        return operands * (n - 1)
    if kind == "collective-permute":
        return _bytes(computation[instruction.operands[0]].shape)
    if kind == "ragged-all-to-all":
        # Rows go into a larger buffer and come out of one: real are those of the smaller side.
        operands = min(_bytes(computation[name].shape) for name in instruction.operands[:2])
    return (2 if kind == "all-reduce" else 1) * operands * (n - 1) // n


def _kind_between_slices(transfer: str) -> str:
    return "collective-permute" if transfer == "ONE_TO_ONE" else transfer.lower().replace("_", "-")


def _sent_between_slices(kind: str, send: Instruction, computation: dict[str, Instruction]) -> tuple[int, int]:
    """By one device: in all, and to other slices, whose members are spread evenly over the group."""
    operand = _bytes(computation[send.operands[0]].shape)
    if kind == "collective-permute":
        return operand, operand
    members, slices = _group_between_slices(send.attributes)
    if kind == "all-gather":
        return operand * (members - 1), operand * (members - members // slices)
    times = 2 if kind == "all-reduce" else 1
    return times * operand * (members - 1) // members, times * operand * (slices - 1) // slices


def _group_between_slices(attributes: str) -> tuple[int, int]:
    """Members and slices of `"{1,2}x{0:3}"`, where each device has its like in these slices, and of `{{100000,200000},…}`,
    where device 3 of slice 2 is 200003."""
    found = re.search(r'_xla_megascale_target=(?:"\{([\d,]+)\}x|\{\{([\d,]+)\})', attributes)
    if found is None:
        raise ValueError(f"a transfer between slices names no target: {attributes[:200]}")
    if found.group(1):
        members = len(found.group(1).split(","))
        return members, members
    devices = [int(device) for device in found.group(2).split(",")]
    return len(devices), len({device // 100_000 for device in devices})


def _group_size(attributes: str) -> int:
    """Of `{{0,1},{2,3}}`, `[4,2]<=[8]` and `mesh['a'=4,'b'=2] {'b'}`."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(found.group(2))
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return found.group(1).count(",") + 1
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found.group(1)))
        names = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", found.group(2))
        return math.prod(int(part) if part else int(sizes[name]) for name, _, part in names)
    return 1
