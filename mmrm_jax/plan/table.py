"""A plan on the console: candidates, why others do not fit, and what the best one is made of."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mmrm_jax.plan.hlo import by_kind
from mmrm_jax.plan.search import Candidate, Job

SHOWN = 8  # candidates of either kind; all of them are in the JSON


def print_plan(model: str, job: Job, rows: Sequence[Candidate], console: Console) -> None:
    """Print usable candidates, a sample of the others with their reasons, and the first in detail."""
    chip, config = job.topology.chip, job.config
    how = "" if job.topology.libtpu_name else ", by analysis only"
    if chip.usable < 1:
        how = f", of which XLA_PYTHON_CLIENT_MEM_FRACTION={chip.usable:g} gives JAX {chip.room / 1e9:.0f}{how}"
    console.print(
        f"{model}, {config.objective}, {config.batch_size} groups of {job.shape.responses} responses "
        f"on {job.topology.name}: {job.topology.devices} x {chip.name}, {chip.hbm / 1e9:.0f} GB each{how}",
        highlight=False,
    )
    usable = [row for row in rows if row.problem is None]
    rest = [row for row in rows if row.problem is not None]
    if usable:
        console.print(_candidates(usable[:SHOWN]))
        console.print(_details(usable[0], job))
    else:
        console.print("nothing fits: use more devices, remat, LoRA, a smaller batch, or shorter responses")
    if rest:
        # The compiler's verdicts first, then what needed least.
        rest = sorted(rest, key=lambda row: (not row.compiled, row.memory.total if row.memory else float("inf")))
        console.print(_problems(rest[:SHOWN]))
    hidden = len(usable[SHOWN:]) + len(rest[SHOWN:])
    if hidden:
        console.print(f"{hidden} more candidates; --json FILE writes all of them")


def _candidates(rows: Sequence[Candidate]) -> Table:
    table = Table(title="what fits, fastest first; time and MFU from no overlap to full overlap of communication")
    for name in ("data x fsdp x tensor", "micro-batches", "known by", "GB", "step, s", "MFU, %", "bound by"):
        table.add_column(name, justify="left" if name in ("known by", "bound by") else "right")
    for row in rows:
        assert row.memory and row.times and row.mfu is not None
        best = row.mfu * row.times.step / row.times.overlapped
        table.add_row(
            _mesh(row),
            str(row.micro_batches),
            _method(row),
            f"{row.memory.total / 1e9:.1f}",
            f"{row.times.step:.2f} - {row.times.overlapped:.2f}",
            f"{100 * row.mfu:.0f} - {100 * best:.0f}",
            row.times.bound,
        )
    return table


def _problems(rows: Sequence[Candidate]) -> Table:
    table = Table(title="what does not fit, and why")
    table.add_column("data x fsdp x tensor", justify="right")
    table.add_column("micro-batches", justify="right")
    table.add_column("known by")
    table.add_column("why")
    for row in rows:
        table.add_row(_mesh(row), str(row.micro_batches), _method(row), row.problem or "")
    return table


def _details(row: Candidate, job: Job) -> Table:
    assert row.memory and row.costs and row.times
    m, c, t, chip = row.memory, row.costs, row.times, job.topology.chip
    table = Table(title=f"{_mesh(row)}, {row.micro_batches} micro-batches, per device ({_method(row)})")
    table.add_column("")
    table.add_column("", justify="right")
    memory = {
        "parameters": m.parameters,
        "optimiser": m.optimizer,
        "frozen parameters": m.frozen,
        "batch": m.batch,
        "activations and other temporaries": m.temporaries,
        "generated code": m.code,
    }
    for name, size in memory.items():
        table.add_row(name, f"{size / 1e9:.2f} GB")
    table.add_row("memory, all", f"{m.total / 1e9:.2f} of {chip.room / 1e9:.0f} GB", end_section=True)
    table.add_row("model FLOPs, all devices", f"{c.model_flops / 1e12:.0f} TFLOP")
    table.add_row("FLOPs", f"{c.device_flops / 1e12:.1f} TFLOP")
    table.add_row("memory traffic", f"{c.device_bytes / 1e9:.0f} GB")
    table.add_row("arithmetic intensity", f"{c.intensity:.0f} FLOP/byte", end_section=True)
    for kind, total in sorted(by_kind(row.collectives).items()):
        table.add_row(f"{kind}, {total['count']:.0f} a step", f"{total['bytes'] / 1e9:.2f} GB")
    table.add_section()
    table.add_row("compute at peak", f"{t.compute:.2f} s")
    table.add_row("memory at peak", f"{t.memory:.2f} s")
    table.add_row("links at peak", f"{t.links:.2f} s")
    return table


def _mesh(row: Candidate) -> str:
    return f"{row.mesh.data} x {row.mesh.fsdp} x {row.mesh.tensor}"


def _method(row: Candidate) -> str:
    if not row.compiled:
        return "analysis"
    return "compiler" if row.seconds is None else f"compiler ({row.seconds:.0f} s)"
