"""The points of a grid: a configuration, with some fields at other values."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import itertools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmrm_jax.config import AblateConfig


@dataclasses.dataclass(frozen=True)
class Point:
    """One point: its `name` in tables, "label_noise=0.2, steps=100", or "" where there is no grid."""

    name: str
    config: AblateConfig

    @property
    def folder(self) -> str:
        """What its folder is called."""
        return "".join(c if c.isalnum() or c in "=.-_" else "-" for c in self.name) or "all"


def points(config: AblateConfig) -> list[Point]:
    """Every combination of the grid's values, in order; those of the last axis change first.

    Raises ValueError for an axis that is no FIELD=VALUE,..., a field that there is not, and a value that does not fit.
    """
    axes = [_axis(config, text) for text in config.grid]
    found = []
    for values in itertools.product(*(values for _, values in axes)):
        changed = config
        for (field, _), value in zip(axes, values, strict=True):
            changed = with_field(changed, field, value)
        parts = [f"{field.rpartition('.')[2]}={_shown(v)}" for (field, _), v in zip(axes, values, strict=True)]
        found.append(Point(", ".join(parts), changed))
    names = [point.folder for point in found]
    if len(set(names)) < len(names):
        raise ValueError(f"two points of the grid have one name: {', '.join(names)}")
    return found


def _axis(config: AblateConfig, text: str) -> tuple[str, list[Any]]:
    field, equals, values = text.partition("=")
    if not (equals and values):
        raise ValueError(f"grid {text!r} must be FIELD=VALUE,VALUE,..., as in matrix.train.proxy_input=absent,blank")
    if field in ("grid", "resamples", "matrix.out", "matrix.seeds", "matrix.objectives", "matrix.jobs"):
        raise ValueError(f"grid {text!r}: {field} is of the whole ablation, and no axis of its grid")
    return field, [_value(config, field, value) for value in values.split(",")]


def with_field(config: Any, path: str, value: Any) -> Any:
    """A configuration with the field at a dotted path replaced."""
    name, dot, rest = path.partition(".")
    return dataclasses.replace(config, **{name: with_field(getattr(config, name), rest, value) if dot else value})


def _value(config: Any, path: str, text: str, above: str = "") -> Any:
    """`text` as a value of the field at `path`, which has to be there; `above` is the path of `config` itself."""
    name, dot, rest = path.partition(".")
    names = [f.name for f in dataclasses.fields(config)]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1) or names
        hint = _elsewhere(config, path, above)
        raise ValueError(f"grid: {type(config).__name__} has no field {name!r}; it has {', '.join(close)}{hint}")
    if dot or dataclasses.is_dataclass(getattr(config, name)):
        if not dot or not dataclasses.is_dataclass(getattr(config, name)):
            raise ValueError(f"grid: {name} {'holds no fields' if dot else 'is no single value: name a field of it'}")
        return _value(getattr(config, name), rest, text, f"{above}{name}.")
    return _read(typing.get_type_hints(type(config))[name], text, name)


def _elsewhere(config: Any, name: str, above: str) -> str:
    """Where below there is a field of that name, as a hint."""

    def paths(config: Any, before: str) -> Iterator[str]:
        for field in dataclasses.fields(config):
            value, path = getattr(config, field.name), before + field.name
            if field.name == name:
                yield path
            if dataclasses.is_dataclass(value):
                yield from paths(value, path + ".")

    found = list(paths(config, above))
    return f"; do you mean {' or '.join(found)}?" if found else ""


def _read(kind: Any, text: str, name: str) -> Any:
    """A value of type `kind`; the items of a tuple are joined by plus signs, and () is none of them."""
    kinds = set(typing.get_args(kind)) or {kind}
    if type(None) in kinds:
        if text == "None":
            return None
        others = [other for other in typing.get_args(kind) if other is not type(None)]
        if len(others) == 1:
            return _read(others[0], text, name)
    if typing.get_origin(kind) is tuple:
        return tuple(_read(typing.get_args(kind)[0], item, name) for item in text.split("+")) if text != "()" else ()
    if Path in kinds:
        return Path(text)
    if str in kinds or typing.get_origin(kind) is typing.Literal:
        if typing.get_origin(kind) is typing.Literal and text not in typing.get_args(kind):
            raise ValueError(f"grid: {name} is {text!r}; it must be one of {', '.join(typing.get_args(kind))}")
        return text
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = None
    wanted = next((k for k in (bool, int, float) if k in kinds), None)
    if wanted is float and type(value) is int:
        value = float(value)
    if wanted is None or type(value) is not wanted:
        called = "neither true nor false" if wanted is bool else f"no {getattr(wanted, '__name__', str(kind))}"
        raise ValueError(f"grid: {name} is {text!r}, which is {called}")
    return value


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_shown, value)) or "()"
    return value.name if isinstance(value, Path) else str(value)
