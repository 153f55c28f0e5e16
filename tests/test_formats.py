"""Every preference format: a row shaped like the real ones to a group, and rows that are not, with their reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_rows import (
    ALIGN,
    BAD,
    EMBEDDED,
    FACTORY,
    GOOD,
    LLAVA,
    MM_RLHF,
    PART,
    POVID,
    RLAIF_V,
    RLHF_V,
    SWIFT,
    TRL,
    gpt,
    message,
    picture,
    pictures_in,
    user,
    write,
)

from mmrm_jax.data.formats import FORMATS, format_of
from mmrm_jax.data.formats.fields import RowError
from mmrm_jax.data.records import DataError, read_groups, split_format
from mmrm_jax.data.scoring import read_scoring
from mmrm_jax.types import Comparison


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures_in(tmp_path)


ROWS = {  # format: (file, row, prompt, what its image is)
    "povid": ("f.json", POVID, "p", "i.png"),
    "rlhf-v": ("f.parquet", RLHF_V, "p", EMBEDDED["bytes"]),
    "rlaif-v": ("f.parquet", RLAIF_V, "p", EMBEDDED["bytes"]),
    "trl": ("f.jsonl", TRL, "p", "i.png"),
    "ms-swift": ("f.jsonl", SWIFT, "<image>p", "i.png"),
    "llama-factory": ("f.json", FACTORY, "<image>p", "i.png"),
    "llava": ("f.json", LLAVA, "p", "i.png"),
    "align-anything": ("f.jsonl", ALIGN, "p", "i.png"),
    "mm-rlhf": ("dpo_pairs.jsonl", MM_RLHF, "p", "i.png"),
    "pairs": ("f.jsonl", {**PART, "img_path": "i.png"}, "p", "i.png"),
}


@pytest.mark.parametrize("key", ROWS)
def test_a_row_of_each_format(folder: Path, key: str) -> None:
    """Recognised by its fields, and the same where the format is named; every response is listed for scoring."""
    name, row, prompt, image = ROWS[key]
    assert format_of(row).key == key
    file = write(folder / name, row)
    image = folder / image if isinstance(image, str) else image
    for spec in (file, f"{file}@{key}"):
        (group,), quarantined = read_groups(spec)
        assert (group.prompt, group.images, quarantined) == (prompt, (image,), [])
        ((winner, loser),) = [(c.winner, c.loser) for c in group.comparisons]
        assert (group.responses[winner], group.responses[loser]) == ("good", "bad")
        assert (group.file, group.row, group.environment) == (str(file), 1, file.stem)
        (scored,) = read_scoring(Path(spec), None)
        assert scored.group is not None and set(scored.group.responses) == {"good", "bad"}
        shown = row["image"]["path"] if isinstance(image, bytes) else "i.png"
        assert [(line["prompt"], line["img_path"]) for line in scored.lines] == [(prompt, shown)] * 2


def test_every_format_is_tried_here() -> None:
    assert {form.key for form in FORMATS} - set(ROWS) == {"vlfeedback", "scoring"}  # those are in test_records.py


def without(row: dict, *names: str) -> dict:
    return {name: value for name, value in row.items() if name not in names}


def texts(*messages: dict) -> list[dict]:
    return [{"role": m["role"], "content": m["content"][0]["text"]} for m in messages]


ASKED = message("user", ..., "p")
VARIANTS = {  # (row, prompt, responses, comparisons)
    "trl flat": ({**PART, "images": ["i.png"], "margin": 0.5}, "p", ("good", "bad"), (Comparison(0, 1, 0.5),)),
    "trl image": ({**without(TRL, "images"), "image": "i.png"}, "p", ("good", "bad"), (Comparison(0, 1),)),
    "trl text prompt": ({**TRL, "prompt": "p"}, "p", ("good", "bad"), (Comparison(0, 1),)),
    "trl implicit": (
        {"images": ["i.png"], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        "p",
        ("good", "bad"),
        (Comparison(0, 1),),
    ),
    "trl text messages": (
        {**TRL, "chosen": texts(GOOD), "rejected": texts(BAD), "prompt": texts(message("user", "p"))},
        "p",
        ("good", "bad"),
        (Comparison(0, 1),),
    ),
    "trl image last": ({**TRL, "prompt": [message("user", "p", ...)]}, "p\n<image>", ("good", "bad"), None),
    "swift several": ({**SWIFT, "rejected_response": ["b", "c"]}, "<image>p", ("good", "b", "c"), (0, 1)),
    "swift messages": (
        {**without(SWIFT, "rejected_response"), "rejected_messages": [SWIFT["messages"][0], texts(BAD)[0]]},
        "<image>p",
        ("good", "bad"),
        None,
    ),
    "swift inline": (
        {**SWIFT, "messages": [{"role": "user", "content": "In <image> what?"}, texts(GOOD)[0]]},
        "In \n<image>\n what?",
        ("good", "bad"),
        None,
    ),
    "rlhf-v path": ({**RLHF_V, "image": {"bytes": None, "path": "i.png"}}, "p", ("good", "bad"), None),
    "mm-rlhf tie": ({**MM_RLHF, "is_tie": True}, "p", ("good", "bad"), (Comparison(0, 1, 0.0, True),)),
    "align first": ({**ALIGN, "overall_response": "1"}, "p", ("bad", "good"), (Comparison(0, 1),)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_else_a_format_allows(folder: Path, name: str) -> None:
    row, prompt, responses, comparisons = VARIANTS[name]
    (group,), quarantined = read_groups(write(folder / "f.jsonl", row))
    assert (group.prompt, group.responses, group.images, quarantined) == (prompt, responses, (folder / "i.png",), [])
    if comparisons == (0, 1):
        comparisons = (Comparison(0, 1), Comparison(0, 2))
    assert group.comparisons == (comparisons or (Comparison(0, 1),))


def test_text_only_and_several_images(folder: Path) -> None:
    both = ["i.png", "j.png"]
    rows = [
        {**without(SWIFT, "images"), "messages": texts(message("user", "p"), GOOD)},
        {**SWIFT, "images": both, "messages": texts(message("user", "A: <image> B: <image>?"), GOOD)},
        {**TRL, "images": both, "prompt": [message("user", ..., ..., "p")]},
        {**PART, "image": both},
        {**FACTORY, "conversations": [user("<image><image>p")], "images": both},
    ]
    groups, quarantined = read_groups(write(folder / "f.jsonl", *rows))
    assert quarantined == [] and [len(g.images) for g in groups] == [0, 2, 2, 2, 2]
    assert groups[1].images == (folder / "i.png", folder / "j.png")
    assert groups[2].prompt == "<image>\n<image>\np"
    assert [row.lines[0]["img_path"] for row in read_scoring(folder / "f.jsonl", None)] == [None, *[both] * 4]


BROKEN = {
    "trl assistant's image": (
        {**TRL, "prompt": [message("user", "q"), message("assistant", ..., "a"), message("user", "p")]},
        "image of the assistant: 1 in turns before 'prompt[2].content'",
    ),
    "swift assistant's image": (
        {**SWIFT, "messages": [message("user", "q"), GOOD, message("user", "p"), GOOD]},
        "wrong type: 'messages[0].content' is a list",
    ),
    "factory assistant's image": (
        {**FACTORY, "conversations": [user("q"), gpt("<image>"), user("p")]},
        "image of the assistant: 1 in turns before 'conversations[2].value'",
    ),
    "history beside a question": (
        {**without(RLAIF_V, "image"), "image": "i.png", "history": ["q", "a"]},
        "turns not read: 'history' has turns that this format does not read",
    ),
    "povid turns": ({**POVID, "conversations": "x"}, "wrong type: 'conversations' is a text; it must be a list"),
    "povid turn": (
        {**POVID, "conversations": [{"from": "human"}, gpt("good")]},
        "no turn: 'conversations[0]' has from; a turn must have 'role' and 'content'",
    ),
    "povid speaker": ({**POVID, "conversations": [user("p"), user("good")]}, "'conversations' ends with a turn of 'us"),
    "povid prompts": (
        {**POVID, "rejected_conversations": [user("q"), gpt("bad")]},
        "different prompts: 'conversations' and 'rejected_conversations' do not ask the same",
    ),
    "povid twice": (
        {**POVID, "conversations": [user("p"), user("q"), gpt("good")]},
        "wrong speaker: turn 2 of 'conversations' is of 'user'; it must be the assistant's (gpt)",
    ),
    "povid long": (
        {**POVID, "conversations": [user("p"), gpt("a"), gpt("good")]},
        "wrong speaker: 'conversations' has two turns of the assistant at its end",
    ),
    "povid bare": (
        {**POVID, "conversations": [gpt("good")]},
        "no prompt: 'conversations' has no turn before the answer",
    ),
    "pairs history": ({**PART, "image": "i.png", "history": ["q"]}, "wrong turns: 1 before the prompt"),
    "pairs said": ({**PART, "image": "i.png", "history": ["q", 3]}, "wrong type: 'history[1]' is a number"),
    "povid empty": (
        {**POVID, "rejected_conversations": [user("p"), gpt(" ")]},
        "empty response: 'rejected_conversations[1].value' has no text",
    ),
    "povid image": (without(POVID, "image"), "missing field: the row has no 'img_path'"),
    "rlhf-v text": ({**RLHF_V, "image": "i.png", "text": "{"}, "broken JSON text: 'text' cannot be read"),
    "rlhf-v list": ({**RLHF_V, "image": "i.png", "text": "[]"}, "wrong type: 'text' holds a list"),
    "rlhf-v field": (
        {**RLHF_V, "image": "i.png", "text": '{"question": "p", "chosen": "good"}'},
        "missing field: the JSON object in 'text' has no 'rejected'; fields found: chosen, question",
    ),
    "rlaif-v image": ({**RLAIF_V, "image": {"bytes": None, "path": None}}, "wrong type: 'image' is None"),
    "rlaif-v prompt": ({**RLAIF_V, "image": "i.png", "question": 3}, "wrong type: 'question' is a number"),
    "trl part": (
        {**TRL, "prompt": [{"role": "user", "content": [{"type": "audio"}]}]},
        "wrong type: 'prompt[0].content[0]' is {'type': 'audio'}; a part must be",
    ),
    "trl places": (
        {**TRL, "prompt": [message("user", ..., ..., "p")]},
        "images and places differ: 'prompt[0].content' has 2 <image> but the row has 1 image(s)",
    ),
    "trl text": (
        {**TRL, "prompt": [message("user", ..., "What does <image> mean?")]},
        "image place in a text: a text part of 'prompt[0].content' says <image>",
    ),
    "image forgotten": (
        {**PART, "img_path": None, "prompt": "<image>\nWhat?"},
        "image forgotten: 'prompt' has a place",
    ),
    "trl same": ({**TRL, "rejected": [GOOD]}, "identical responses: 'chosen[0].content' and 'rejected[0].content'"),
    "trl system": (
        {**TRL, "prompt": [message("system", "s"), ASKED]},
        "wrong speaker: turn 1 of 'prompt' is of 'system'; it must be the user's (human); the chat templa",
    ),
    "trl answer": ({**TRL, "chosen": [GOOD, ASKED]}, "'chosen' has 2 turns after the prompt; a response is one turn"),
    "trl prompt": ({**without(PART, "prompt"), "images": []}, "missing field: the row has no 'prompt'"),
    "swift images": ({**SWIFT, "rejected_images": ["j.png"]}, "images differ: 'rejected_images' gives"),
    "swift places": ({**SWIFT, "images": []}, "'messages[0].content' has 1 <image> but the row has 0 image(s)"),
    "swift rejected": ({**SWIFT, "rejected_response": []}, "wrong type: 'rejected_response' is empty; it must be"),
    "swift prompts": (
        {**without(SWIFT, "rejected_response"), "rejected_messages": [texts(BAD)[0], texts(BAD)[0]]},
        "different prompts: 'messages' and 'rejected_messages'",
    ),
    "factory places": ({**FACTORY, "conversations": [user("p")]}, "has 0 <image> but the row has 1 image(s)"),
    "factory chosen": ({**FACTORY, "chosen": {"from": "gpt"}}, "missing field: 'chosen' has no 'value'; it has from"),
    "llava neither": ({**LLAVA, "preference": 3}, "wrong value: 'preference' is 3; it must be 1 or 2"),
    "llava missing": (without(LLAVA, "preference"), "missing field: the row has no 'preference'; fields found: conv"),
    "align": ({**ALIGN, "overall_response": True}, "wrong value: 'overall_response' is True; it must be 1 or 2"),
    "pairs video": ({**PART, "img_path": "i.png", "videos": ["v.mp4"]}, "video: 'videos' is ['v.mp4']; only images"),
    "trl audio": ({**TRL, "audio": "a.wav"}, "audio: 'audio' is 'a.wav'; only images are read"),
    "a system field": (
        {**FACTORY, "system": "Answer in French."},
        "system: 'system' is 'Answer in French.', which would",
    ),
    "mm-rlhf video": ({**PART, "video": "v.mp4"}, "video: 'video' is 'v.mp4'; only images are read"),
    "mm-rlhf tie": ({**MM_RLHF, "is_tie": 1}, "wrong type: 'is_tie' is 1; it must be true or false"),
    "url": (
        {**PART, "image": "https://example.org/i.png"},
        "image by URL: 'image' is 'https://example.org/i.png'",
    ),
    "data url": ({**PART, "image": "data:image/png;base64,AAAA"}, "image by URL: 'image' is 'data:image"),
    "places": (
        {**PART, "prompt": "<image> and?", "image": ["i.png", "j.png"]},
        "'prompt' has 1 <image> but the row has 2",
    ),
    "second image": ({**PART, "images": ["i.png", "no.png"]}, "missing image file: 'images[1]' points to"),
    "swift other": (
        {**without(SWIFT, "rejected_response"), "rejected_images": ["i.png"]},
        "missing field: the row has no 'rejected_response'",
    ),
    "bytes as text": (
        {**PART, "image": {"bytes": "iVBORw0KGgo=", "path": "i.png"}},
        "'image.bytes' is a text; only Parq",
    ),
    "null in images": ({**PART, "images": ["i.png", None]}, "wrong type: 'images[1]' is None"),
    "near swift": (
        {"messages": [], "images": []},
        "the nearest format is ms-swift, which also needs 'rejected_response' or 'rejected_messages' or",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_quarantined_with_its_reason(folder: Path, name: str) -> None:
    row, reason = BROKEN[name]
    file = write(folder / "f.jsonl", {**PART, "img_path": "i.png"}, row)
    (group,), (entry,) = read_groups(file)
    assert group.row == 1 and (entry.file, entry.row) == (str(file), 2)
    assert reason in entry.reason
    error, *_ = [line["error"] for line in read_scoring(file, None)[1].lines if "error" in line] or [None]
    assert error is None or ": " in error  # rows that only cannot be compared can be scored


def test_a_named_format_is_not_guessed(folder: Path) -> None:
    """What a row lacks is said of the format that was named, and a name that is none is refused."""
    file = write(folder / "f.jsonl", {**PART, "img_path": "i.png"})
    with pytest.raises(DataError, match=r"missing field: POVID needs 'conversations' and .*fields found: chosen, img_"):
        read_groups(f"{file}@povid")
    with pytest.raises(DataError, match=r"there is no format 'povi'; did you mean 'povid'\?"):
        read_groups(f"{file}@povi")
    with pytest.raises(RowError, match="ms-swift needs 'messages' and 'rejected_response' or 'rejected_messages'"):
        format_of({}, next(form for form in FORMATS if form.key == "ms-swift"))
    odd = write(folder / "a@b.jsonl", {**PART, "img_path": "i.png"})
    assert split_format(odd) == (odd, None) and len(read_groups(odd)[0]) == 1


HOSTILE = (None, True, -1, 10**400, float("nan"), "", "<image>", "\ud800", [], {}, [[]], [{}], ["i.png"], {"bytes": 3})


def damaged(tree: Any, rng: np.random.Generator) -> Any:
    """The row with one of its parts, at random depth, lost or exchanged for a hostile value."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.9:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key, copy = keys[rng.integers(len(keys))], tree.copy()
        if rng.random() < 0.2:
            del copy[key]
        else:
            copy[key] = damaged(tree[key], rng)
        return copy
    return HOSTILE[rng.integers(len(HOSTILE))]


@pytest.mark.parametrize("key", ROWS)
def test_no_damage_is_a_crash_or_a_silent_loss(folder: Path, key: str) -> None:
    rng = np.random.default_rng(0)
    row = {**ROWS[key][1], "image": "i.png"} if key in ("rlhf-v", "rlaif-v") else ROWS[key][1]
    rows = [row, *(damaged(damaged(row, rng) or row, rng) for _ in range(300))]
    for spec in (write(folder / "f.jsonl", *rows), f"{folder / 'f.jsonl'}@{key}"):
        groups, quarantined = read_groups(spec)
        assert sorted([g.row for g in groups] + [q.row for q in quarantined]) == list(range(1, 302))
        assert 1 < len(groups) < 300 and all(": " in q.reason for q in quarantined)
        scored = read_scoring(Path(spec), None)
        assert [s.row for s in scored] == list(range(1, 302)) and all(s.lines for s in scored)
        assert {g.row for g in groups} <= {s.row for s in scored if s.group is not None}


# ---- Parquet


def test_parquet_rows_are_numbered_over_row_groups(folder: Path) -> None:
    rows = [{**RLAIF_V, "image": {"bytes": picture(i), "path": f"{i}.png"}} for i in range(150)]
    rows[70]["chosen"] = ""
    rows[90]["image"] = {"bytes": b"", "path": "x"}
    file = write(folder / "f.parquet", *rows)
    groups, quarantined = read_groups(file)
    assert [g.image for g in groups[:2]] == [picture(0), picture(1)] and groups[-1].row == 150
    assert [(q.row, q.reason.split(":")[0]) for q in quarantined] == [(71, "empty response"), (91, "empty image")]


def test_parquet_with_messages(folder: Path) -> None:
    """Parts of both kinds have the fields of either; images are structs in a list."""
    parts = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "p"}]
    shown = [{"bytes": picture(i), "path": None} for i in range(2)]
    row = {**TRL, "images": shown, "prompt": [{"role": "user", "content": parts}], "margin": None}
    (group,), quarantined = read_groups(write(folder / "f.parquet", row))
    assert quarantined == [] and group.images == (picture(0), picture(1)) and group.image_name is None
    assert group.prompt == "<image>\n<image>\np" and group.comparisons == (Comparison(0, 1),)


def test_parquet_with_vlfeedback_as_lists_and_text_that_is_none(folder: Path) -> None:
    """The Hub's own files have lists of the completions' fields; a null is no number."""
    rated = [{"Helpfulness": {"Rating": r, "Rationale": ""}} for r in ("5", "N/A", None, "1")]
    completions = {"annotations": rated, "model": ["m"] * 4, "response": list("abcd")}
    row = {"id": "v", "prompt": "p", "models": ["m"], "completions": completions, "img_path": "i.png"}
    (group,), quarantined = read_groups(write(folder / "f.parquet", row))
    assert group.responses == ("a", "d") and group.comparisons == (Comparison(0, 1),)
    assert [q.reason.split(":")[0] for q in quarantined] == ["unrated response"] * 2
    column = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")]
    )
    table = pa.table(
        {"prompt": pa.concat_arrays([pa.array(["p"]), column]), "chosen": ["x"] * 2, "rejected": ["y"] * 2}
    )
    pq.write_table(table.append_column("image", pa.array([None, None], pa.string())), folder / "g.parquet")
    (group,), (entry,) = read_groups(folder / "g.parquet")
    assert group.row == 1 and (entry.row, entry.reason.split(":")[0]) == (2, "broken text")


def test_a_parquet_file_that_is_broken_is_named(folder: Path) -> None:
    whole = write(folder / "whole.parquet", *[RLAIF_V] * 6).read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 4 : len(whole) // 2] = bytes(len(whole) // 2 - len(whole) // 4)
    for name, content in {"cut": whole[:-50], "text": b"{}", "empty": b"", "middle": bytes(middle)}.items():
        (folder / f"{name}.parquet").write_bytes(content)
        with pytest.raises(
            DataError, match=rf"{name}\.parquet is not a whole Parquet file: .*; download or write it again"
        ):
            read_groups(folder / f"{name}.parquet")
    with pytest.raises(DataError, match=r"gone\.parquet does not exist"):
        read_groups(folder / "gone.parquet")
