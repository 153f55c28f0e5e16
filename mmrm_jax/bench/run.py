"""`mmrm bench`: a model and its baselines on a benchmark, and what of it the model has been trained on."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmrm_jax.bench.metrics import OVERALL, length_margins, metric_rows
from mmrm_jax.bench.overlap import overlap, read_trained
from mmrm_jax.bench.readers import Benchmark, Item, read_benchmark
from mmrm_jax.config import MeshConfig
from mmrm_jax.data.pipeline import buckets_for, index_source
from mmrm_jax.data.records import raise_first, summarise_quarantine, write_quarantine
from mmrm_jax.data.sources import MemorySource, connected, image_identities
from mmrm_jax.eval.score import Scored, score_source
from mmrm_jax.eval.scorer import Branch, Scorer, holds_proxy, open_scorer, with_proxy
from mmrm_jax.eval.summary import between, percent
from mmrm_jax.sharding import make_mesh, whole_batch
from mmrm_jax.types import Quarantined

LONGER = "longer answer"


def bench(
    model: Path,
    data: Path,
    out: Path,
    *,
    name: str | None,
    trained_on: Sequence[str],
    image_root: Path | None,
    dtype: Literal["float32", "bfloat16"],
    batch_size: int,
    console: Console,
) -> dict[str, Any]:
    """Score every pair, print the benchmark's metrics, and write `pairs.jsonl` and `quarantine.jsonl` into `out`.

    Beside the model are the longer answer and, where the checkpoint folder holds a proxy, text alone. With preference
    files in `trained_on` it is said how many pairs have an image or an answer in common with them, and how the model
    does on the others. `image_root` is the benchmark's. Raises DataError where it or a training file cannot be read,
    ValueError where the model cannot.
    """
    benchmark, items, left_out = read_benchmark(data, image_root, name)
    trained = read_trained(trained_on) if trained_on else None
    if trained is not None and trained.unread:
        what = "training rows not read whole, whose images do not count as seen (answers do where they can be read)"
        console.print(summarise_quarantine(trained.unread, what))
    scorer, _ = open_scorer(model, make_mesh(MeshConfig()), dtype, batch_size, None)
    asked = collections.Counter(item.question for item in items)
    batch_size = whole_batch(batch_size, scorer.mesh)
    items, margins, unread = scored_pairs(items, scorer, batch_size, console)
    missing = {entry.id for entry in left_out} | (asked - collections.Counter(item.question for item in items)).keys()
    left_out += unread
    out.mkdir(parents=True, exist_ok=True)
    write_quarantine(out / "quarantine.jsonl", left_out)
    if not items:
        raise_first(left_out)
    judges = {"model": margins}
    if (text := text_margins(scorer, items, batch_size, console)) is not None:
        judges["text only (proxy)"] = text
    judges[LONGER] = length_margins([_texts(item) for item in items])
    known = _identities(items)
    clusters = np.unique(connected(known), return_inverse=True)[1]
    categories = [item.category for item in items]
    questions = [None if item.question in missing else item.question for item in items]
    rows = metric_rows(judges, categories, questions, clusters, by_question=benchmark.by_question)
    seen = overlap(items, known, trained) if trained is not None else None
    _write_pairs(out / "pairs.jsonl", items, judges, seen)
    console.print(_table(benchmark, rows))
    console.print(benchmark.note, soft_wrap=True)
    console.print(f"pair by pair: {out / 'pairs.jsonl'}", soft_wrap=True, highlight=False)
    if left_out:
        console.print(summarise_quarantine(left_out, f"left out of {data}"))
    result = {"benchmark": benchmark.key, "pairs": len(items), "left_out": len(left_out), "rows": rows}
    if seen is not None and trained is not None:
        result["overlap"] = _overlap_result(seen, judges, categories, questions, clusters)
        result["overlap"]["unread"] = len(trained.unread)
        console.print(_overlap_sentence(result["overlap"], trained_on), soft_wrap=True)
    return result | {"note": benchmark.note}


def scored_pairs(
    items: Sequence[Item], scorer: Scorer, batch_size: int, console: Console, branch: Branch = "primary"
) -> tuple[list[Item], np.ndarray, list[Quarantined]]:
    """(pairs that could be scored, a branch's margin for the better answer of each, the others)."""
    source = MemorySource(tuple(item.group for item in items))
    data, unfit = index_source(source, scorer.checkpoint.processor, {branch: scorer.views[branch]}, cache=False)
    kept: list[Item] = []
    margins: list[float] = []
    if len(data):
        sizes = buckets_for([data], 4)
        found = score_source(data, scorer, range(len(data)), batch_size=batch_size, buckets=sizes, branch=branch)
        bar = track(found, "scoring", total=len(data), console=console, transient=True, disable=not console.is_terminal)
        for place, scored in zip(data.kept, bar, strict=True):
            if isinstance(scored.found, str):
                unfit.append(_problem(scored))
                continue
            (comparison,) = scored.group.comparisons
            kept.append(items[place])
            margins.append(float(scored.found[comparison.winner] - scored.found[comparison.loser]))
    return kept, np.asarray(margins, np.float64), unfit


def _problem(scored: Scored) -> Quarantined:
    group = scored.group
    return Quarantined(group.file, group.row, str(scored.found), group.id)


def text_margins(scorer: Scorer, items: Sequence[Item], batch_size: int, console: Console) -> np.ndarray | None:
    """The margins of the proxy in the model's folder, which looks at no image; None where there is none.

    Raises ValueError where it is damaged.
    """
    if not holds_proxy(scorer.checkpoint.path):
        return None
    _, margins, unread = scored_pairs(items, with_proxy(scorer), batch_size, console, "proxy")
    raise_first(unread)
    return margins


def _identities(items: Sequence[Item]) -> list[list[str]]:
    hashes: dict[Path, str] = {}
    return [image_identities(item.group, hashes) for item in items]


def _texts(item: Item) -> tuple[str, str]:
    (comparison,) = item.group.comparisons
    return item.group.responses[comparison.winner], item.group.responses[comparison.loser]


def _write_pairs(
    file: Path, items: Sequence[Item], judges: dict[str, np.ndarray], seen: list[dict[str, bool]] | None
) -> None:
    with file.open("w", encoding="utf-8") as f:
        for i, item in enumerate(items):
            group = item.group
            line: dict[str, Any] = {"id": group.id, "row": group.row, "category": item.category}
            line |= {"margins": {judge: float(margins[i]) for judge, margins in judges.items()}}
            line |= {} if seen is None else {"seen": seen[i]}
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


def _table(benchmark: Benchmark, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"{benchmark.title}: accuracy in %, with 95 % intervals", title_justify="left")
    judges = list(dict.fromkeys(row["judge"] for row in rows))
    for heading in ("", "n", *judges):
        table.add_column(heading, justify="right" if heading else "left")
    for metric in dict.fromkeys(row["metric"] for row in rows):
        of = [row for row in rows if row["metric"] == metric]
        bounds = (between(row["low"], row["high"], percent) for row in of)
        cells = (f"{percent(row['accuracy'])}" + (f" ({b})" if b else "") for row, b in zip(of, bounds, strict=True))
        table.add_row(metric, str(of[0]["n"]), *cells)
    return table


def _overlap_result(
    seen: list[dict[str, bool]],
    judges: dict[str, np.ndarray],
    categories: Sequence[str],
    questions: Sequence[str | None],
    clusters: np.ndarray,
) -> dict[str, Any]:
    """How many pairs were seen, and each judge's accuracy on those whose image and answers were not."""
    fresh = np.asarray([not any(each.values()) for each in seen])
    counts = {f"with a seen {what}": sum(each[what] for each in seen) for what in ("image", "answer")}
    if not fresh.any():
        return counts | {"fresh": 0, "rows": []}
    chosen = np.flatnonzero(fresh).tolist()
    rows = metric_rows(
        {judge: margins[chosen] for judge, margins in judges.items()},
        [categories[i] for i in chosen],
        [questions[i] for i in chosen],
        clusters[chosen],
        by_question=False,
    )
    return counts | {"fresh": int(fresh.sum()), "rows": [row for row in rows if row["metric"] == OVERALL]}


def _overlap_sentence(found: dict[str, Any], trained_on: Sequence[str]) -> str:
    images, answers = found["with a seen image"], found["with a seen answer"]
    said = f"{images} pairs show an image of {', '.join(trained_on)}, {answers} hold an answer of theirs"
    if found["unread"]:
        said += f" (or more: {found['unread']} of their rows could not be read whole)"
    if not found["rows"]:
        return said + "; none is without"
    row = found["rows"][0]
    bounds = between(row["low"], row["high"], percent)
    accuracy = percent(row["accuracy"]) + (f" ({bounds})" if bounds else "")
    return f"{said}; on the {found['fresh']} without, the model's accuracy is {accuracy}"
