"""Training on several files at once, whose environments an objective may look at; captions in place of images."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run, write_pairs
from rich.console import Console

from mmrm_jax.ablate.run import leave_out
from mmrm_jax.config import DataConfig, Environment, MatrixConfig, TrainConfig
from mmrm_jax.data.shapes import make_group
from mmrm_jax.data.sources import fingerprint
from mmrm_jax.data.tfds.preference_files import prepare
from mmrm_jax.eval.matrix_data import open_data, seen_in_training
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.setup import encode, open_checkpoint, open_spec

pytestmark = pytest.mark.usefixtures("one_device")

SMALL = ["--steps", 2, "--batch-size", 8, "--data.holdout", 0, "--data.buckets", 1]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_pairs(tmp_path, name, 8, seed=ord(name))
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("{}\n")
    return tmp_path


def test_a_plus_in_a_path_joins_nothing(two: Path) -> None:
    shutil.copytree(two / "images", two / "one+two" / "images")
    shutil.copy(two / "a.jsonl", two / "one+two")
    prepare([two / "a.jsonl"], two / "pre+pared")
    for spec in ("one+two/a.jsonl", "one+two/a.jsonl@pairs", "pre+pared:a"):
        assert len(open_spec(spec, two, None)[0]) == 8


def test_files_joined_by_a_plus_come_one_after_another(two: Path) -> None:
    source, quarantined = open_spec("b.jsonl+a.jsonl", two, None)
    alone = [open_spec(f"{name}.jsonl", two, None)[0] for name in ("b", "a")]
    assert [source[i] for i in range(len(source))] == [each[i] for each in alone for i in range(len(each))]
    assert [(Path(q.file).name, q.row) for q in quarantined] == [("b.jsonl", 9)]
    with pytest.raises(IndexError, match="16 groups"):
        source[16]
    shutil.copy(two / "a.jsonl", two / "b.jsonl+a.jsonl")  # a file of that very name is meant then
    assert len(open_spec("b.jsonl+a.jsonl", two, None)[0]) == 8


def test_environments_are_numbers_of_comparisons(two: Path) -> None:
    source, _ = open_spec("b.jsonl+a.jsonl", two, None)
    config = TrainConfig(data=DataConfig(holdout=0.0))
    checkpoint = open_checkpoint(MODEL_DIR, config.data)
    views = {"primary": "multimodal"}
    data, _ = encode(source, checkpoint, views, config, name="both", console=Console(quiet=True))  # type: ignore[arg-type]
    found = data.with_environments(data.environments())
    given = [found.encode(i).given["environment"].tolist() for i in range(len(found))]  # type: ignore[union-attr]
    assert given == [[1.0]] * 8 + [[0.0]] * 8
    assert found.only([15, 0]).encode(1).given["environment"].tolist() == [1.0]  # type: ignore[union-attr]


@pytest.mark.parametrize("objective", ["v_rex:beta=2", "group_dro:environments=2"])
def test_training_across_environments(capsys, two: Path, objective: str) -> None:
    command = [
        "train",
        "--data",
        f"{two / 'a.jsonl'}+{two / 'b.jsonl'}",
        "--out",
        two / "run",
        "--objective",
        objective,
        *SMALL,
    ]
    status, text = run(capsys, *command)
    assert status == 0, text
    lines = [json.loads(line) for line in (two / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_more_environments_than_are_told_apart_are_refused(capsys, two: Path) -> None:
    write_pairs(two, "c", 8)
    data = "+".join(str(two / f"{name}.jsonl") for name in "abc")
    command = ["train", "--data", data, "--out", two / "run", "--objective", "group_dro:environments=2", *SMALL]
    status, text = run(capsys, *command)
    assert status == 2 and "tells 2 environments apart, and there are 3: a, b, c" in text.replace("\n", " "), text


@pytest.mark.parametrize("objective", ["v_rex", "group_dro:environments=2"])
def test_files_of_one_name_are_one_environment_and_refused(capsys, two: Path, objective: str) -> None:
    (two / "more").mkdir()
    data = f"{two / 'a.jsonl'}+{write_pairs(two / 'more', 'a', 8)}"
    status, text = run(capsys, "train", "--data", data, "--out", two / "run", "--objective", objective, *SMALL)
    assert status == 2 and "all comparisons are of one, 'a'" in " ".join(text.split()), text


A = Environment("A", "a.jsonl", "ta.jsonl")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("other", "on", "reason"),
    [
        (Environment("B", "a.jsonl", "tb.jsonl"), "test", "only one of them is in distribution"),
        (Environment("B", "a.jsonl", "tb.jsonl", validation="b.jsonl"), "validation", "only one of them"),
        (Environment("B", "b.jsonl", "tb.jsonl", validation="a.jsonl"), "validation", "validated on all of a.jsonl"),
        (Environment("B", None, "tb.jsonl", validation="a.jsonl"), "validation", "validated on all of a.jsonl"),
    ],
)
def test_sets_that_are_trained_on_and_tested_are_refused(
    two: Path, other: Environment, on: str, reason: str, turned: bool
) -> None:
    environments = (other, A) if turned else (A, other)
    with pytest.raises(ValueError, match=reason):
        open_data(MatrixConfig(root=two, environments=environments, on=on))  # type: ignore[arg-type]


def test_a_caption_in_place_of_the_image(capsys, two: Path) -> None:
    rows = [json.loads(line) for line in (two / "a.jsonl").read_text().splitlines()]
    captioned = [row | {"caption": f"It is all {row['chosen'].split()[-1]}"} for row in rows]
    captioned[3]["caption"] = " "
    (two / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in captioned))
    command = ["train", "--out", two / "run", "--objective", "caption_only", *SMALL, "--data"]
    status, text = run(capsys, *command, two / "c.jsonl")
    assert status == 0, text
    (left_out,) = map(json.loads, (two / "run" / "quarantine.jsonl").read_text().splitlines())
    assert left_out["row"] == 4 and "no caption" in left_out["reason"] and "'caption'" in left_out["reason"]
    status, text = run(capsys, *command, two / "a.jsonl", "--out", two / "none")
    assert status == 2 and "no caption: `caption_only` reads the field 'caption'" in text

    # Sight of the caption, and of no pixels: the words are in the prefix, the image is not.
    config = TrainConfig(data=DataConfig(holdout=0.0))
    checkpoint = open_checkpoint(MODEL_DIR, config.data)
    source, _ = open_spec("c.jsonl", two, None)
    encoded = checkpoint.processor.encode(source[0], 0, {"caption": "caption", "proxy": "absent"})
    assert encoded.tiles is None and np.all(encoded.prefixes["caption"].visual == -1)
    decode = checkpoint.processor.chat.tokenizer.decode
    caption, prompt = (decode(encoded.prefixes[name].tokens.tolist()) for name in ("caption", "proxy"))
    assert captioned[0]["caption"] in caption and captioned[0]["caption"] not in prompt and "Colour?" in prompt
    assert fingerprint(source, {}) != fingerprint(open_spec("a.jsonl", two, None)[0], {})


def test_captions_of_the_shapes_world_say_what_there_is() -> None:
    from mmrm_jax.data.shapes import scene_truth

    for i in range(20):
        scene, caption = scene_truth(0, "long", "test", i).scene, make_group(0, "long", "test", i).caption
        assert caption is not None and f"a {scene.size} {scene.colour} {scene.shape} " in caption
        assert {"centre": "in the centre"}.get(scene.position, scene.position) in caption


def test_an_environment_left_out_is_tested_on_alone() -> None:
    environments = (
        *(Environment(n, train=f"{n}:train", test=f"{n}:test") for n in ("long", "hedged", "short")),
        Environment("neutral", train=None, test="neutral:test"),
    )
    found = leave_out(MatrixConfig(environments=environments), "hedged").environments
    assert found == (
        Environment("long+short", train="long:train+short:train", test="long:test+short:test"),
        Environment("hedged", train=None, test="hedged:test"),
        Environment("neutral", train=None, test="neutral:test"),
    )
    some = tuple(dataclasses.replace(e, validation="v" if e.name == "long" else None) for e in environments)
    assert leave_out(MatrixConfig(environments=some), "hedged").environments[0].validation is None  # not of long alone


def test_a_matrix_says_which_tests_show_what_is_trained_on(two: Path) -> None:
    environments = (Environment("one", "a.jsonl", "b.jsonl"), Environment("two", "b.jsonl", "a.jsonl"))
    config = MatrixConfig(root=two, environments=environments, train=TrainConfig(data=DataConfig(holdout=0.0)))
    told = seen_in_training(open_data(config), {})
    assert [line.split(" have ")[0] for line in told] == [
        "training set one and test set two",
        "training set two and test set one",
    ]
    assert all("8 image(s)" in line and "8 of them with the same prompt" in line for line in told)
