"""Rows of several turns in every preference format: what comes before the prompt is its history."""

from __future__ import annotations

from pathlib import Path

import pytest
from format_rows import FACTORY, LLAVA, PART, POVID, SWIFT, TRL, gpt, message, pictures_in, user, write

from mmrm_jax.data.records import read_groups
from mmrm_jax.data.scoring import read_scoring
from mmrm_jax.data.sources import MemorySource, fingerprint, group_identity
from mmrm_jax.data.tfds.features import decode_group, encode_group


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures_in(tmp_path)


SAID = ["q", "a"]


def test_turns_before_the_prompt_are_its_history(folder: Path) -> None:
    """In every format that has turns: images stand in the first of them, or in the one that says so."""
    first = [user("<image>\nq"), gpt("a")]
    q, a, p = (dict(zip(("role", "content"), m)) for m in (("user", "<image>q"), ("assistant", "a"), ("user", "p")))
    rows = [
        {**POVID, "conversations": [*first, user("p"), gpt("good")]},
        {**LLAVA, "conversations": [*first, user("p")]},
        {**FACTORY, "conversations": [*first, user("p")]},
        {**FACTORY, "conversations": [user("q"), gpt("a"), user("p <image> ?")]},
        {**SWIFT, "messages": [q, a, p, SWIFT["messages"][1]]},
        {**TRL, "prompt": [message("user", ..., "q"), a, p]},
        {**PART, "image": "i.png", "history": SAID},
        {"prompt": "p", "img_path": "i.png", "responses": ["good", "bad"], "history": SAID, "rejected_images": None},
    ]
    rows[0]["rejected_conversations"] = [*first, user("p"), gpt("bad")]
    groups, quarantined = read_groups(write(folder / "f.jsonl", *rows))
    assert quarantined == [] and [len(g.images) for g in groups] == [1] * len(rows)
    assert [g.history for g in groups] == [
        *[("<image>\nq", "a")] * 3,
        ("q", "a"),
        ("<image>q", "a"),
        ("<image>\nq", "a"),
        *[("q", "a")] * 2,
    ]
    assert [g.prompt for g in groups] == ["p", "p", "p", "p \n<image>\n ?", "p", "p", "p", "p"]
    assert groups[-1].asked == "User: q\nAssistant: a\nUser: p"
    assert all(decode_group(encode_group(g)).history == g.history for g in groups)
    lines = [row.lines[0] for row in read_scoring(folder / "f.jsonl", None)]
    assert [(line["prompt"], tuple(line["history"])) for line in lines] == [(g.prompt, g.history) for g in groups]


def test_an_image_stays_in_the_turn_that_shows_it(folder: Path) -> None:
    said, p = [user("q"), gpt("a")], {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "p"}]}
    rows = [
        {**LLAVA, "conversations": [*said, user("p\n<image>")]},
        {**LLAVA, "image": ["i.png", "j.png"], "conversations": [user("<image>q"), gpt("a"), user("p\n<image>")]},
        {**TRL, "prompt": [message("user", "q"), message("assistant", "a"), p]},
        {**PART, "images": ["i.png"], "history": SAID},
    ]
    groups, quarantined = read_groups(write(folder / "f.jsonl", *rows))
    assert quarantined == [] and [len(g.images) for g in groups] == [1, 2, 1, 1]
    assert [g.turns for g in groups] == [
        ("q", "a", "<image>\np"),
        ("<image>\nq", "a", "<image>\np"),
        ("q", "a", "<image>\np"),
        ("q", "a", "p"),
    ]


def test_turns_are_told_from_a_prompt_that_spells_them(folder: Path) -> None:
    rows = [
        {**PART, "img_path": None, "id": "1", "history": SAID},
        {**PART, "img_path": None, "id": "1", "prompt": "User: q\nAssistant: a\nUser: p"},
    ]
    groups, _ = read_groups(write(folder / "f.jsonl", *rows))
    assert groups[0].asked == groups[1].asked and groups[0].turns != groups[1].turns
    assert group_identity(groups[0], {}) != group_identity(groups[1], {})
    assert len({fingerprint(MemorySource((group,)), {}) for group in groups}) == 2
