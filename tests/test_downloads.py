"""Public data sets from files that were downloaded by hand: split by image, written as TFDS, and accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from commands import run
from test_formats import POVID, RLAIF_V, RLHF_V, gpt, picture, user, write
from test_records import completions

from mmrm_jax.data.overlap import describe_overlap
from mmrm_jax.data.records import DataError
from mmrm_jax.data.sources import open_source
from mmrm_jax.data.tfds.downloads import Povid, RlaifV, RlhfV, VlFeedback, build_downloaded
from mmrm_jax.data.tfds.preference_files import prepare


def images(source) -> list[bytes]:
    return [source[i].image for i in range(len(source))]


def fill(folder: Path, name: str) -> None:
    """Eight rows of four images each, and one that cannot be used."""
    folder.mkdir()
    shown = [i % 4 for i in range(8)]
    for i in range(4):
        (folder / f"{i}.png").write_bytes(picture(i))
    rated = {"prompt": "p", "completions": completions(("a", ("5",)), ("b", ("3",)), ("c", ("N/A",)))}
    rows = {
        "vl_feedback": [{**rated, "id": str(i), "img_path": f"{k}.png"} for i, k in enumerate(shown)],
        "povid": [{**POVID, "id": str(i), "image": f"{k}.png"} for i, k in enumerate(shown)],
        "rlhf_v": [{**RLHF_V, "image": {"bytes": picture(k), "path": None}} for k in shown],
        "rlaif_v": [{**RLAIF_V, "image": {"bytes": picture(k), "path": None}} for k in shown],
    }[name]
    if name == "povid":
        rows.append({**POVID, "image": "0.png", "rejected_conversations": [user("p"), gpt("")]})
    elif name != "vl_feedback":
        rows.append({**rows[0], "image": {"bytes": b"no image", "path": None}})
    if name == "rlaif_v":  # several files, one without an image of the validation split
        write(folder / "b.parquet", rows.pop(), rows[0])
    write(folder / {"vl_feedback": "a.jsonl", "povid": "a.json"}.get(name, "a.parquet"), *rows)


@pytest.mark.parametrize("builder", [VlFeedback, Povid, RlhfV, RlaifV])
def test_a_public_data_set_is_split_by_image(tmp_path: Path, builder) -> None:
    fill(tmp_path / "files", builder.name)
    result = build_downloaded(builder, tmp_path / "files", tmp_path / "out", validation=0.3, seed=1)
    train, validation = (open_source(tmp_path / "out", split)[0] for split in ("train", "validation"))
    assert len(train) + len(validation) == 8 + (builder is RlaifV)
    assert set(images(train)) | set(images(validation)) == {picture(i) for i in range(4)}
    assert not set(images(train)) & set(images(validation)) and images(validation)
    assert result.overlaps == () and result.duplicates_file.read_text() == ""
    assert train[0].prompt == "p" and len(train[0].comparisons) == 1
    assert {source[i].environment for source in (train, validation) for i in range(len(source))} == {builder.name}
    reasons = [entry.reason.split(":")[0] for entry in result.quarantined]
    want = {"vl_feedback": ["unrated response"] * 8, "povid": ["empty response"]}
    assert reasons == want.get(builder.name, ["unusable image"])
    assert sum(r.groups for r in result.reports) == len(train) + len(validation)
    assert sum(r.quarantined for r in result.reports) == len(reasons)


def test_builders_go_by_their_names_and_say_where_files_come_from(tmp_path: Path) -> None:
    fill(tmp_path / "files", "povid")
    made = tfds.builder("povid", data_dir=str(tmp_path / "tfds"), file_format="array_record")
    assert type(made) is Povid and [tfds.builder_cls(b.name) for b in (VlFeedback, RlhfV, RlaifV)]
    assert "COCO" in Povid.MANUAL_DOWNLOAD_INSTRUCTIONS
    made.download_and_prepare(
        download_dir=str(tmp_path / "none"), download_config=tfds.download.DownloadConfig(manual_dir=tmp_path / "files")
    )
    assert set(made.info.splits) == {"train", "validation"}
    for folder in (tmp_path / "gone", tmp_path / "files"):
        with pytest.raises(DataError, match=r"(no directory|has no \*\.parquet)\. Download the Parquet file"):
            build_downloaded(RlhfV, folder, tmp_path / "out")
    with pytest.raises(ValueError, match="validation is 1"):
        build_downloaded(Povid, tmp_path / "files", tmp_path / "out", validation=1)
    whole = build_downloaded(Povid, tmp_path / "files", tmp_path / "whole", validation=0)
    assert [(r.split, r.groups) for r in whole.reports] == [("train", 8)]


def test_what_splits_have_in_common_is_said(tmp_path: Path) -> None:
    """By the bytes of images, whatever they are called and wherever they are; text-only rows by their prompts."""
    for name, seed in (("a", 0), ("b", 1), ("c", 0), ("d", 2)):
        (tmp_path / f"{name}.png").write_bytes(picture(seed))
    part = {"chosen": "good", "rejected": "bad"}
    train = [{**part, "prompt": p, "img_path": i} for p, i in (("p", "a.png"), ("q", "b.png"), ("alone", None))]
    embedded = {**RLAIF_V, "image": {"bytes": picture(1), "path": None}}
    test = [{**part, "prompt": p, "img_path": i} for p, i in (("p", "c.png"), ("q", "d.png"), ("alone", None))]
    files = [write(tmp_path / "train.jsonl", *train), write(tmp_path / "test.jsonl", *test)]
    result = prepare([*files, write(tmp_path / "more.parquet", embedded)], tmp_path / "out")
    assert [(o.first, o.second, o.images) for o in result.overlaps] == [("train", "test", 2), ("train", "more", 1)]
    assert describe_overlap(result.overlaps[0]) == (
        "train and test have 2 image(s), or prompts without one, in common: 2 group(s) of test, 2 of them with the "
        f"same prompt (first: {files[1]} row 1)"
    )
    lines = [json.loads(line) for line in result.duplicates_file.read_text().splitlines()]
    assert [(d["split"], d["row"], d["also_in"], d["same_prompt"]) for d in lines] == [
        ("test", 1, "train", True),
        ("test", 3, "train", True),
        ("more", 1, "train", False),
    ]


def test_the_command_says_what_splits_share(capsys, tmp_path: Path) -> None:
    fill(tmp_path / "files", "rlaif_v")
    files = [tmp_path / "files" / "a.parquet", f"test={tmp_path / 'files' / 'b.parquet'}@rlaif-v"]
    status, out = run(capsys, "prepare", *files, "--out", tmp_path / "out", "--json", tmp_path / "r.json")
    assert status == 0 and "a and test have 1 image(s)" in " ".join(out.split()) and "duplicates.jsonl" in out
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["overlaps"] == [{"first": "a", "second": "test", "images": 1, "groups": 1}]


def test_prepared_groups_keep_all_their_images(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    part = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    file = write(tmp_path / "f.jsonl", {**part, "images": ["0.png", "1.png"]}, {**part, "image": "2.png"})
    prepare([f"{file}@pairs"], tmp_path / "out")
    source = open_source(tmp_path / "out")[0]
    assert [source[i].images for i in range(2)] == [(picture(0), picture(1)), (picture(2),)]
    (tmp_path / "1.png").write_bytes(b"x")
    result = prepare([file], tmp_path / "again")
    assert [(q.row, q.reason.split(":")[0]) for q in result.quarantined] == [(1, "unusable image")]
