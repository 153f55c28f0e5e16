"""The accelerators that are planned for: what one device can do, and what a topology's name stands for."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as its maker describes it.

    Attributes:
        name: As in topology names.
        peak: Dense bfloat16 FLOP/s.
        hbm: Bytes of device memory.
        hbm_bandwidth: Bytes/s between it and the cores.
        link_bandwidth: Bytes/s that a device receives in a ring collective: of a TPU both neighbours on one axis of
            the torus, of a GPU one direction of NVLink. Collectives over several axes of a torus can be faster.
        float32: How fast float32 products are by default, as a share of `peak`: 1 on TPUs, which round to bfloat16, and
            1/2 on GPUs, which round to TF32.
        usable: Share of the memory that a program gets: of a GPU what XLA_PYTHON_CLIENT_MEM_FRACTION tells JAX to
            take, which is 0.75 unless it is set; of a TPU all, and its compiler knows better.
    """

    name: str
    peak: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    float32: float = 1.0
    usable: float = 1.0

    def peak_in(self, dtype: str) -> float:
        """Dense FLOP/s of products of this dtype, "float32" or "bfloat16"."""
        return self.peak * (self.float32 if dtype == "float32" else 1.0)

    @property
    def room(self) -> float:
        """Bytes that a program gets."""
        return self.hbm * self.usable


GPU_SHARE = 0.92  # as launch/slurm.sbatch sets it

# TPUs: "System architecture" on cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e for peak, memory and its bandwidth;
# the bandwidth of a link, 45 GB/s (v5e) and 90 GB/s (v5p, v6e) in each direction, from "How to Think About TPUs",
# jax-ml.github.io/scaling-book/tpus. GPUs: the data sheets of H100 SXM and H200 SXM at nvidia.com, whose 1979 TFLOP/s
# in bfloat16 are with sparsity, and whose 900 GB/s of NVLink are both directions together.
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 16e9, 819e9, 90e9),
        Chip("v5p", 459e12, 95e9, 2765e9, 180e9),
        Chip("v6e", 918e12, 32e9, 1640e9, 180e9),
        Chip("h100", 989.5e12, 80e9, 3350e9, 450e9, 0.5, GPU_SHARE),
        Chip("h200", 989.5e12, 141e9, 4800e9, 450e9, 0.5, GPU_SHARE),
    )
}


# What JAX calls the devices of each kind (`device_kind`), beginning with the longer names.
KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e", "H100": "h100", "H200": "h200"}


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls by this name, if it is known."""
    return next((CHIPS[name] for kind, name in KINDS.items() if kind.lower() in device_kind.lower()), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that are wired together.

    `libtpu_name` is what the TPU compiler calls it, None for GPUs, which are planned by analysis alone.
    """

    name: str
    chip: Chip
    devices: int
    libtpu_name: str | None

    @property
    def flash(self) -> bool:
        """Whether all attention runs in kernels that keep no scores, as `models.attention` has it on TPUs."""
        return self.libtpu_name is not None


def parse_topology(name: str) -> Topology:
    """A TPU slice as Google Cloud names it, "v5p-64", "v5e-256", "v6e-64", or one host of GPUs, "8xh100".

    The number of a v5p slice counts TensorCores, two a chip and device (v5p-64 is 32 of them); that of the others
    counts chips. Raises ValueError for anything else.
    """
    known = "known: v5e-N and v6e-N (4 to 256 chips), v5p-N (8 or more TensorCores), 1xh100 to 8xh100, 1xh200 to 8xh200"
    if match := re.fullmatch(r"([1-8])x(h100|h200)", name.lower()):
        return Topology(name, CHIPS[match[2]], int(match[1]), None)
    match = re.fullmatch(r"(v5e|v5p|v6e)-(\d+)", name.lower())
    if not match:
        raise ValueError(f"topology {name!r} is not known; {known}")
    kind, devices = match[1], int(match[2]) // (2 if match[1] == "v5p" else 1)
    largest = 4096 if kind == "v5p" else 256
    if devices < 4 or devices > largest or devices & (devices - 1):
        raise ValueError(f"topology {name!r} is no slice of a power of two of {kind} chips; {known}")
    shape = _balanced(devices, 3 if kind == "v5p" else 2)
    return Topology(name, CHIPS[kind], devices, f"{kind}:{'x'.join(map(str, shape))}")


def _balanced(devices: int, axes: int) -> list[int]:
    """A power of two as the product of `axes` powers of two, none more than twice another; the largest first."""
    exponent = int(math.log2(devices))
    return [2 ** (exponent // axes + (i < exponent % axes)) for i in range(axes)]
