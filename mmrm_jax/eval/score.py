"""Rewards of every response in a file, in the order of its rows."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from mmrm_jax.config import BranchInput, MeshConfig
from mmrm_jax.data.batching import EncodedGroup, collate
from mmrm_jax.data.buckets import Buckets
from mmrm_jax.data.pipeline import EncodedSource, ListPlan, batches, buckets_for, index_source
from mmrm_jax.data.records import split_format, summarise_quarantine
from mmrm_jax.data.scoring import ScoringRow, read_scoring, row_of_group
from mmrm_jax.data.sources import GroupSource, MemorySource
from mmrm_jax.eval.scorer import Scorer, open_scorer
from mmrm_jax.sharding import make_mesh, whole_batch
from mmrm_jax.train.setup import describe_data, open_spec
from mmrm_jax.types import Batch, Group, Quarantined

VIEWS: dict[str, BranchInput] = {"primary": "multimodal"}


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
            views=VIEWS,
            room_for=[self.data.shapes[int(p)] for p in positions],
        )
        problems = [e.reason if isinstance(e, Quarantined) else None for e in encoded]
        return jax.tree.map(lambda x: x[0], batch), list(zip(groups, problems, strict=True))


def score_source(data: EncodedSource, scorer: Scorer, *, batch_size: int, buckets: Buckets) -> Iterator[Scored]:
    """Every group in order, scored, or why it cannot be read; a batch is what the devices divide, so rounded up."""
    size = whole_batch(batch_size, scorer.mesh)
    for batch, found in batches(ListPlan(range(len(data)), size), ReadBatch(data, buckets, size)):
        rewards = scorer.run(batch)
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
    cannot be scored, and one `{"file", "row", "error"}` for a row whose responses cannot be told; see `ScoringRow`.
    Raises ValueError where `out` cannot be written or is the data itself, and for a checkpoint without a score head,
    unless `draw_score` is the seed that one is drawn from; DataError for a file that cannot be read or has no rows.
    """
    for name, value in (("--batch-size", batch_size), ("--buckets", buckets)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    part = _part_of(out, spec)
    source, asked = _open_rows(spec, image_root)
    scorer, drawn = open_scorer(model, make_mesh(MeshConfig()), dtype, batch_size, draw_score)
    if drawn:
        console.print(f"not in the checkpoint, drawn from seed {draw_score}: {', '.join(drawn)}")
    data, unfit = index_source(
        source, scorer.checkpoint.processor, VIEWS, cache=False, progress=_bar(f"reading {spec}", console)
    )
    scored: Iterable[Scored] = ()
    if len(data):
        sizes = buckets_for([data], buckets)
        console.print(describe_data([data], sizes))
        scored = score_source(data, scorer, batch_size=batch_size, buckets=sizes)
    scored = _bar(f"scoring {spec}", console)(scored, len(data))
    kept = set(data.kept)
    left_out = (source[i] for i in range(len(source)) if i not in kept)
    rejected = (Scored(group, q.reason) for group, q in zip(left_out, unfit, strict=True))
    finished = (finish(s, asked.get(_row(s))) for s in heapq.merge(scored, rejected, key=_row))
    hopeless = (row for row in asked.values() if row.group is None)
    rows, scores, errors = write_lines(part, heapq.merge(finished, hopeless, key=lambda row: row.row))
    part.rename(out)
    if errors:
        console.print(summarise_quarantine(errors, "without a score"))
    console.print(f"{scores} scores of {rows} rows are in {out}")
    return {"out": str(out), "scores": scores, "rows": rows, "errors": len(errors), "drawn": drawn}


def _part_of(out: Path, spec: str) -> Path:
    """Where the lines go until the last one is written."""
    part, data = out.with_name(out.name + ".part"), split_format(spec)[0]
    for file in (out, part):
        if file.is_dir():
            raise ValueError(f"{file} is a directory; --out must name a file")
        if file.exists() and data.exists() and file.samefile(data):
            raise ValueError(f"{file} is the data itself and would be overwritten; give --out another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    return part


def _open_rows(spec: str, image_root: Path | None) -> tuple[GroupSource, dict[int, ScoringRow]]:
    """(groups to score, all rows of a file by number); a prepared data set has no rows but its groups'."""
    if ":" in Path(spec).name or Path(spec).is_dir():
        return open_spec(spec, Path(), image_root)[0], {}
    rows = read_scoring(Path(spec), image_root)
    return MemorySource(tuple(row.group for row in rows if row.group is not None)), {row.row: row for row in rows}


def _row(scored: Scored) -> int:
    return scored.group.row


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


def write_lines(file: Path, rows: Iterable[ScoringRow]) -> tuple[int, int, list[Quarantined]]:
    """Write the lines of each row as it comes; (rows with a score, scores, errors)."""
    good = scores = 0
    errors: list[Quarantined] = []
    # A reason or a response may hold half of a surrogate pair; as \udXXX it is valid JSON.
    with file.open("w", encoding="utf-8", errors="backslashreplace") as f:
        for row in rows:
            for line in row.lines:
                f.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            bad = [Quarantined(row.file, row.row, line["error"]) for line in row.lines if "error" in line]
            good, scores = good + (len(bad) < len(row.lines)), scores + len(row.lines) - len(bad)
            errors += bad
    return good, scores, errors


def _bar(name: str, console: Console) -> Callable[..., Any]:
    def progress(items: Any, total: int | None = None) -> Any:
        return track(items, name, total=total, console=console, transient=True, disable=not console.is_terminal)

    return progress
