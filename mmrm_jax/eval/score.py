"""Rewards of every response in a file, in the order of its rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
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
from mmrm_jax.data.pipeline import EncodedSource, MakeBatch, SequentialPlan, batches, buckets_for, index_source
from mmrm_jax.data.records import read_quarantine, summarise_quarantine
from mmrm_jax.sharding import make_mesh, put_batch
from mmrm_jax.train.setup import describe_data, initial_params, open_checkpoint, open_spec
from mmrm_jax.train.state import abstract_model
from mmrm_jax.types import Batch, Group, Quarantined

VIEWS: dict[str, BranchInput] = {"primary": "multimodal"}


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


def score_source(
    data: EncodedSource,
    model: ModelConfig,
    params: nnx.State,
    mesh: Mesh,
    *,
    dtype: Literal["float32", "bfloat16"],
    batch_size: int,
    buckets: int,
    quarantine: Path,
) -> Iterator[dict[int, np.ndarray]]:
    """Batch by batch: group index -> float32 rewards of its responses, [N]; a group that cannot be read is left out.

    What cannot be read is added to `quarantine`.
    """
    step = make_score_step(model, dtype)
    make = MakeBatch(data, buckets_for([data], buckets), batch_size, quarantine=quarantine)
    for stacked in batches(SequentialPlan(len(data), batch_size), make):
        batch = jax.tree.map(lambda x: x[0], stacked)
        with jax.set_mesh(mesh):
            rewards = np.asarray(step(params, put_batch(batch, mesh, micro=False)))
        valid = batch.response_lengths > 0
        yield {int(i): rewards[g][valid[g]] for g, i in enumerate(batch.group_index) if i >= 0}


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

    A row that cannot be used gives `{"id", "row", "error"}` in its place. Raises ValueError for a checkpoint without a
    score head, unless `draw_score` is the seed that one is drawn from.
    """
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
    source, bad = open_spec(spec, Path(), image_root)
    progress = _bar(f"reading {spec}", console)
    data, unfit = index_source(source, checkpoint.processor, VIEWS, cache=False, progress=progress)
    console.print(describe_data([data], buckets_for([data], buckets)))
    out.parent.mkdir(parents=True, exist_ok=True)
    quarantine = out.with_name(out.name + ".unreadable")
    quarantine.unlink(missing_ok=True)
    scored = score_source(
        data,
        checkpoint.config,
        params,
        mesh,
        dtype=dtype,
        batch_size=batch_size,
        buckets=buckets,
        quarantine=quarantine,
    )
    rewards: dict[int, np.ndarray] = {}
    for found in _bar(f"scoring {spec}", console)(scored, -(-len(data) // batch_size)):
        rewards |= found
    errors = [*bad, *unfit, *read_quarantine(quarantine)]
    quarantine.unlink(missing_ok=True)
    root = image_root or Path(spec).parent
    part = out.with_name(out.name + ".part")
    with part.open("w", encoding="utf-8") as f:
        for line in _lines(data, rewards, errors, root):
            f.write(json.dumps(line, ensure_ascii=False) + "\n")
    part.rename(out)
    if errors:
        console.print(summarise_quarantine(errors))
    count = sum(map(len, rewards.values()))
    console.print(f"{count} scores of {len(rewards)} rows are in {out}")
    return {"out": str(out), "scores": count, "rows": len(rewards), "errors": len(errors), "drawn": drawn}


def _lines(
    data: EncodedSource, rewards: dict[int, np.ndarray], errors: Sequence[Quarantined], root: Path
) -> Iterator[dict[str, Any]]:
    """What is written, by row."""
    rows = [(data.group(index).row, 0, index, None) for index in sorted(rewards)]
    rows += [(entry.row, 1, 0, entry) for entry in errors]
    for row, _, index, entry in sorted(rows, key=lambda item: item[:3]):
        if entry is not None:
            yield {"id": entry.id, "row": row, "error": entry.reason}
            continue
        group = data.group(index)
        for response, score in zip(group.responses, rewards[index].tolist(), strict=True):
            place = {"id": group.id, "prompt": group.prompt, "img_path": _image_name(group, root)}
            yield place | {"response": response, "score": score}


def _image_name(group: Group, root: Path) -> str | None:
    """The image's path as the file gives it; None where the image is part of the data."""
    if not isinstance(group.image, Path):
        return None
    return str(group.image.relative_to(root) if group.image.is_relative_to(root) else group.image)


def _bar(name: str, console: Console) -> Callable[..., Any]:
    def progress(items: Any, total: int | None = None) -> Any:
        return track(items, name, total=total, console=console, transient=True, disable=not console.is_terminal)

    return progress
