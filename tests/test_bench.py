"""`mmrm bench`: each benchmark's rows, their metrics by hand, baselines, overlap, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import run, write_pairs
from pictures import png
from rich.console import Console

import mmrm_jax
from mmrm_jax.bench.metrics import length_margins, metric_rows
from mmrm_jax.bench.overlap import overlap, read_trained
from mmrm_jax.bench.readers import Item, read_benchmark, vl_group
from mmrm_jax.bench.run import text_margins
from mmrm_jax.data import processor
from mmrm_jax.data.records import DataError
from mmrm_jax.data.sources import image_identities
from mmrm_jax.types import Comparison, Group

pytestmark = pytest.mark.usefixtures("one_device")


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
    assert [i.group.id for i in items] == ["7", "8"] and left_out[0].id == "9"
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


def test_preference_pairs_are_taken_for_no_benchmark(folder: Path) -> None:
    """They have the fields of one; its name says that it is meant."""
    with pytest.raises(DataError, match=r"no image's path names one .*--name mm-rlhf-rewardbench"):
        read_benchmark(folder / "a.jsonl", None)
    benchmark, items, _ = read_benchmark(folder / "a.jsonl", None, "mm-rlhf-rewardbench")
    assert benchmark.by_question and len(items) == 8


def test_a_damaged_proxy_is_not_taken_for_none(capsys, folder: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"proxy_input": "abssent"}))
    status, text = run(capsys, "bench", vl_rewardbench(folder), "--model", tmp_path / "model", "--out", tmp_path / "o")
    assert status == 2 and "proxy_input is 'abssent'" in text


def test_metrics_by_hand() -> None:
    margins = {"model": np.array(4 * [1.0, -1, 2, 0, 3])}
    categories, questions = 4 * ["x", "x", "x", "y", "y"], [f"{i}-{q}" for i in range(4) for q in "11234"]
    rows = metric_rows(margins, categories, questions, np.arange(20), by_question=True)
    found = {row["metric"]: (row["n"], row["accuracy"]) for row in rows}
    assert found == {
        "x": (12, pytest.approx(2 / 3)),
        "y": (8, 0.75),  # a margin of 0 counts half
        "overall": (20, pytest.approx(0.7)),
        "macro": (2, pytest.approx((2 / 3 + 0.75) / 2)),
        "Acc+": (16, 0.5),
    }
    for row in rows:  # a category of eight images has no interval
        assert row["low"] is None or row["low"] <= row["accuracy"] <= row["high"]
    assert [row["metric"] for row in rows if row["low"] is None] == ["y", "macro"]
    np.testing.assert_array_equal(length_margins([("long", "a"), ("", "ab")]), [3, -2])
    # Pairs of one image are resampled together: a single one says nothing of how images differ.
    (alone, *_) = metric_rows(margins, ["x"] * 20, questions, np.zeros(20, int), by_question=False)
    assert (alone["accuracy"], alone["low"], alone["high"]) == (0.7, None, None)
    # Of a question that lacks a pair nobody knows whether all are right.
    some = [None if question.endswith("2") else question for question in questions]
    *_, less = metric_rows(margins, categories, some, np.arange(20), by_question=True)
    assert (less["metric"], less["n"], less["accuracy"]) == ("Acc+", 12, pytest.approx(1 / 3))


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


@pytest.mark.parametrize("sees", ["blank", "absent"])
def test_the_proxy_reads_no_image(monkeypatch, folder: Path, model: Path, tmp_path: Path, sees: str) -> None:
    """And gives what it gives beside the images: of none, of one and of two; a few batches are held at once."""
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"proxy_input": sees}))
    one, two = (folder / "images" / f"a-{i}.png" for i in range(2))
    groups = [
        Group(f"{i}", f"Colour {i}?", ("It is red.", "blue"), (Comparison(i % 2, 1 - i % 2),), None, "e", "f", i)
        for i in range(23)
    ]
    groups[1::3] = [dataclasses.replace(group, image=one) for group in groups[1::3]]
    groups[2::3] = [dataclasses.replace(group, image=one, more_images=(two,)) for group in groups[2::3]]
    rm = mmrm_jax.load(tmp_path / "model", proxy=True, batch_size=8)
    rewards = rm.score_many([(list(g.images), g.prompt, g.responses) for g in groups], "proxy")
    margins = [(r[0] - r[1]) * (1 if i % 2 == 0 else -1) for i, r in enumerate(rewards)]

    def no(*_) -> None:
        raise AssertionError("an image is read")

    monkeypatch.setattr(processor, "load_image", no)
    monkeypatch.setattr(processor, "image_size", no)
    items = [Item(group, "c", group.id) for group in groups]
    found = text_margins(mmrm_jax.load(tmp_path / "model", batch_size=8), items, 8, Console(quiet=True))
    assert np.ptp(margins) > 0
    np.testing.assert_allclose(found, margins, atol=1e-5)


def test_training_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    picture = png()
    (tmp_path / "i.png").write_bytes(picture)
    pair = {"prompt": "p", "rejected": "z"}
    rows = [pair | {"id": "0", "img_path": "i.png", "chosen": "x"}]
    rows += [pair | {"id": f"{k}", "img_path": "gone.png", "chosen": f"answer {k}"} for k in range(1, 10)]
    rows += [{"id": "10", "prompt": "nothing that is known", "img_path": "i.png"}]
    one = jsonl(tmp_path / "one.jsonl", rows)
    two = jsonl(tmp_path / "two.jsonl", [{"prompt": "q", "img_path": None, "responses": ["answer 11", " "]}])
    groups = [
        Group(
            f"{k}", "p", (f"answer {k}", "other"), (Comparison(0, 1),), picture if k == 12 else b"%d" % k, "e", "f", k
        )
        for k in range(1, 13)
    ]
    groups.append(Group("13", "q", ("a", "b"), (Comparison(0, 1),), None, "e", "f", 13))
    items = [Item(group, "c", group.id) for group in groups]
    known = [image_identities(group, {}) for group in groups]
    for specs in ([f"{one}+{two}"], [str(one), f"{two}@scoring"]):
        trained = read_trained(specs)
        assert [(q.row, q.id, q.reason.partition(":")[0]) for q in trained.unread] == [
            *((k + 1, f"{k}", "missing image file") for k in range(1, 10)),
            (11, "10", "unknown format"),
        ]
        seen = overlap(items, known, trained)
        assert [k for k, each in enumerate(seen, 1) if each["answer"]] == [*range(1, 10), 11]
        assert [k for k, each in enumerate(seen, 1) if each["image"]] == [12, 13]  # without an image, by the prompt


def test_training_files_are_read_beside_their_images(capsys, folder: Path, model: Path, tmp_path: Path) -> None:
    """Whatever the image root of the benchmark; in a folder whose name would end a style of Rich's."""
    trained = tmp_path / "[" / "b]"
    file = write_pairs(trained, "a", 8, seed=ord("a"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["img_path"] = "images/gone.png"
    jsonl(file, rows)
    asked = {"Text": "Colour?", "Output1": "red", "Output2": "blue", "Better": "Output1", "Category": "[/b]"}
    pairs = [asked | {"ID": i, "Image": f"a-{i}.png"} for i in range(2)]
    data = jsonl(trained / "mm.jsonl", [*pairs, asked | {"ID": 3, "Image": "none.png"}])
    command = ["bench", data, "--model", model, "--image-root", folder / "images", "--out", tmp_path / "out"]
    status, text = run(capsys, *command, "--trained-on", file, "--json", tmp_path / "r.json")
    text = text.replace("\n", "")
    assert status == 0 and "1 training rows not read whole" in text and "[/b]" in text, text
    assert "1 pairs show an image" in text and "(or more: 1 of their rows could not be read whole)" in text, text
    overlap = json.loads((tmp_path / "r.json").read_text())["overlap"]
    assert (overlap["with a seen image"], overlap["unread"], overlap["fresh"]) == (1, 1, 1)


def test_training_files_that_cannot_be_used_are_named_before_anything_is_scored(capsys, folder: Path, tmp_path) -> None:
    unknown = jsonl(tmp_path / "unknown.jsonl", [{"question": "x"}])
    command = ["bench", vl_rewardbench(folder), "--model", tmp_path / "none", "--trained-on", folder / "a.jsonl"]
    for file, message in (
        (tmp_path / "gone.jsonl", "gone.jsonl does not exist"),
        (unknown, "unknown.jsonl holds no usable row. 1 quarantined:   1 x unknown format"),
        (tmp_path, "holds no prepared data set"),
    ):
        status, text = run(capsys, *command, file)
        assert status == 2 and message in text.replace("\n", " "), text


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
