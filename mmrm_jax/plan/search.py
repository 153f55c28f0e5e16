"""Which mesh and how many micro-batches: every candidate analysed, the fastest ones compiled until one fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from mmrm_jax.config import MeshConfig, ModelConfig, TrainConfig
from mmrm_jax.objectives import find_objective
from mmrm_jax.plan.compile import DoesNotFit, compile_step, topology_devices
from mmrm_jax.plan.costs import Costs, train_costs
from mmrm_jax.plan.estimate import (
    Memory,
    Saved,
    device_bytes,
    estimate_collectives,
    estimate_memory,
    saved_activations,
)
from mmrm_jax.plan.hardware import Topology
from mmrm_jax.plan.hlo import Collective
from mmrm_jax.plan.shapes import DataShape, abstract_batch
from mmrm_jax.sharding import batch_shardings, make_mesh
from mmrm_jax.train.program import Program, build_program
from mmrm_jax.types import Batch

MESH_AXES = ("data", "fsdp", "tensor")
STEPS = 1000  # of the schedule: it decides learning rates, not costs


@dataclasses.dataclass(frozen=True)
class Job:
    """What is planned: a model, its training configuration, the data's shape and the hardware."""

    model: ModelConfig
    config: TrainConfig
    shape: DataShape
    topology: Topology


@dataclasses.dataclass(frozen=True)
class Times:
    """Roofline of one step, in seconds: each resource alone at its peak."""

    compute: float
    memory: float
    links: float

    @property
    def overlapped(self) -> float:
        """The slowest resource hides the others: no step is faster."""
        return max(self.compute, self.memory, self.links)

    @property
    def step(self) -> float:
        """Communication hides behind nothing: what candidates are ranked by."""
        return max(self.compute, self.memory) + self.links

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One mesh and number of micro-batches, and what is known of it.

    `problem` says why it cannot be used, None where it can; `compiled` whether memory and collectives are the
    compiler's and not estimates. What cannot be laid out at all has neither memory nor times.
    """

    mesh: MeshConfig
    micro_batches: int
    compiled: bool = False
    problem: str | None = None
    memory: Memory | None = None
    costs: Costs | None = None
    collectives: tuple[Collective, ...] = ()
    times: Times | None = None
    mfu: float | None = None
    seconds: float | None = None


def meshes(devices: int) -> Iterator[MeshConfig]:
    """Every (data, fsdp, tensor) over the devices with up to 8-way tensor parallelism."""
    for tensor in (t for t in divisors(devices) if t <= 8):
        for fsdp in divisors(devices // tensor):
            yield MeshConfig(devices // tensor // fsdp, fsdp, tensor)


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def candidates(job: Job) -> Iterator[tuple[MeshConfig, int]]:
    """All meshes, each with every number of micro-batches that leaves a whole number of groups to each device.

    A mesh that no number suits comes once, so that the table can say why.
    """
    for mesh in meshes(job.topology.devices):
        ways = mesh.data * mesh.fsdp
        for m in divisors(job.config.batch_size // ways) if job.config.batch_size % ways == 0 else [1]:
            yield mesh, m


def search(
    job: Job, *, every: bool, attempts: int, progress: Callable[[str], None] = lambda text: None
) -> list[Candidate]:
    """Candidates, usable ones first, the fastest of them first.

    `every` searches meshes and micro-batches; otherwise those of the configuration are the only candidate. Those that
    fit by analysis are compiled, the fastest first, until one fits, at most `attempts` of them; where none fits by
    analysis, the one that needs least is. Raises ValueError for a configuration that no mesh could run.
    """
    objective = find_objective(job.config.objective)
    if objective.extra or objective.heads or objective.before:
        raise ValueError(f"mmrm plan knows one forward pass a branch, and {objective.name} needs more than that")
    if every:
        jobs = [with_layout(job, mesh, micro) for mesh, micro in candidates(job)]
    else:
        jobs = [with_layout(job, resolved_mesh(job), job.config.micro_batches)]
    whole = build_program(job.model, job.config, STEPS, abstract_mesh(MeshConfig(1, 1, 1), job.topology))
    saved = saved_activations(whole, job.model, job.config, job.shape)
    rows = sorted((analyse(j, saved) for j in jobs), key=_order)
    fitting = [i for i, row in enumerate(rows) if row.problem is None]
    needs = {row.memory.total: i for i, row in enumerate(rows) if row.memory is not None}
    smallest = [needs[min(needs)]] if needs else []
    for i in (fitting or smallest)[:attempts]:
        progress(f"compiling {describe(rows[i])} ...")
        rows[i] = compile_candidate(job, rows[i])
        if rows[i].problem is None:
            break
    return sorted(rows, key=_order)


def _order(row: Candidate) -> tuple[bool, bool, float]:
    """Usable, compiled, fast."""
    return row.problem is not None, not row.compiled, row.times.step if row.times else float("inf")


def with_layout(job: Job, mesh: MeshConfig, micro_batches: int) -> Job:
    """The same job on another mesh, in other micro-batches."""
    return dataclasses.replace(job, config=dataclasses.replace(job.config, mesh=mesh, micro_batches=micro_batches))


def describe(row: Candidate) -> str:
    """A candidate in a few words."""
    m = row.mesh
    return f"data={m.data} fsdp={m.fsdp} tensor={m.tensor}, {row.micro_batches} micro-batch(es)"


def resolved_mesh(job: Job) -> MeshConfig:
    """The configuration's mesh with `data` filled in. Raises ValueError where it does not fit the topology."""
    mesh, devices = job.config.mesh, job.topology.devices
    data = devices // (mesh.fsdp * mesh.tensor) if mesh.data == -1 else mesh.data
    if data * mesh.fsdp * mesh.tensor != devices:
        raise ValueError(f"{mesh} does not multiply to the {devices} devices of {job.topology.name}")
    return dataclasses.replace(mesh, data=data)


def abstract_mesh(mesh: MeshConfig, topology: Topology) -> Mesh:
    """A mesh of no particular devices of a topology: enough to know what each would hold."""
    sizes, name = (mesh.data, mesh.fsdp, mesh.tensor), topology.chip.name
    platform = "gpu" if topology.libtpu_name is None else "tpu"
    device = AbstractDevice(device_kind=name, num_cores=None, platform=platform)
    types = (AxisType.Auto,) * 3
    return AbstractMesh(sizes, MESH_AXES, axis_types=types, abstract_device=device)  # type: ignore[return-value]


def analyse(job: Job, saved: Saved) -> Candidate:
    """One candidate without compiling anything."""
    config, chip = job.config, job.topology.chip
    row = Candidate(config.mesh, config.micro_batches)
    ways = config.mesh.data * config.mesh.fsdp
    if config.batch_size % (config.micro_batches * ways):
        return dataclasses.replace(
            row, problem=f"{config.batch_size} groups do not split evenly {ways} ways in {config.micro_batches} parts"
        )
    try:
        program = build_program(job.model, config, STEPS, abstract_mesh(config.mesh, job.topology))
    except ValueError as error:  # a dimension that the mesh does not divide
        return dataclasses.replace(row, problem=str(error))
    batch = placed_batch(job, program)
    memory = estimate_memory(program, batch, job.model, config, job.shape, saved, job.topology.flash)
    row = _timed(job, program, row, memory, estimate_collectives(program, job.model, config, job.shape))
    if memory.total > chip.room:
        needs = f"needs {memory.total / 1e9:.1f} of {chip.room / 1e9:.0f} GB, {memory.temporaries / 1e9:.1f} temporary"
        return dataclasses.replace(row, problem=f"by analysis, it {needs}")
    return row


def compile_candidate(job: Job, row: Candidate) -> Candidate:
    """The same candidate as the TPU compiler sees it."""
    job = with_layout(job, row.mesh, row.micro_batches)
    mesh = make_mesh(row.mesh, topology_devices(job.topology))
    program = build_program(job.model, job.config, STEPS, mesh)
    batch = placed_batch(job, program)
    try:
        compiled = compile_step(program, batch)
    except DoesNotFit as error:
        return dataclasses.replace(row, compiled=True, problem=str(error))
    state = program.abstract
    held = [device_bytes(part) for part in (state.params, state.opt_state, state.frozen, batch)]
    own = Memory(*held, temporaries=compiled.peak - compiled.code - sum(held), code=compiled.code)
    row = dataclasses.replace(row, compiled=True, problem=None, seconds=compiled.seconds)
    return _timed(job, program, row, own, compiled.collectives)


def placed_batch(job: Job, program: Program) -> Batch:
    """The abstract batch with its shardings, for ahead-of-time compilation."""
    size, parts = job.config.batch_size, job.config.micro_batches
    batch = abstract_batch(
        job.shape, job.model, program.views, groups=size, micro_batches=parts, features=job.config.features_dtype
    )
    shardings = batch_shardings(batch, program.mesh, micro=True, shared=program.shared)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), batch, shardings)


def _timed(job: Job, program: Program, row: Candidate, memory: Memory, collectives: Sequence[Collective]) -> Candidate:
    """With costs, roofline and projected MFU."""
    chip, mesh = job.topology.chip, job.config.mesh
    costs = train_costs(
        job.model,
        job.config,
        job.shape,
        program.views,
        program.abstract.params,
        batch_ways=mesh.data * mesh.fsdp,
        tensor_ways=mesh.tensor,
        state_bytes=memory.parameters + memory.optimizer,
        flash=job.topology.flash,
    )
    moved = sum(c.moved for c in collectives)
    peak = chip.peak_in(job.config.compute_dtype)
    times = Times(costs.device_flops / peak, costs.device_bytes / chip.hbm_bandwidth, moved / chip.link_bandwidth)
    mfu = costs.model_flops / (times.step * peak * job.topology.devices)
    return dataclasses.replace(row, memory=memory, costs=costs, collectives=tuple(collectives), times=times, mfu=mfu)
