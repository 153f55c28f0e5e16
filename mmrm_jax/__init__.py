"""mmrm_jax: multimodal reward models in JAX that look at the image.

Dimension key, used in array annotations and as name suffixes throughout the package:

    G  groups in a batch (one image + one prompt)      N  responses per group
    P  prefix tokens                                   R  response tokens
    C  comparisons in a batch                          M  micro-batches in a step
    T  image tiles per group                           V  visual tokens per tile
    H  query heads        K  key/value heads           D  model width        F  MLP width
    L  layers             E  head width
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` and `Scorer`, whose module is imported when one of them is first asked for: `models` needs far less."""
    if name in ("load", "Scorer"):
        return getattr(importlib.import_module("mmrm_jax.eval.scorer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
