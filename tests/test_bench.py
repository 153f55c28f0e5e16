"""`mmrm bench`: each benchmark's rows, their metrics by hand, baselines, overlap, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import run, write_pairs

import mmrm_jax
from mmrm_jax.bench.metrics import length_margins, metric_rows
from mmrm_jax.bench.readers import read_benchmark, vl_group
from mmrm_jax.data.records import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures, and preference files about them to have been trained on."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("a", "b"):
        write_pairs(folder, name, 8, seed=ord(name))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """A reward model with its proxy, trained for two steps."""
    from mmrm_jax import cli

    train = ["train", "--data", folder / "a.jsonl", "--out", folder / "run", "--steps", 2, "--batch-size", 8]
    cli.run([*map(str, train), "--data.holdout", "0", "--data.buckets", "1", "--objective", "shortcut_aware"])
    cli.run(["export", "--run", str(folder / "run"), "--out", str(folder / "model"), "--proxy"])
    return folder / "model"


def vl_rewardbench(folder: Path) -> Path:
    """Parquet with the images in it, as published."""
    rows = []
    for i, name in enumerate(["mathverse_1", "mmmu_2", "hallucination_pair-3", "rlaif-v-4", "wildvision-5", "odd"]):
        image = {"bytes": (folder / "images" / f"a-{i}.png").read_bytes(), "path": f"{name}.png"}
        ranking = [0, 1] if i % 2 else [1, 0]
        answers = ["It is red.", "It is blue, as far as one can see."]
        rows.append({"id": name, "query": "<image>\nColour?", "response": answers, "image": image})
        rows[-1] |= {"human_ranking": [0, 0] if name == "odd" else ranking, "models": ["x", "y"], "judge": "j"}
    pq.write_table(pa.Table.from_pylist(rows), folder / "vl.parquet")
    return folder / "vl.parquet"


def jsonl(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_vl_rewardbench(folder: Path) -> None:
    benchmark, items, left_out = read_benchmark(vl_rewardbench(folder), None)
    assert benchmark.key == "vl-rewardbench"
    found = [(i.category, i.group.comparisons[0].winner) for i in items]
    assert found == [("reasoning", 1), ("reasoning", 0), ("hallucination", 1), ("hallucination", 0), ("general", 1)]
    assert (left_out[0].row, left_out[0].id) == (6, "odd") and "'human_ranking' is [0, 0]" in left_out[0].reason
    assert vl_group("RLHF-V_9") == "hallucination" and vl_group("povid") == "general"


def test_multimodal_rewardbench(folder: Path) -> None:
    row = {"ID": 7, "Text": "Colour?", "Image": "images/a-0.png", "Output1": "red", "Output2": "blue"}
    row |= {"Better": "Output2", "Category": "safety/bias"}
    rows = [row, {k: v for k, v in row.items() if k != "Text"} | {"ID": 8}, row | {"Better": "neither", "ID": 9}]
    benchmark, items, left_out = read_benchmark(jsonl(folder / "mm.jsonl", rows), None)
    assert benchmark.key == "multimodal-rewardbench"
    assert [(i.question, i.category, i.group.prompt) for i in items] == [
        ("7", "safety/bias", "Colour?"),
        ("8", "safety/bias", ""),
    ]
    assert items[0].group.comparisons[0].winner == 1
    assert "'Better' is 'neither'; it must be Output1 or Output2" in left_out[0].reason


def test_mm_rlhf_rewardbench(folder: Path) -> None:
    pair = {"prompt": "Colour?", "chosen": "red", "rejected": "blue"}
    (folder / "mcq").mkdir(exist_ok=True)
    (folder / "mcq" / "1.png").write_bytes((folder / "images" / "a-0.png").read_bytes())
    rows = [pair | {"id": 1, "image": "mcq/1.png"}, pair | {"id": 1, "image": "mcq/1.png", "rejected": "green"}]
    rows += [pair | {"id": 2, "video": "video/2.mp4"}, pair | {"id": 3, "image": "images/a-1.png"}]
    benchmark, items, left_out = read_benchmark(jsonl(folder / "rlhf.jsonl", rows), None)
    assert benchmark.by_question and [(i.question, i.category) for i in items] == [
        ("1", "mcq"),
        ("1", "mcq"),
        ("3", "other"),
    ]
    assert [q.reason for q in left_out] == ["video: only images are read"]


def test_metrics_by_hand() -> None:
    margins = {"model": np.array([1.0, -1, 2, 0, 3])}
    categories, questions = ["x", "x", "x", "y", "y"], ["1", "1", "2", "3", "4"]
    rows = metric_rows(margins, categories, questions, np.arange(5), by_question=True)
    found = {row["metric"]: (row["n"], row["accuracy"]) for row in rows}
    assert found == {
        "x": (3, pytest.approx(2 / 3)),
        "y": (2, 0.75),  # a margin of 0 counts half
        "overall": (5, pytest.approx(0.7)),
        "macro": (2, pytest.approx((2 / 3 + 0.75) / 2)),
        "Acc+": (4, 0.5),
    }
    for row in rows:  # a category that many resamples lack has no interval
        assert row["low"] is None or row["low"] <= row["accuracy"] <= row["high"]
    assert [row["metric"] for row in rows if row["low"] is None] == ["y", "macro"]
    np.testing.assert_array_equal(length_margins([("long", "a"), ("", "ab")]), [3, -2])
    # Pairs of one image are resampled together: a single one says nothing of how images differ.
    (alone, *_) = metric_rows(margins, ["x"] * 5, questions, np.zeros(5, int), by_question=False)
    assert (alone["accuracy"], alone["low"], alone["high"]) == (0.7, None, None)
    # Of a question that lacks a pair nobody knows whether all are right.
    *_, less = metric_rows(margins, categories, ["1", "1", None, "3", "4"], np.arange(5), by_question=True)
    assert (less["metric"], less["n"], less["accuracy"]) == ("Acc+", 3, pytest.approx(1 / 3))


def test_a_benchmark_from_file_to_table(capsys, folder: Path, model: Path, tmp_path: Path) -> None:
    command = ["bench", vl_rewardbench(folder), "--model", model, "--out", tmp_path, "--json", tmp_path / "r.json"]
    status, text = run(capsys, *command, "--trained-on", folder / "a.jsonl", folder / "b.jsonl")
    assert status == 0 and "VL-RewardBench" in text and "arXiv 2411.17451" in text, text
    result = json.loads((tmp_path / "r.json").read_text())
    rm = mmrm_jax.load(model, proxy=True)
    _, items, _ = read_benchmark(folder / "vl.parquet", None)
    asked = [(item.group.images[0], item.group.prompt, item.group.responses) for item in items]
    rewards = {"model": rm.score_many(asked), "text only (proxy)": rm.score_many(asked, "proxy")}
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for judge, found in rewards.items():
        signs = [1 if item.group.comparisons[0].winner == 0 else -1 for item in items]
        margins = [sign * (r[0] - r[1]) for sign, r in zip(signs, found, strict=True)]
        np.testing.assert_allclose([line["margins"][judge] for line in lines], margins, atol=1e-5)
    accuracy = np.mean([line["margins"]["model"] > 0 for line in lines])
    rows = {(row["judge"], row["metric"]): row["accuracy"] for row in result["rows"]}
    assert rows["model", "overall"] == pytest.approx(accuracy)
    assert rows["longer answer", "overall"] == pytest.approx(3 / 5)  # it is the second, better in three of five
    # All five images and the first answer were trained on; nothing is left.
    assert result["overlap"]["with a seen image"] == 5 and result["overlap"]["fresh"] == 0
    (left_out,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert left_out["id"] == "odd"

    # With other pictures the benchmark is new, but for an answer.
    status, text = run(capsys, *command, "--trained-on", folder / "b.jsonl")
    overlap = json.loads((tmp_path / "r.json").read_text())["overlap"]
    assert (overlap["with a seen image"], overlap["with a seen answer"], overlap["fresh"]) == (0, 5, 0)


def test_what_is_no_benchmark_is_refused(capsys, folder: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"question": "x"}\n')
    for more, message in (
        ((), "is no benchmark that is known"),
        (("--name", "vl"), "there is no benchmark 'vl'; known"),
    ):
        status, text = run(capsys, "bench", tmp_path / "odd.jsonl", "--model", model, *more)
        assert status == 2 and message in text.replace("\n", " "), text
    with pytest.raises(DataError, match="no row of VL-RewardBench that can be used; first reason: missing field"):
        read_benchmark(tmp_path / "odd.jsonl", None, "vl-rewardbench")
