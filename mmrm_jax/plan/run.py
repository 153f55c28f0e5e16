"""`mmrm plan`: arguments, search, table."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from mmrm_jax.config import ModelConfig, TrainConfig, to_json
from mmrm_jax.models.sizes import INTERNVL2
from mmrm_jax.plan.compile import MISSING, has_libtpu
from mmrm_jax.plan.hardware import parse_topology
from mmrm_jax.plan.hlo import by_kind
from mmrm_jax.plan.search import Candidate, Job, search
from mmrm_jax.plan.shapes import DataShape
from mmrm_jax.plan.table import print_plan
from mmrm_jax.train.setup import read_model

# The paper's recipe: the proxy sees a white tile, and computes in bfloat16.
RECIPE = TrainConfig(proxy_input="blank", compute_dtype="bfloat16")


@dataclasses.dataclass(frozen=True)
class PlanArgs:
    """Say what training would need on hardware that is not at hand: memory, FLOPs, collectives, time, projected MFU.

    The real train step is compiled for a TPU slice on this machine, without a TPU (needs the extra `plan`); GPUs are
    planned by analysis. Meshes and micro-batches are searched for the fastest that fits. The first argument may be a
    Python file that defines `config`, a TrainConfig; options override its fields.

    Attributes:
        topology: v5p-64, v5e-256, v6e-64 (as Google Cloud names slices) or 8xh100, 8xh200 (one host).
        config: Training settings; the defaults are the paper's, in bfloat16.
        model: InternVL2-1B, -2B, -4B, -8B, -26B, or a checkpoint folder, of which config.json is read alone.
        shape: Sizes that every group is padded to.
        search: Try every mesh and number of micro-batches; without it, those of the configuration are taken.
        attempts: How many candidates are compiled at most until one fits; 0 analyses alone.
        json: Also write every candidate to this file.
    """

    topology: str
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = RECIPE
    model: str = "InternVL2-8B"
    shape: DataShape = dataclasses.field(default_factory=DataShape)
    search: bool = True
    attempts: int = 4
    json: Path | None = None


def run_plan(args: PlanArgs, console: Console) -> dict[str, Any]:
    """Search, print the table, return everything as JSON values.

    Raises ValueError for a model or topology that is not known, and for a configuration that cannot be run.
    """
    jax.config.update("jax_platforms", "cpu")  # to compile for a device is not to use one
    topology = parse_topology(args.topology)
    job = Job(find_model(args.model), args.config, args.shape, topology)
    attempts = args.attempts if topology.libtpu_name else 0
    if attempts and not has_libtpu():
        console.print(MISSING, highlight=False)
        attempts = 0
    rows = search(job, every=args.search, attempts=attempts, progress=console.print)
    print_plan(args.model, job, rows, console)
    return {
        "model": args.model,
        "topology": dataclasses.asdict(topology),
        "config": to_json(args.config),
        "shape": dataclasses.asdict(args.shape),
        "candidates": [as_json(row) for row in rows],
    }


def find_model(name: str) -> ModelConfig:
    """A published size by name, with or without "InternVL2-", or the configuration of a checkpoint folder."""
    size = name.removeprefix("InternVL2-")
    if size in INTERNVL2:
        return INTERNVL2[size]
    if Path(name).is_dir():
        return read_model(Path(name))
    known = ", ".join(f"InternVL2-{size}" for size in INTERNVL2)
    raise ValueError(f"model {name!r} is neither a checkpoint folder nor one of {known}")


def as_json(row: Candidate) -> dict[str, Any]:
    """All fields, with totals that follow from them."""
    values: dict[str, Any] = dataclasses.asdict(row) | {"collectives_by_kind": by_kind(row.collectives)}
    if row.memory and row.costs and row.times:
        values["memory"]["total"] = row.memory.total
        values["costs"]["intensity"] = row.costs.intensity
        values["times"] |= {"step": row.times.step, "overlapped": row.times.overlapped, "bound": row.times.bound}
    return values
