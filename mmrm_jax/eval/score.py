"""Rewards of every response in a file, in the order of its rows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from mmrm_jax.config import MeshConfig
from mmrm_jax.data.batching import EncodedGroup, collate
from mmrm_jax.data.buckets import Buckets
from mmrm_jax.data.pipeline import EncodedSource, ListPlan, batches, buckets_for, index_source
from mmrm_jax.data.records import split_format, summarise_quarantine
from mmrm_jax.data.scoring import ScoringRow, read_scoring, row_of_group
from mmrm_jax.data.sources import GroupSource, MemorySource, fingerprint
from mmrm_jax.distributed import barrier, is_main
from mmrm_jax.eval.score_parts import Parts, as_json
from mmrm_jax.eval.scorer import VIEWS, Branch, Scorer, open_scorer
from mmrm_jax.sharding import make_mesh, whole_batch
from mmrm_jax.train.setup import describe_data, model_fingerprint, open_spec
from mmrm_jax.types import Batch, Group, Quarantined

BATCHES = 16  # of a part


@dataclasses.dataclass(frozen=True)
class Scored:
    """A group, and the float32 rewards of its responses, [N], or why it cannot be used."""

    group: Group
    found: np.ndarray | str


@dataclasses.dataclass(frozen=True)
class ReadBatch:
    """Positions -> (batch, the group at each position and why it cannot be used, if so): the input pipeline's step."""

    data: EncodedSource
    buckets: Buckets
    batch_size: int

    def __call__(self, positions: np.ndarray) -> tuple[Batch, list[tuple[Group, str | None]]]:
        groups = [self.data.group(int(p)) for p in positions]
        encoded = [self.data.encode_group(group, int(p)) for group, p in zip(groups, positions, strict=True)]
        batch = collate(
            [e for e in encoded if isinstance(e, EncodedGroup)],
            self.buckets,
            num_groups=self.batch_size,
            micro_batches=1,
            views=self.data.views,
            room_for=[self.data.shapes[int(p)] for p in positions],
        )
        problems = [e.reason if isinstance(e, Quarantined) else None for e in encoded]
        return jax.tree.map(lambda x: x[0], batch), list(zip(groups, problems, strict=True))


def score_source(
    data: EncodedSource,
    scorer: Scorer,
    positions: Sequence[int],
    *,
    batch_size: int,
    buckets: Buckets,
    branch: Branch = "primary",
) -> Iterator[Scored]:
    """The groups at `positions` in order, scored, or why they cannot be read; `batch_size` is what devices divide.

    `data` was indexed with what `branch` sees; at most a few batches of it are held at once.
    """
    for batch, found in batches(ListPlan(positions, batch_size), ReadBatch(data, buckets, batch_size)):
        rewards = scorer.run(batch, branch)
        rows = (values[last >= 0] for values, last in zip(rewards, batch.responses.last, strict=True))
        for group, problem in found:
            yield Scored(group, next(rows) if problem is None else problem)


def score_file(
    model: Path,
    spec: str,
    out: Path,
    *,
    image_root: Path | None,
    dtype: Literal["float32", "bfloat16"],
    batch_size: int,
    buckets: int,
    draw_score: int | None,
    console: Console,
) -> dict[str, Any]:
    """Write one line a response, in the order of rows and responses, and return how many scores and errors there are.

    A line is `{"id", "prompt", "img_path", "response", "score"}`, with "error" in place of "score" for a response that
    cannot be scored, and one `{"file", "row", "error"}` for a row whose responses cannot be told; see `ScoringRow`. Of
    a `*.parquet` these are the columns. Rows are scored in parts, of the same batches however often the command was
    interrupted; finished ones lie beside `out` until it is whole. Several processes share out the parts.
    Raises ValueError where `out` cannot be written or is the data itself, and for a checkpoint without a score head,
    unless `draw_score` is the seed that one is drawn from; DataError for a file that cannot be read or has no rows;
    CheckpointError where the parts are of other data, of another model or of other settings; InUse where another
    command is at work on them.
    """
    for name, value in (("--batch-size", batch_size), ("--buckets", buckets)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    _check_out(out, spec)
    source, rows = open_rows(spec, image_root)
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    scorer, drawn = open_scorer(model, mesh, dtype, batch_size, draw_score)
    if out.exists():
        console.print(f"{out} is there, and will be replaced once all is scored", highlight=False)
    if drawn:
        console.print(f"not in the checkpoint, drawn from seed {draw_score}: {', '.join(drawn)}")
    settings = {"dtype": dtype, "batch_size": batch_size, "buckets": buckets, "draw_score": draw_score}
    prints = {"model": model_fingerprint(model), "data": [fingerprint(source, {}), _lines_print(rows)]}
    with Parts.begin(out, settings | prints | {"devices": len(mesh.devices.flat)}) as parts:
        data, unfit = index_source(
            source, scorer.checkpoint.processor, VIEWS, cache=False, progress=_bar(f"reading {spec}", console)
        )
        reasons = dict(zip(sorted(set(range(len(source))) - set(data.kept)), (q.reason for q in unfit), strict=True))
        sizes = buckets_for([data], buckets) if len(data) else None
        if sizes is not None:
            console.print(describe_data([data], sizes))
        work = Scoring(data, reasons, rows, scorer, whole_batch(batch_size, mesh), sizes)
        missing = [k for k in range(work.parts) if not parts.done(k)]
        if len(missing) < work.parts:
            there = f"{work.parts - len(missing)} of {work.parts} parts"
            console.print(f"going on: {there} are in {parts.folder}")
        barrier("score what is missing")  # before any process adds to what is there
        for k in _bar(f"scoring {spec}", console)(missing[jax.process_index() :: jax.process_count()]):
            parts.write(k, work.rows_of(k))
        barrier("scored")
        found = {"out": str(out), "drawn": drawn}
        if not is_main():
            return found
        good, scores, errors = parts.join(work.parts, out)
    if errors:
        console.print(summarise_quarantine(errors, "without a score"))
    console.print(f"{scores} scores of {good} rows are in {out}")
    return found | {"scores": scores, "rows": good, "errors": len(errors)}


@dataclasses.dataclass(frozen=True)
class Scoring:
    """All rows of a file, in parts of a few batches each.

    `rows` are those of the file, in order, with None for each group of a prepared data set; `reasons` says, by position
    in the source, why a group cannot be used.
    """

    data: EncodedSource
    reasons: dict[int, str]
    rows: Sequence[ScoringRow | None]
    scorer: Scorer
    batch_size: int
    buckets: Buckets | None

    @property
    def size(self) -> int:
        """Rows a part."""
        return BATCHES * self.batch_size

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-len(self.rows) // self.size)

    @functools.cached_property
    def _indices(self) -> list[int | None]:
        """The position in the source of each row's group, None where it has none."""
        count = itertools.count()
        return [None if row is not None and row.group is None else next(count) for row in self.rows]

    @functools.cached_property
    def _places(self) -> dict[int, int]:
        """Position in the source -> position in `data`."""
        return {index: place for place, index in enumerate(self.data.kept)}

    def rows_of(self, k: int) -> Iterator[ScoringRow]:
        """The rows of part `k` in order, each of its lines with a score or an error."""
        chosen = range(k * self.size, min((k + 1) * self.size, len(self.rows)))
        positions = [self._places[i] for r in chosen if (i := self._indices[r]) in self._places]  # type: ignore[index]
        scored = iter(())
        if positions and self.buckets is not None:
            scored = score_source(self.data, self.scorer, positions, batch_size=self.batch_size, buckets=self.buckets)
        for r in chosen:
            row, index = self.rows[r], self._indices[r]
            if index is None:
                assert row is not None
                yield row
            elif index in self.reasons:
                yield finish(Scored(self.data.source[index], self.reasons[index]), row)
            else:
                yield finish(next(scored), row)


def _check_out(out: Path, spec: str) -> None:
    """Raises ValueError where `out` is a directory or the data itself."""
    part, data = out.with_name(out.name + ".part"), split_format(spec)[0]
    for file in (out, part):
        if file.is_dir():
            raise ValueError(f"{file} is a directory; --out must name a file")
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise ValueError(f"{file} is a link or a device, which a file would replace; --out must name a file")
        if file.exists() and data.exists() and file.samefile(data):
            raise ValueError(f"{file} is the data itself and would be overwritten; give --out another name")
    out.parent.mkdir(parents=True, exist_ok=True)


def open_rows(spec: str, image_root: Path | None) -> tuple[GroupSource, Sequence[ScoringRow | None]]:
    """(groups to score, the rows of a file in order); a prepared data set has no rows but its groups', None each."""
    if ":" in Path(spec).name or Path(spec).is_dir():
        source = open_spec(spec, Path(), image_root)[0]
        return source, [None] * len(source)
    rows = read_scoring(Path(spec), image_root)
    return MemorySource(tuple(row.group for row in rows if row.group is not None)), rows


def _lines_print(rows: Sequence[ScoringRow | None]) -> str:
    """SHA-256 of what is known of each row before it is scored, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(b"".join(as_json(line).encode() for line in (() if row is None else row.lines)) + b"\n")
    return digest.hexdigest()


def finish(scored: Scored, asked: ScoringRow | None) -> ScoringRow:
    """The row of a group with a score or an error on every line; `asked` is the row in its file, if it is from one."""
    row, found = asked or row_of_group(scored.group), scored.found
    results = itertools.repeat({"error": found}) if isinstance(found, str) else map(_result, found.tolist())
    lines = tuple(line if "error" in line else line | next(results) for line in row.lines)
    return dataclasses.replace(row, lines=lines)


def _result(score: float) -> dict[str, Any]:
    if math.isfinite(score):
        return {"score": score}
    return {"error": f"no finite score: the model gives {score}; are its weights finite?"}


def _bar(name: str, console: Console) -> Callable[..., Any]:
    def progress(items: Any, total: int | None = None) -> Any:
        return track(items, escape(name), total=total, console=console, transient=True, disable=not console.is_terminal)

    return progress
