"""Collectives of a compiled program: kinds, how often they run, and bytes, read from its optimised HLO."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:called|branch)_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: result type and the rest of its text, from the operation on."""

    name: str
    operation: str
    result: str
    text: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, per device.

    `payload` is the bytes of its result (all-gather: gathered; reduce-scatter: one part); `group` how many devices take
    part; `times` how often a step runs it. An asynchronous one counts once.
    """

    kind: str
    payload: float
    group: int
    times: float

    @property
    def moved(self) -> float:
        """Bytes that a device receives in all runs, with ring algorithms: an all-reduce goes round twice."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1.0, "collective-permute": 1.0}
        return self.payload * factor.get(self.kind, share) * self.times


def collectives(text: str, devices: int) -> list[Collective]:
    """All collectives of a module over `devices` devices that are reached from its entry.

    Raises ValueError where a loop around one has a trip count that the text does not tell.
    """
    entry, computations = parse(text)
    runs: dict[tuple[str, str], tuple[Instruction, float]] = {}
    fused: set[str] = set()
    waiting = [(entry, 1.0)]
    while waiting:
        name, times = waiting.pop()
        for instruction in computations[name]:
            if _kind(instruction) is not None:
                before = runs.get((name, instruction.name), (instruction, 0.0))[1]
                runs[name, instruction.name] = instruction, before + times
                continue
            inside = list(_called(instruction))
            if any(_has_collectives(c, computations) for c in inside):
                often = trip_count(instruction, computations) if instruction.operation == "while" else 1
                waiting += [(c, times * often) for c in inside]
                fused.update(inside if instruction.operation == "fusion" else ())
    # A TPU splits an asynchronous collective over several fusions, each of which repeats it with its channel. Some may
    # lie inside a loop that it overlaps with: it runs as often as the one that runs least.
    found: dict[tuple[str, ...], Collective] = {}
    for (name, own), (instruction, times) in runs.items():
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        key = (channel[1],) if channel and name in fused else (name, own)
        kind, payload = _kind(instruction), _payload(instruction)
        if scattered := _scattered(instruction, computations[name]) if name in fused else None:
            kind, payload = "reduce-scatter", _payload(scattered)
        assert kind is not None
        one = Collective(kind, payload, _group(instruction.text, devices), times)
        if key not in found or times < found[key].times:
            found[key] = one
    return list(found.values())


def parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry computation's name, and the instructions of every computation."""
    entry, computations, current = "", {}, None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_instruction(match))
    return entry, computations


def _instruction(match: re.Match) -> Instruction:
    rest = match[3]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ") if " " in rest else len(rest)
    result, text = rest[:end], rest[end:].lstrip()
    return Instruction(match[2], text.partition("(")[0], result, text, bool(match[1]))


def _closing(text: str) -> int:
    """Where a leading parenthesis ends."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _kind(instruction: Instruction) -> str | None:
    operation = instruction.operation.removesuffix("-start")
    return operation if operation in KINDS else None


def _scattered(instruction: Instruction, fusion: list[Instruction]) -> Instruction | None:
    """What a fusion returns if it is slices of an all-reduce: how a TPU writes a reduce-scatter."""
    operations = {i.name: i.operation for i in fusion}
    root = next((i for i in fusion if i.root), None)
    if instruction.operation != "all-reduce" or root is None:
        return None
    parts = _operands(root.text) if root.operation == "tuple" else [root.name]
    return root if all(operations.get(part) == "dynamic-slice" for part in parts) else None


def _called(instruction: Instruction) -> Iterator[str]:
    for one, several in _CALLED.findall(instruction.text):
        yield from [one] if one else (name.strip().lstrip("%") for name in several.split(","))


def _has_collectives(name: str, computations: dict[str, list[Instruction]]) -> bool:
    body = computations.get(name, [])
    return any(_kind(i) is not None or any(_has_collectives(c, computations) for c in _called(i)) for i in body)


def _payload(instruction: Instruction) -> float:
    """Bytes of the result. A -start of an all-gather or a permute returns its operand, too, and flags."""
    result = instruction.result
    if instruction.operation in ("all-gather-start", "collective-permute-start"):
        parts = _split(result)
        result = parts[1] if len(parts) > 1 else result
    return sum(_size(dtype, dims) for dtype, dims in _ARRAY.findall(result))


def _size(dtype: str, dims: str) -> float:
    if dtype not in BYTES and not dtype.startswith("f8"):
        return 0.0  # a token
    return BYTES.get(dtype, 1) * math.prod(int(d) for d in dims.split(",") if d)


def _split(result: str) -> list[str]:
    """The elements of a tuple type."""
    if not result.startswith("("):
        return [result]
    parts, depth, start = [], 0, 1
    for i, c in enumerate(result):
        depth += (c in "([{") - (c in ")]}")
        if (c == "," and depth == 1) or (c == ")" and depth == 0):
            parts.append(result[start:i].strip())
            start = i + 1
    return parts


def _group(text: str, devices: int) -> int:
    """Devices that take part: from a list of groups, `[groups,size]<=...`, or mesh axes; all where none are named.

    Mesh axes are "mesh['a'=4,'b'=8], device_ids=(...) {'a','b':(2)4}"; the last is a part, of size 4, of axis b.
    Raises ValueError for another form.
    """
    match = re.search(r"replica_groups=(\S.*)", text)
    if match is None or match[1].startswith("{}"):
        return devices
    groups = match[1]
    if found := re.match(r"\[\d+,(\d+)\]<=", groups):
        return int(found[1])
    if found := re.match(r"\{\{([\d,]+)\}", groups):
        return len(found[1].split(","))
    if found := re.match(r"mesh\[([^\]]*)\][^{]*\{([^}]*)\}", groups):
        sizes = {axis: int(size) for axis, size in re.findall(r"'?(\w+)'?=(\d+)", found[1])}
        axes = re.findall(r"'?(\w+)'?(?::\(\d+\)(\d+))?(?:,|$)", found[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    raise ValueError(f"the groups of a collective cannot be read from the compiled program: {groups[:80]}")


def trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """How often a while loop runs: what XLA notes about it, or the constant that its counter, from 0 on, is below.

    Raises ValueError where neither is there.
    """
    if match := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.text):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    body = computations.get(condition[1], []) if condition else []
    constants = {i.name: int(m[1]) for i in body if (m := re.match(r"constant\((\d+)\)", i.text))}
    root = next((i for i in body if i.root), None)
    if root is not None:
        bounds = [constants[name] for name in _operands(root.text) if name in constants]
        if len(bounds) == 1:
            return bounds[0]
    raise ValueError(f"the trip count of loop {loop.name} cannot be read from the compiled program")


def _operands(text: str) -> list[str]:
    arguments = text[text.index("(") : text.index("(") + _closing(text[text.index("(") :])]
    return re.findall(r"%?([\w.\-]+)(?=[,)])", arguments)


def by_kind(found: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """Kind -> how many run in a step, and the bytes that a device receives in them."""
    totals: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0.0, "bytes": 0.0})
    for c in found:
        totals[c.kind]["count"] += c.times
        totals[c.kind]["bytes"] += c.moved
    return dict(totals)
