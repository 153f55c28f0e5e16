"""From file to data set and back, random access, and a hold-out split by image."""

import dataclasses
import io
import json
import pickle
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrm_jax.data.records import DataError
from mmrm_jax.data.sources import MemorySource, fingerprint, identities, open_source, split_holdout
from mmrm_jax.data.tfds.features import decode_group, encode_group, group_features
from mmrm_jax.data.tfds.preference_files import prepare
from mmrm_jax.types import Comparison, Group


def picture(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def huge_png() -> bytes:
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    )
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def pair(index: int, image: str | None, **fields) -> dict:
    return {"id": f"r{index}", "prompt": f"p{index}", "img_path": image, "chosen": "good", "rejected": "bad", **fields}


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(picture(index))
    (tmp_path / "photo.jpg").write_bytes(picture(9, "JPEG"))
    return tmp_path


def groups_of(source) -> list[Group]:
    return [source[index] for index in range(len(source))]


def with_bytes(group: Group) -> Group:
    return dataclasses.replace(group, image=group.image.read_bytes()) if isinstance(group.image, Path) else group


def test_file_to_data_set_and_back(folder):
    ratings = [{"response": r, "annotations": {"H": {"Rating": n}}} for r, n in (("a", "1"), ("b", "2"), ("ü\n", "3"))]
    rows = [
        pair(0, "0.png", margin=0.5, tie=True),
        pair(1, "photo.jpg"),
        {"prompt": "many", "img_path": "1.png", "completions": ratings},
        pair(3, None),
        {"prompt": "score", "img_path": "2.png", "responses": ["x"]},
    ]
    train = write(folder / "train-a.jsonl", *rows)
    test = write(folder / "test.jsonl", *rows[:2])
    result = prepare([train, test], folder / "out")
    assert [(r.split, r.groups, r.comparisons, r.quarantined) for r in result.reports] == [
        ("train_a", 5, 6, 0),
        ("test", 2, 2, 0),
    ]
    assert result.quarantine_file == folder / "out" / "quarantine.jsonl" and result.quarantine_file.read_text() == ""
    for path, split in ((train, "train_a"), (test, "test")):
        direct, quarantined = open_source(path)
        assert quarantined == []
        for directory in (folder / "out", result.directory):
            prepared, none = open_source(directory, split)
            assert groups_of(prepared) == [with_bytes(group) for group in groups_of(direct)] and none == []
    assert len(open_source(folder / "out", "train_a[:40%]")[0]) == 2
    copy = pickle.loads(pickle.dumps(prepared))
    assert groups_of(copy) == groups_of(prepared)
    assert groups_of(pickle.loads(pickle.dumps(direct))) == groups_of(direct)


def test_bad_images_are_quarantined_and_strict_stops(folder):
    jpeg = (folder / "photo.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "huge.png").write_bytes(huge_png())
    (folder / "text.png").write_text("not an image")
    rows = [
        pair(1, "0.png"),
        pair(2, "cut.jpg"),
        pair(3, "huge.png"),
        pair(4, "missing.png"),
        pair(5, "text.png"),
        pair(6, "cut.jpg"),
        pair(7, "1.png", rejected="good"),
        "{broken",
        pair(9, "1.png"),
    ]
    path = write(folder / "f.jsonl", *rows)
    result = prepare({"mine": path}, folder / "out")
    (report,) = result.reports
    assert (report.split, report.groups, report.comparisons, report.quarantined) == ("mine", 2, 2, 7)
    assert [entry.row for entry in result.quarantined] == [2, 3, 4, 5, 6, 7, 8]
    reasons = {entry.row: entry.reason for entry in result.quarantined}
    assert "truncated" in reasons[2].lower() and reasons[6] == reasons[2]
    assert "too large" in reasons[3] and "missing image file" in reasons[4] and "header is damaged" in reasons[5]
    written = [json.loads(line) for line in result.quarantine_file.read_text().splitlines()]
    assert [(entry["row"], entry["id"]) for entry in written][:2] == [(2, "r2"), (3, "r3")]
    assert [group.id for group in groups_of(open_source(folder / "out")[0])] == ["r1", "r9"]
    with pytest.raises(DataError, match=r"f\.jsonl row 2: unusable image"):
        prepare([path], folder / "strict", strict=True)
    with pytest.raises(DataError, match=r"g\.jsonl row 2: missing image file"):
        prepare([write(folder / "g.jsonl", rows[0], rows[3])], folder / "strict", strict=True)
    assert not list((folder / "strict").rglob("*.array_record*"))


def test_prepare_refuses_what_it_cannot_do(folder):
    good = write(folder / "good.jsonl", pair(0, "0.png"))
    (folder / "bad.png").write_text("x")
    with pytest.raises(DataError, match=r"bad\.jsonl holds no usable row"):
        prepare([write(folder / "bad.jsonl", pair(0, "bad.png"))], folder / "a")
    with pytest.raises(DataError, match="no files"):
        prepare([], folder / "a")
    (folder / "sub").mkdir()
    assert "bad.png" in (folder / "a" / "quarantine.jsonl").read_text()
    other = folder / "sub" / "good.jsonl"
    with pytest.raises(DataError, match=rf"both become split 'good': .* good={good} good_2={other}$"):
        prepare([good, other], folder / "a")
    with pytest.raises(DataError, match="letters, digits"):
        prepare({"a b": good}, folder / "a")
    other.write_text(good.read_text())
    odd = write(folder / "odd=name.jsonl", pair(0, "0.png"))
    reports = prepare([f"good={good}", f"other={other}", odd], folder / "named", image_root=folder).reports
    assert [(r.split, r.file) for r in reports] == [("good", good), ("other", other), ("odd_name", odd)]
    prepare([good], folder / "a")
    with pytest.raises(DataError, match="already holds"):
        prepare([good], folder / "a")
    assert len(open_source(folder / "a")[0]) == 1


def test_open_source_names_what_is_missing(folder):
    good = write(folder / "good.jsonl", pair(0, "0.png"), "{")
    source, quarantined = open_source(good, environment="e")
    assert source[0].environment == "e" and [entry.row for entry in quarantined] == [2]
    with pytest.raises(DataError, match="splits apply|applies to prepared"):
        open_source(good, "train")
    with pytest.raises(DataError, match="does not exist"):
        open_source(folder / "nothing.jsonl")
    with pytest.raises(DataError, match="no prepared data set"):
        open_source(folder)
    prepare({"train": good, "test": good}, folder / "one")
    with pytest.raises(DataError, match="test, train: name one"):
        open_source(folder / "one")
    with pytest.raises(DataError, match="did you mean 'train'"):
        open_source(folder / "one", "trian")
    with pytest.raises(DataError, match="image_root"):
        open_source(folder / "one", "train", image_root=folder)
    prepare([good], folder / "two")
    with pytest.raises(DataError, match="several data sets"):
        open_source(folder, "train")


def test_features_keep_any_bytes_and_text():
    rng = random.Random(0)
    group = Group(
        "é", "p\u2028q", ("a", "b\0"), (Comparison(1, 0, 0.25, True),), rng.randbytes(999) + b"\0\0", "e", "f", 3
    )
    features = group_features()
    for item in (group, dataclasses.replace(group, image=None, comparisons=(), caption="ç")):
        stored = features.serialize_example(features.encode_example(encode_group(item)))
        assert decode_group(features.deserialize_example_np(stored)) == item


def memory(images) -> MemorySource:
    """One group a name; the same letter is the same image (bytes), None is text-only."""
    return MemorySource(
        tuple(
            Group(str(i), "same prompt" if name is None else f"p{i}", ("x",), (), name, "e", "f", i + 1)
            for i, name in enumerate(images)
        )
    )


def test_holdout_never_shares_an_image_and_ignores_order():
    rng = random.Random(3)
    names = [bytes([rng.randrange(40)]) for _ in range(200)] + [None] * 5
    source = memory(names)
    train, validation = split_holdout(source, 0.25, seed=1)
    assert sorted(train.indices + validation.indices) == list(range(205))
    seen, held = ({g.image for g in groups_of(view)} for view in (train, validation))
    assert not seen & held and 0.1 < len(held) / len(set(names)) < 0.4
    shuffled = list(range(205))
    rng.shuffle(shuffled)
    moved = MemorySource(tuple(source.groups[i] for i in shuffled))
    again = split_holdout(moved, 0.25, seed=1)[1]
    assert {g.id for g in groups_of(again)} == {g.id for g in groups_of(validation)}
    other = split_holdout(source, 0.25, seed=2)[1]
    assert {g.id for g in groups_of(other)} != {g.id for g in groups_of(validation)}
    assert groups_of(pickle.loads(pickle.dumps(validation))) == groups_of(validation)


def test_holdout_is_the_same_for_a_file_and_its_prepared_data_set(folder):
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    names = ["0.png", "1.png", "2.png", "3.png", "copy.png", "1.png"]
    path = write(folder / "f.jsonl", *(pair(i, name) for i, name in enumerate(names)))
    prepare([path], folder / "out")
    direct = split_holdout(open_source(path)[0], 0.5, seed=0)
    prepared = split_holdout(open_source(folder / "out")[0], 0.5, seed=0)
    assert [view.indices for view in direct] == [view.indices for view in prepared]
    sides = [next(k for k, view in enumerate(direct) if index in view.indices) for index in range(6)]
    assert sides[0] == sides[4] and sides[1] == sides[5] and set(sides) == {0, 1}


def test_groups_that_share_one_of_several_images_stay_together():
    """Also by way of others: a-b, b-c and c-d are one; the rest are drawn as if these were not there."""
    pairs = [(b"a", b"b"), (b"c", b"d"), (b"e", b"f"), (b"b", b"c"), *[(bytes([i]),) for i in range(30)]]
    groups = tuple(
        dataclasses.replace(memory([first]).groups[0], id=str(i), more_images=tuple(more))
        for i, (first, *more) in enumerate(pairs)
    )
    found = identities(MemorySource(groups))
    assert found[0] == found[1] == found[3] != found[2] and len(set(found)) == 32
    for seed in range(20):
        views = split_holdout(MemorySource(groups), 0.3, seed)
        assert len({index in views[0].indices for index in (0, 1, 3)}) == 1
        shown = [{image for group in groups_of(view) for image in group.images} for view in views]
        assert not shown[0] & shown[1] and shown[0] and shown[1]


def test_an_image_held_out_of_one_file_is_held_out_of_all():
    images = [f"image {i}".encode() for i in range(3000)]
    held = [
        {g.image for g in groups_of(split_holdout(memory(part), 0.2, seed=0)[1])}
        for part in (images, images[:2000], images[1000:])
    ]
    assert held[0] == held[1] | held[2] and held[1] & held[2]
    assert abs(len(held[0]) / 3000 - 0.2) < 0.02  # under three standard deviations of a fair draw


def test_holdout_edges(folder):
    source = memory([b"a", b"b", b"b"])
    for fraction in (0.001, 0.999):
        train, validation = split_holdout(source, fraction, seed=0)
        assert len(train) and len(validation)
    train, validation = split_holdout(source, 0.0, seed=0)
    assert train.indices == (0, 1, 2) and len(validation) == 0
    for fraction in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            split_holdout(source, fraction, seed=0)
    with pytest.raises(DataError, match="share one image"):
        split_holdout(memory([b"a", b"a"]), 0.5, seed=0)
    gone = MemorySource((dataclasses.replace(source[0], image=folder / "gone.png"), source[1]))
    with pytest.raises(DataError, match="f row 1: image .*gone.png cannot be read"):
        split_holdout(gone, 0.5, seed=0)


def test_fingerprint_is_of_content_and_order(folder):
    path = write(folder / "f.jsonl", pair(0, "0.png"), pair(1, "1.png"), pair(2, None))
    prepare([path], folder / "out")
    source = open_source(path)[0]
    first = fingerprint(source, {})
    assert first == fingerprint(source, {}) == fingerprint(open_source(folder / "out")[0], {})
    one, two, three = groups_of(source)
    changed = [
        (two, one, three),
        (one, two),
        (dataclasses.replace(one, id="x"), two, three),
        (dataclasses.replace(one, prompt="x"), two, three),
        (dataclasses.replace(one, responses=("good", "worse")), two, three),
        (dataclasses.replace(one, comparisons=(Comparison(1, 0),)), two, three),
        (dataclasses.replace(one, image=folder / "2.png"), two, three),
        (dataclasses.replace(one, image=folder / "gone.png"), two, three),
        (one, two, dataclasses.replace(three, environment="x")),
        (dataclasses.replace(one, environment="x"), two, three),
    ]
    found = {fingerprint(MemorySource(tuple(groups)), {}) for groups in changed}
    assert len(found) == len(changed) and first not in found
    renamed = [dataclasses.replace(group, environment="x") for group in groups_of(source)]
    assert fingerprint(MemorySource(tuple(renamed)), {}) == first, "what one environment is called does not matter"


def test_tensorflow_is_never_imported(folder):
    path = write(folder / "f.jsonl", pair(0, "0.png"))
    script = (
        "import sys\n"
        "from mmrm_jax.data.tfds.preference_files import prepare\n"
        "from mmrm_jax.data.sources import open_source\n"
        f"prepare([{str(path)!r}], {str(folder / 'out')!r})\n"
        f"open_source({str(folder / 'out')!r})[0][0]\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
