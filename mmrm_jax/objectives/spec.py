"""The name of an objective in a configuration -> the objective: NAME, NAME:OPTION=VALUE,..., and +MODIFIER:... ."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from mmrm_jax.objectives.base import Objective


def parse_objective(
    spec: str, objectives: Mapping[str, Callable[..., Objective]], modifiers: Mapping[str, Callable[..., Objective]]
) -> Objective:
    """The objective that `spec` names, and is the name of.

    "focal:gamma=1" gives an option another value than its default; "standard+margin:m=0.5+centring" applies modifiers
    from left to right. Raises ValueError, saying what there is, for an unknown name or option and a value that does not
    fit.
    """
    first, *rest = spec.split("+")
    name, options = _options(first, "objective", objectives)
    objective = objectives[name](**options)
    for part in rest:
        name, options = _options(part, "modifier", modifiers)
        objective = modifiers[name](objective, **options)
    return dataclasses.replace(objective, name=spec)


def _options(part: str, kind: str, known: Mapping[str, Callable[..., Objective]]) -> tuple[str, dict[str, Any]]:
    name, colon, given = part.partition(":")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"do you mean {close[0]}? " if close else ""
        raise ValueError(f"{kind} {name!r} is not known; {hint}known: {', '.join(sorted(known))}")
    allowed = {o: p.default for o, p in inspect.signature(known[name]).parameters.items() if p.kind is p.KEYWORD_ONLY}
    options = {}
    for each in given.split(",") if colon else ():
        option, _, text = each.partition("=")
        if option not in allowed:
            has = ", ".join(f"{o}={v}" for o, v in allowed.items()) or "none"
            raise ValueError(f"{kind} {name} has no option {option!r}; its options and their defaults: {has}")
        options[option] = _value(f"{name}:{option}", text, allowed[option])
    return name, options


def _value(option: str, text: str, default: Any) -> Any:
    """A value of the default's kind: true or false, a whole number, a number, or a word."""
    if isinstance(default, str):
        return text
    wanted = {bool: "true or false", int: "a whole number", float: "a finite number"}[type(default)]
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        value = type(default)(text)
        if math.isfinite(value):
            return value
    except (KeyError, ValueError):
        pass
    raise ValueError(f"{option} is {text!r}; it must be {wanted}, as its default {default}")
