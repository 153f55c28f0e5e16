"""What training spends its time on: a trace of some steps, and a summary of it in plain words."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from mmrm_jax.config import ModelConfig, TrainConfig
from mmrm_jax.distributed import is_main
from mmrm_jax.eval.profile_trace import read_trace, scopes
from mmrm_jax.plan.costs import train_costs
from mmrm_jax.plan.hardware import find_chip
from mmrm_jax.plan.shapes import DataShape
from mmrm_jax.train.compiling import compilations_heard
from mmrm_jax.train.program import Program
from mmrm_jax.train.state import TrainState
from mmrm_jax.types import Batch

TRACED = 5  # steps

Shapes = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: seconds spent waiting for its batch, running it and, within that, compiling.

    `tokens` are those of all branches that hold data, out of `padded`; `flops` is what the mathematics needs for them.
    """

    shapes: Shapes
    waited: float
    ran: float
    compiled: float
    compilations: int
    tokens: int
    padded: int
    flops: float
    traced: bool


class Recorder:
    """Takes the place of a run's program and stream, and keeps what every step took.

    Each step is waited for, so that its time and that of its batch can be told apart; the input pipeline reads ahead
    all the while. Of the first `TRACED` steps of shapes that are compiled already a trace is written to `folder`.
    """

    def __init__(self, program: Program, model: ModelConfig, config: TrainConfig, folder: Path):
        self.steps: list[Step] = []
        self.folder = folder
        self.op_scopes: dict[str, str] = {}
        self._inner, self._model, self._config = program, model, config
        self._waited, self._tokens, self._own, self._left, self._tracing = 0.0, (0, 0), 1, TRACED, False

    @property
    def dtype(self) -> str:
        """That of activations and matrix products."""
        return self._config.compute_dtype

    @property
    def devices(self) -> int:
        """How many the mesh has."""
        return self._inner.mesh.size

    @property
    def program(self) -> Program:
        """The program whose steps are recorded."""
        return dataclasses.replace(self._inner, train_step=self._step)

    def stream(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, and how long each was waited for."""
        iterator = iter(batches)
        try:
            while True:
                start = time.perf_counter()
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                self._waited, self._tokens = time.perf_counter() - start, count_tokens(batch)
                self._own = batch.responses.tokens.size
                yield batch
        finally:
            if hasattr(iterator, "close"):
                iterator.close()  # type: ignore[attr-defined]

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        known = any(step.shapes == shapes for step in self.steps)
        if known and self._left == TRACED:
            self.op_scopes = scopes(self._inner.lower_train_step(state, batch).compile().as_text())
            jax.profiler.start_trace(str(self.folder))
            self._tracing = True
        tokens, padded = (self._all(n, batch) for n in self._tokens)
        flops = batch_flops(batch, self._inner, self._model, self._config) * tokens / padded
        compiled: list[float] = []
        with compilations_heard(compiled.append):
            start = time.perf_counter()
            result = jax.block_until_ready(self._inner.train_step(state, batch))
            ran = time.perf_counter() - start
        step = Step(shapes, self._waited, ran, sum(compiled), len(compiled), tokens, padded, flops, self._tracing)
        self.steps.append(step)
        if self._tracing:
            self._left -= 1
            if not self._left:
                self.close()
        return result

    def _all(self, own: int, batch: Batch) -> int:
        """Tokens of the whole batch by those of this process's share of it, as if the others had as many."""
        return own * batch.responses.tokens.size // self._own

    def close(self) -> None:
        """End a trace that is being written."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def count_tokens(batch: Batch) -> tuple[int, int]:
    """(tokens of all branches that hold data, tokens of all branches) in a batch [M, G, ...]."""
    last, positions = np.asarray(batch.responses.last), np.asarray(batch.responses.positions)
    rows = positions.reshape(*last.shape[:-1], -1)
    ends = np.take_along_axis(rows, np.maximum(last, 0), axis=-1)
    responses = int(np.sum((ends + 1) * (last >= 0)))
    held = sum(int(np.sum(np.asarray(p.lengths))) + responses for p in batch.prefixes.values())
    padded = sum(p.tokens.size + positions.size for p in batch.prefixes.values())
    return held, padded


def batch_flops(batch: Batch, program: Program, model: ModelConfig, config: TrainConfig) -> float:
    """FLOPs that the mathematics of a step of this shape needs, padding included: those of `plan.costs`."""
    views = program.views
    seen = [p.pixels if p.features is None else p.features for b, p in batch.prefixes.items() if views[b] != "blank"]
    tiles = max((images.shape[2] for images in seen if images is not None), default=1)
    visual = {b: DataShape(tiles=tiles).tiles_of(views[b]) * model.visual_tokens_per_tile for b in batch.prefixes}
    widths = [p.tokens.shape[-1] - visual[b] for b, p in batch.prefixes.items()]
    rows, length = batch.responses.tokens.shape[-2:]
    shape = DataShape(tiles=tiles, prompt=max(1, *widths), response=length, responses=rows)
    params = program.abstract.params
    return train_costs(model, config, shape, views, params, batch_ways=1, tensor_ways=1, state_bytes=0.0).model_flops


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The program and the stream to train with, and what was recorded of them, if anything."""

    program: Program
    stream: Iterable[Batch]
    recorder: Recorder | None = None

    def report(self, console: Console) -> dict[str, Any] | None:
        """Print the summary, write it beside the trace, and return it; None where nothing was recorded."""
        if self.recorder is None or not self.recorder.steps:
            return None
        found = summarise(self.recorder)
        (self.recorder.folder / "profile.json").write_text(json.dumps(found, indent=2) + "\n")
        console.print(describe(found), soft_wrap=True, highlight=False)
        return found


@contextmanager
def profiled(
    program: Program, stream: Iterable[Batch], model: ModelConfig, config: TrainConfig, folder: Path | None
) -> Iterator[Recorded]:
    """Training inside the block, through what this gives, is recorded where there is a `folder`; by one process."""
    if folder is None or not is_main():
        yield Recorded(program, stream)
        return
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(program, model, config, folder)
    try:
        yield Recorded(recorder.program, recorder.stream(stream), recorder)
    finally:
        recorder.close()


def summarise(recorder: Recorder) -> dict[str, Any]:
    """The profile as JSON values. Times are those of steps that compiled nothing and were not traced, if there are."""
    ready = [s for s in recorder.steps if not s.compilations]
    steps = [s for s in ready if not s.traced] or ready or recorder.steps
    ran, waited = sum(s.ran for s in steps), sum(s.waited for s in steps)
    peak, peak_is = peak_flops(recorder.dtype)
    traced = any(s.traced for s in recorder.steps)
    times = read_trace(max(recorder.folder.rglob("*.xplane.pb")), recorder.op_scopes) if traced else []
    return {
        "steps": len(recorder.steps),
        "timed_steps": len(steps),
        "timed_compilation": not ready,
        "step_seconds": ran / len(steps),
        "waiting_share": waited / (ran + waited),
        "padding": 1 - sum(s.tokens for s in recorder.steps) / sum(s.padded for s in recorder.steps),
        "tokens_per_second": sum(s.tokens for s in steps) / (ran + waited),
        "shapes": len({s.shapes for s in recorder.steps}),
        "compile_seconds": sum(s.compiled for s in recorder.steps),
        "recompilations": _compiled_again(recorder.steps),
        "mfu": sum(s.flops for s in steps) / ran / (peak * recorder.devices),
        "peak": peak,
        "peak_is": peak_is,
        "trace": str(recorder.folder) if traced else None,
        "time": [dataclasses.asdict(t) for t in times],
    }


def _compiled_again(steps: Sequence[Step]) -> int:
    """Steps that were compiled although their shapes had been."""
    return sum(1 for i, s in enumerate(steps) if s.compilations and any(s.shapes == e.shapes for e in steps[:i]))


def peak_flops(dtype: str) -> tuple[float, str]:
    """FLOP/s that one device can do, and where that is from: its data sheet, or else a matrix product timed here."""
    chip = find_chip(jax.devices()[0].device_kind)
    if chip is not None and dtype == "bfloat16":
        return chip.peak, f"the data sheet of {chip.name}"
    side = 2048
    x = jax.numpy.ones((side, side), dtype)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds), f"a {side} x {side} matrix product in {dtype}, timed here"


def describe(found: dict[str, Any]) -> str:
    """The summary in plain words."""
    timed = "that compiled nothing" if not found["timed_compilation"] else "all with compilation in them: run more"
    lines = [
        f"A step takes {1000 * found['step_seconds']:.0f} ms ({found['timed_steps']} steps {timed}), "
        f"{found['tokens_per_second']:,.0f} tokens of data a second.",
        f"Model FLOPs utilisation is {found['mfu']:.1%} of {found['peak'] / 1e12:.2f} TFLOP/s a device "
        f"({found['peak_is']}); padding counts as waste.",
        f"{found['padding']:.0%} of tokens are padding"
        + ("; more data.buckets, or data.join, would waste less." if found["padding"] > 0.15 else "."),
        f"{found['waiting_share']:.1%} of the time went by waiting for data"
        + ("; give data.workers, or data.cache." if found["waiting_share"] > 0.05 else "."),
        f"{found['shapes']} batch shape(s) took {found['compile_seconds']:.1f} s to compile"
        + (f"; {found['recompilations']} step(s) were compiled again." if found["recompilations"] else ", once each."),
    ]
    total = sum(t["seconds"] for t in found["time"])
    if total:
        lines.append(f"Where the time of the traced steps goes, of {total:.2f} s in operations:")
        lines += [f"  {t['seconds'] / total:6.1%}  {t['part']}, {t['kind']}" for t in found["time"][:12]]
    if found["trace"]:
        lines.append(f"The trace is in {found['trace']}; open it with XProf (TensorBoard) or Perfetto.")
    return "\n".join(lines)
