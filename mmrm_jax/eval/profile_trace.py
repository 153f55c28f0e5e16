"""A trace of steps -> seconds by part of the model and kind of operation."""

from __future__ import annotations

import collections
import dataclasses
import re
from pathlib import Path
from typing import Any

import jax

# Parts of a step, which `jax.named_scope` names in `models` and `train.step`.
PARTS = ("vision", "projector", "embedding", "decoder", "score", "objective", "optimizer")
CONTAINERS = ("while", "call", "conditional", "async")  # whose time is that of what they hold
PRODUCT = re.compile(r"dot_general|conv_general|ragged_dot")

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (?:.*metadata=\{[^}]*op_name=\"([^\"]*)\")?", re.M)


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds in operations of one part and kind, summed over steps, threads and devices."""

    part: str
    kind: str
    seconds: float


def scopes(hlo: str) -> dict[str, str]:
    """Name of every instruction of a compiled module -> where it comes from (its op_name), or "" if it has none."""
    return dict(_INSTRUCTION.findall(hlo))


def part_of(scope: str) -> tuple[str, str]:
    """(part of the step, kind of operation) of an op_name such as "jit(step)/transpose(jvp(decoder))/dot_general"."""
    names = re.findall(r"\w+", scope)
    part = next((part for part in PARTS if part in names), "other")
    if part in ("objective", "optimizer", "other"):
        return part, "all"
    products = "matrix products" if PRODUCT.search(scope) else "the rest"
    kind = "attention" if "attention" in names else products
    return part, f"{kind}, {'backward' if 'transpose(' in scope else 'forward'}"


def read_trace(file: Path, op_scopes: dict[str, str]) -> list[Time]:
    """Seconds by part and kind in an .xplane.pb, the most first.

    Operations of other programs are left out: those of other batch shapes and of evaluation, which share names with
    this one's but have some that it has not.
    """
    programs: dict[Any, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    programs[stats.get("program_id")][str(stats["hlo_op"])] += event.duration_ns
    seconds: dict[tuple[str, str], float] = collections.defaultdict(float)
    for operations in programs.values():
        if operations.keys() <= op_scopes.keys():
            for name, duration in operations.items():
                if name.split(".")[0] not in CONTAINERS:
                    seconds[part_of(op_scopes[name])] += duration / 1e9
    return [Time(*key, value) for key, value in sorted(seconds.items(), key=lambda item: -item[1])]
