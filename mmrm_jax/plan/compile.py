"""The real train step, compiled ahead of time for TPUs that are not at hand."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

from mmrm_jax.plan.hardware import Topology
from mmrm_jax.plan.hlo import Collective, collectives
from mmrm_jax.train.program import Program

MISSING = (
    "libtpu is not installed, so nothing is compiled and the table is an analysis: "
    'with the extra `plan` (pip install ".[plan]") the train step is compiled for TPUs on any Linux machine'
)


class DoesNotFit(RuntimeError):
    """The compiler found that the program needs more memory than a device has; the message says how much."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step: bytes on one device, at its peak and for the program itself."""

    peak: float
    code: float
    collectives: list[Collective]
    seconds: float


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of a TPU topology that need not be at hand. Needs libtpu."""
    from jax.experimental import topologies

    # Neither is there a TPU to ask for its metadata, nor does compiling keep others from using one.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    assert topology.libtpu_name is not None, f"{topology.name} is not compiled for"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.libtpu_name).devices)


def compile_step(program: Program, batch: Any) -> Compiled:
    """Compile the train step for the program's mesh.

    Raises DoesNotFit where it needs more memory than there is.
    """
    start = time.monotonic()
    try:
        compiled = program.lower_train_step(program.abstract, batch).compile()
    except Exception as error:  # what XLA raises differs between versions
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_memory_message(str(error))) from None
    memory = compiled.memory_analysis()
    return Compiled(
        peak=memory.peak_memory_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=collectives(compiled.as_text(), program.mesh.size),
        seconds=time.monotonic() - start,
    )


def _memory_message(text: str) -> str:
    """How much of what there is, from all that the compiler writes."""
    size = r"([\d.]+[KMGT]?)"
    forms = rf"Used {size} of {size} hbm", rf"\({size}\) exceeds available HBM \({size}\)"
    match = next((m for form in forms if (m := re.search(form, text))), None)
    if match is None:
        return text.splitlines()[0][:200]
    what = "temporaries alone need" if "HLO temporaries" in text else "it needs"
    return f"compiled, {what} {match[1]} of {match[2]}"
