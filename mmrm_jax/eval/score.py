"""Rewards of every response in a file, in the order of its rows."""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from mmrm_jax.config import BranchInput, MeshConfig, ModelConfig
from mmrm_jax.data.batching import Buckets, EncodedGroup, collate
from mmrm_jax.data.pipeline import EncodedSource, SequentialPlan, batches, buckets_for, index_source
from mmrm_jax.data.records import summarise_quarantine
from mmrm_jax.sharding import make_mesh, put_batch, whole_batch
from mmrm_jax.train.setup import describe_data, initial_params, open_checkpoint, open_spec
from mmrm_jax.train.state import abstract_model
from mmrm_jax.types import Batch, Group, Quarantined

VIEWS: dict[str, BranchInput] = {"primary": "multimodal"}


@dataclasses.dataclass(frozen=True)
class Scored:
    """A group and the float32 rewards of its responses, [N]."""

    group: Group
    rewards: np.ndarray


def make_score_step(
    model: ModelConfig, dtype: Literal["float32", "bfloat16"]
) -> Callable[[nnx.State, Batch], jax.Array]:
    """`step(params, batch) -> rewards [G, N]`, float32, compiled; a padding response's reward has no meaning."""
    graphdef, _ = abstract_model(model)

    @jax.jit
    def step(params: nnx.State, batch: Batch) -> jax.Array:
        prefix = batch.prefixes["primary"]
        return nnx.merge(graphdef, params).rewards(prefix, batch.responses, batch.response_lengths, jnp.dtype(dtype))

    return step


@dataclasses.dataclass(frozen=True)
class ReadBatch:
    """Positions -> (batch, the group at each position or why it cannot be used): what the input pipeline runs."""

    data: EncodedSource
    buckets: Buckets
    batch_size: int

    def __call__(self, positions: np.ndarray) -> tuple[Batch, list[Group | Quarantined]]:
        groups = [self.data.group(int(p)) for p in positions]
        encoded = [self.data.encode_group(group, int(p)) for group, p in zip(groups, positions, strict=True)]
        batch = collate(
            [e for e in encoded if isinstance(e, EncodedGroup)],
            self.buckets,
            num_groups=self.batch_size,
            micro_batches=1,
            views=VIEWS,
            longest_response=max(self.data.shapes[int(p)].response for p in positions),
        )
        found = [e if isinstance(e, Quarantined) else group for e, group in zip(encoded, groups, strict=True)]
        return jax.tree.map(lambda x: x[0], batch), found


def score_source(
    data: EncodedSource,
    model: ModelConfig,
    params: nnx.State,
    mesh: Mesh,
    *,
    dtype: Literal["float32", "bfloat16"],
    batch_size: int,
    buckets: Buckets,
) -> Iterator[Scored | Quarantined]:
    """Every group in order, scored, or why it cannot be read; a batch is what the devices divide, so rounded up."""
    step = make_score_step(model, dtype)
    size = whole_batch(batch_size, mesh)
    for batch, found in batches(SequentialPlan(len(data), size), ReadBatch(data, buckets, size)):
        with jax.set_mesh(mesh):
            rewards = np.asarray(step(params, put_batch(batch, mesh, micro=False)))
        rows = (values[lengths > 0] for values, lengths in zip(rewards, batch.response_lengths, strict=True))
        for group in found:
            yield group if isinstance(group, Quarantined) else Scored(group, next(rows))


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
    """Write one line a response, `{"id", "prompt", "img_path", "response", "score"}`, in the order of the rows.

    A row that cannot be used gives `{"id", "row", "error"}` in its place. Raises ValueError where `out` cannot be
    written or is the data itself, and for a checkpoint without a score head, unless `draw_score` is the seed that one
    is drawn from; DataError for a file that cannot be read at all.
    """
    for name, value in (("--batch-size", batch_size), ("--buckets", buckets)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    part = _part_of(out, spec)
    source, bad = open_spec(spec, Path(), image_root, comparisons=False)
    checkpoint = open_checkpoint(model)
    mesh = make_mesh(MeshConfig())
    params, drawn = initial_params(checkpoint, draw_score or 0, mesh)
    if drawn and draw_score is None:
        raise ValueError(
            f"{model} has no score.weight, so it is no reward model yet: train it (mmrm train, mmrm export), or give "
            "--draw-score SEED to score with a random head"
        )
    if drawn:
        console.print(f"not in the checkpoint, drawn from seed {draw_score}: {', '.join(drawn)}")
    data, unfit = index_source(
        source, checkpoint.processor, VIEWS, cache=False, progress=_bar(f"reading {spec}", console)
    )
    scored: Iterable[Scored | Quarantined] = ()
    if len(data):
        sizes = buckets_for([data], buckets)
        console.print(describe_data([data], sizes))
        scored = score_source(data, checkpoint.config, params, mesh, dtype=dtype, batch_size=batch_size, buckets=sizes)
    scored = _bar(f"scoring {spec}", console)(scored, len(data))
    known = sorted([*bad, *unfit], key=_row)
    rows, scores, errors = write_lines(part, heapq.merge(scored, known, key=_row))
    part.rename(out)
    if errors:
        console.print(summarise_quarantine(errors))
    console.print(f"{scores} scores of {rows} rows are in {out}")
    return {"out": str(out), "scores": scores, "rows": rows, "errors": len(errors), "drawn": drawn}


def _part_of(out: Path, spec: str) -> Path:
    """Where the lines go until the last one is written."""
    part = out.with_name(out.name + ".part")
    for file in (out, part):
        if file.is_dir():
            raise ValueError(f"{file} is a directory; --out must name a file")
        if file.exists() and Path(spec).exists() and file.samefile(spec):
            raise ValueError(f"{file} is the data itself and would be overwritten; give --out another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    return part


def _row(item: Scored | Quarantined) -> int:
    return item.row if isinstance(item, Quarantined) else item.group.row


def write_lines(file: Path, items: Iterable[Scored | Quarantined]) -> tuple[int, int, list[Quarantined]]:
    """Write each item as it comes; (rows with a score, scores, errors)."""
    rows = scores = 0
    errors: list[Quarantined] = []
    # A reason may quote half of a surrogate pair; as \udXXX it is valid JSON.
    with file.open("w", encoding="utf-8", errors="backslashreplace") as f:
        for item in items:
            good, bad = _lines(item)
            for line in (*good, *({"id": q.id, "row": q.row, "error": q.reason} for q in bad)):
                f.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            errors += bad
            rows, scores = rows + bool(good), scores + len(good)
    return rows, scores, errors


def _lines(item: Scored | Quarantined) -> tuple[list[dict[str, Any]], list[Quarantined]]:
    """(lines of the responses with a score, what went wrong)."""
    if isinstance(item, Quarantined):
        return [], [item]
    group, good, bad = item.group, [], []
    for i, (response, score) in enumerate(zip(group.responses, item.rewards.tolist(), strict=True)):
        if math.isfinite(score):
            place = {"id": group.id, "prompt": group.prompt, "img_path": group.image_name}
            good.append(place | {"response": response, "score": score})
        else:
            reason = f"no finite score: that of response {i} is {score}; are the model's weights finite?"
            bad.append(Quarantined(group.file, group.row, reason, group.id))
    return good, bad


def _bar(name: str, console: Console) -> Callable[..., Any]:
    def progress(items: Any, total: int | None = None) -> Any:
        return track(items, name, total=total, console=console, transient=True, disable=not console.is_terminal)

    return progress
