"""Raw rows to groups: the golden pairs, and a reason for everything that is left out."""

import json
import random
from pathlib import Path

import pytest
from goldens import fixtures

from mmrm_jax.data.formats.vlfeedback import mean_rating, rated_pairs
from mmrm_jax.data.records import DataError, read_groups, summarise_quarantine, write_quarantine
from mmrm_jax.types import Comparison, Group, Quarantined

PAIRS = fixtures("pairs", "pairs.json")
PAIR = {"id": "a", "prompt": "p", "img_path": "i.png", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def write(tmp_path):
    """Write rows (objects, or raw lines) as JSONL beside an existing image i.png."""
    (tmp_path / "i.png").write_bytes(b"image")

    def write_rows(*rows, name="prefs.jsonl") -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return tmp_path / name

    return write_rows


def completions(*rated):
    """[(response, (rating, ...)), ...] as VLFeedback's list of objects."""
    return [
        {"model": "m", "response": response, "annotations": {f"A{i}": {"Rating": r} for i, r in enumerate(ratings)}}
        for response, ratings in rated
    ]


def vlfeedback(value, **fields):
    return {"id": "v", "prompt": "p", "img_path": "i.png", "completions": value, **fields}


def test_pairwise_row(write, tmp_path):
    path = write(PAIR, "", "   ", {**PAIR, "id": 7, "img_path": None, "margin": 0.5, "tie": True})
    groups, quarantined = read_groups(path)
    comparison = (Comparison(0, 1),)
    assert groups == [
        Group("a", "p", ("good", "bad"), comparison, tmp_path / "i.png", "prefs", str(path), 1),
        Group("7", "p", ("good", "bad"), (Comparison(0, 1, 0.5, True),), None, "prefs", str(path), 4),
    ]
    assert quarantined == []


def test_what_has_a_meaning_is_not_refused(write):
    """A blank prompt beside an image asks about the image alone; the margin of a tie is not read."""
    groups, quarantined = read_groups(write({**PAIR, "prompt": ""}, {**PAIR, "margin": -1, "tie": True}))
    assert [group.prompt for group in groups] == ["", "p"] and quarantined == []


def test_image_root_and_environment(write, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "j.png").write_bytes(b"")
    (group,), _ = read_groups(
        write({**PAIR, "img_path": "j.png"}), image_root=tmp_path / "pictures", environment="povid"
    )
    assert group.image == tmp_path / "pictures" / "j.png" and group.environment == "povid"


def test_scoring_input_has_no_comparisons_and_may_repeat_a_response(write):
    (group,), _ = read_groups(write({"prompt": "p", "img_path": "i.png", "responses": ["x", "y", "x"]}))
    assert group.responses == ("x", "y", "x") and group.comparisons == ()
    assert group.id == "prefs-1"


@pytest.mark.parametrize("folder", PAIRS)
def test_pairs_equal_the_golden(folder):
    golden = json.loads((folder / "pairs.json").read_text())
    assert len(golden["rows"]) == len(golden["expected_per_row"]) == 9
    for row, expected in zip(golden["rows"], golden["expected_per_row"], strict=True):
        responses = row["completions"]["response"]
        pairs = rated_pairs([mean_rating(annotations) for annotations in row["completions"]["annotations"]])
        assert [responses[winner] for winner, _ in pairs] == expected.get("chosen", []), row["prompt"]
        assert [responses[loser] for _, loser in pairs] == expected.get("rejected", []), row["prompt"]


@pytest.mark.parametrize("folder", PAIRS)
def test_reading_the_golden_rows_gives_its_pairs_or_a_reason(folder, write, tmp_path):
    golden = json.loads((folder / "pairs.json").read_text())
    for index in range(9):
        (tmp_path / f"i{index}").write_bytes(b"")
    groups, quarantined = read_groups(write(*golden["rows"]))
    pairs = [(g.prompt, g.responses[c.winner], g.responses[c.loser]) for g in groups for c in g.comparisons]
    want = golden["expected_all"]
    assert pairs == [
        pair for pair in zip(want["prompt"], want["chosen"], want["rejected"], strict=True) if pair[0] != "p7"
    ]
    reasons = {entry.row: entry.reason.split(":")[0] for entry in quarantined}
    # p1, one of whose responses is unrated, p3 ... p6, and p7 with its identical responses
    assert list(reasons) == [2, 4, 5, 6, 7, 8] and len(quarantined) == 6
    assert (reasons[2], reasons[8]) == ("unrated response", "no comparisons left")
    assert "identical responses" in quarantined[-1].reason


@pytest.mark.parametrize(
    ("annotations", "mean"),
    [
        ({"H": {"Rating": "1e0"}, "E": {"Rating": " 4 "}, "V": {"Rating": 5}}, 10 / 3),
        ({"H": {"Rating": "2.5"}}, 2.5),
        ({"H": {"Rating": "3"}, "E": {"Rating": "N/A"}}, None),
        ({"H": {"Rating": "nan"}}, None),
        ({"H": {"Rating": "inf"}}, None),
        ({"H": {"Rating": 10**400}}, None),
        ({"H": {"Rating": None}}, None),
        ({"H": {"Rating": ["3"]}}, None),
        ({"H": {"Rating": "3"}, "E": None}, None),
        ({"H": {"Rationale": "x"}}, None),
        ({}, None),
        (None, None),
        ("5", None),
    ],
)
def test_mean_rating(annotations, mean):
    assert mean_rating(annotations) == mean


def test_rated_pairs_against_a_plain_definition():
    rng = random.Random(0)
    for _ in range(200):
        ratings = [rng.choice([None, 1.0, 2.0, 3.0]) for _ in range(rng.randint(0, 6))]
        wins = {
            (i, j)
            for i, a in enumerate(ratings)
            for j, b in enumerate(ratings)
            if a is not None and b is not None and a > b
        }
        pairs = rated_pairs(ratings)
        assert set(pairs) == wins and len(pairs) == len(wins)
        assert [sorted(pair) for pair in pairs] == sorted(sorted(pair) for pair in pairs)


def test_vlfeedback_keeps_only_compared_responses(write):
    rows = completions(("a", ("5", "4")), ("unrated", ("5", "N/A")), ("b", ("1", "2")), ("c", ("5", "5")))
    as_lists = {key: [row[key] for row in rows] for key in ("response", "annotations", "model")}
    for value in (rows, as_lists):
        (group,), quarantined = read_groups(write(vlfeedback(value, models=["m"])))
        assert group.responses == ("a", "b", "c")
        assert group.comparisons == (Comparison(0, 1), Comparison(2, 0), Comparison(2, 1))
        assert [(entry.row, entry.reason[:40]) for entry in quarantined] == [
            (1, "unrated response: 'completions[1]' lacks")
        ]
    row = vlfeedback(rows)
    row["image"] = row.pop("img_path")
    assert len(read_groups(write(row))[0]) == 1


def test_vlfeedback_bad_comparisons_are_reported_and_the_rest_kept(write):
    rows = completions(("same", ("5",)), ("same", ("4",)), ("other", ("3",)), (" ", ("2",)), (None, ("1",)))
    (group,), quarantined = read_groups(write(vlfeedback(rows)))
    assert group.responses == ("same", "same", "other")
    assert group.comparisons == (Comparison(0, 2), Comparison(1, 2))
    reasons = [entry.reason.split(":")[0] for entry in quarantined]
    assert sorted(reasons) == ["empty response"] * 4 + ["identical responses"] + ["wrong type"] * 3
    assert len(quarantined) + len(group.comparisons) == 10  # all C(5, 2) pairs are accounted for
    assert {(entry.row, entry.id) for entry in quarantined} == {(1, "v")}


def test_random_vlfeedback_rows_lose_nothing(write):
    rng = random.Random(2)
    rows = [
        vlfeedback(
            completions(
                *(
                    (rng.choice(["x", "y", "z", "", 3]), [rng.choice(["1", "2", "N/A", None])])
                    for _ in range(rng.randint(0, 5))
                )
            )
        )
        for _ in range(200)
    ]
    groups, quarantined = read_groups(write(*rows))
    assert {g.row for g in groups} | {q.row for q in quarantined} == set(range(1, 201))
    for group in groups:
        used = {index for c in group.comparisons for index in (c.winner, c.loser)}
        assert used == set(range(len(group.responses))) and used
        pairs = rated_pairs(
            [mean_rating(completion["annotations"]) for completion in rows[group.row - 1]["completions"]]
        )
        reasons = [q.reason for q in quarantined if q.row == group.row and not q.reason.startswith("unrated response")]
        assert len(group.comparisons) + len(reasons) == len(pairs)


BAD_ROWS = {
    "broken line": ('{"prompt": "p", ', "broken JSON line: Expecting property name"),
    "nested": ("[" * 100_000, "broken JSON line: maximum recursion depth"),
    "number": ("1" * 5000, "broken JSON line: Exceeds the limit"),
    "list": ([1, 2], "not an object: the row is a JSON list"),
    "null": ("null", "not an object: the row is a JSON null"),
    "boolean": ("true", "not an object: the row is a JSON boolean"),
    "no fields": ({}, "unknown format: fields found: none"),
    "unknown fields": (
        {"prompt": "p", "img_path": "i.png", "choosen": "x", "rejected": "y"},
        "unknown format: fields found: choosen, img_path, prompt, rejected; "
        "the nearest format is pairwise preferences, which also needs 'chosen' (did you mean it by 'choosen'?)",
    ),
    "near scoring": (
        {"prompt": "p", "response": ["x"]},
        "nearest format is scoring input, which also needs",
    ),
    "prompt blank": (
        {**PAIR, "prompt": " \n", "img_path": None},
        "empty prompt: 'prompt' has no text, and there is no",
    ),
    "image a folder": ({**PAIR, "img_path": "."}, "which is a directory; name the file in it"),
    "prompt missing": (
        {**{k: v for k, v in PAIR.items() if k != "prompt"}, "promt": "p"},
        "missing field: the row has no 'prompt' (did you mean it by 'promt'?); fields found: chosen, id,",
    ),
    "prompt type": ({**PAIR, "prompt": ["p"]}, "wrong type: 'prompt' is a list; it must be a text"),
    "image missing": ({k: v for k, v in PAIR.items() if k != "img_path"}, 'a text-only record says "img_path": null'),
    "image type": ({**PAIR, "img_path": 3}, "wrong type: 'img_path' is 3"),
    "image empty": ({**PAIR, "img_path": ""}, "wrong type: 'img_path' is ''"),
    "image absent": ({**PAIR, "img_path": "no.png"}, "no.png, which does not exist; is the image root right?"),
    "image long": ({**PAIR, "img_path": "x" * 5000}, "missing image file"),
    "image null byte": ({**PAIR, "img_path": "a\0b"}, "missing image file"),
    "image surrogate": ({**PAIR, "img_path": "\ud800"}, "missing image file"),
    "empty": ({**PAIR, "chosen": ""}, "empty response: 'chosen' has no text"),
    "white": ({**PAIR, "rejected": " \n\t"}, "empty response: 'rejected' has no text"),
    "response type": ({**PAIR, "chosen": None}, "wrong type: 'chosen' is a null"),
    "surrogate": ({**PAIR, "chosen": "x\ud800"}, "broken text: 'chosen'"),
    "identical": ({**PAIR, "chosen": "same", "rejected": "same"}, "identical responses"),
    "margin type": ({**PAIR, "margin": "1"}, "wrong type: 'margin' is '1'"),
    "margin infinite": ({**PAIR, "margin": float("inf")}, "wrong type: 'margin' is inf"),
    "margin negative": ({**PAIR, "margin": -0.5}, "negative margin: 'margin' is -0.5, but 'chosen' is the better one"),
    "margin huge": ({**PAIR, "margin": 10**400}, "wrong type: 'margin'"),
    "tie type": ({**PAIR, "tie": 1}, "wrong type: 'tie' is 1"),
    "no responses": ({"prompt": "p", "img_path": None, "responses": []}, "wrong type: 'responses'"),
    "responses text": ({"prompt": "p", "img_path": None, "responses": "abc"}, "'responses' is a text"),
    "empty of many": ({"prompt": "p", "img_path": None, "responses": ["a", ""]}, "empty response: 'responses[1]'"),
    "completions type": (vlfeedback("x"), "wrong type: 'completions' must be a list of objects"),
    "completions items": (vlfeedback(["x"]), "it is a list with other items"),
    "completions lengths": (
        vlfeedback({"response": ["a"], "annotations": [{}, {}]}),
        "'response' and 'annotations' must be lists of one length",
    ),
    "all ties": (
        vlfeedback(completions(("a", ("3",)), ("b", ("3",)))),
        "no comparisons left: of 2 completions 0 lack a numeric 'Rating' for some aspect; 2 are rated, all alike",
    ),
    "unrated": (vlfeedback(completions(("a", (None,)), ("b", ("3",)))), "of 2 completions 1 lack a numeric 'Rating'"),
    "no completions": (vlfeedback([]), "no comparisons left: of 0 completions"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_quarantined_with_its_reason(write, name):
    row, reason = BAD_ROWS[name]
    path = write(PAIR, row if isinstance(row, str) else json.dumps(row))
    groups, quarantined = read_groups(path)
    assert [group.row for group in groups] == [1]
    assert [(entry.file, entry.row) for entry in quarantined] == [(str(path), 2)]
    assert reason in quarantined[0].reason


def test_json_lists_line_separators_and_byte_order_marks(write, tmp_path):
    assert [g.row for g in read_groups(write(json.dumps([PAIR, PAIR], indent=1), name="list.json"))[0]] == [1, 2]
    assert len(read_groups(write(PAIR, PAIR, name="lines.json"))[0]) == 2
    separated = json.dumps({**PAIR, "chosen": "one\u2028two\x85"}, ensure_ascii=False)
    (group,), _ = read_groups(write("\ufeff" + separated))
    assert group.responses[0] == "one\u2028two\x85"
    (tmp_path / "dos.jsonl").write_bytes(f"{json.dumps(PAIR)}\r\n{json.dumps(PAIR)}\r\n".encode())
    assert len(read_groups(tmp_path / "dos.jsonl")[0]) == 2


def test_unusable_files_raise_and_name_the_file(write, tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl does not exist"):
        read_groups(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_groups(tmp_path)
    latin = b'{"prompt": "caf\xe9"}\n'
    for name, content in (("latin.jsonl", latin + json.dumps(PAIR).encode()), ("latin.json", b"[\n" + latin + b"]")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} is not UTF-8 text: line {1 + name.endswith('.json')}"):
            read_groups(tmp_path / name)
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(PAIR).encode() + b"\n" + latin + json.dumps(PAIR).encode())
    groups, (bad,) = read_groups(tmp_path / "latin.jsonl")
    assert len(groups) == 2 and bad.row == 2 and bad.reason.startswith("broken text: the line is not UTF-8")
    with pytest.raises(DataError, match=r"cut\.json is not a valid JSON list"):
        read_groups(write('[{"prompt": ', name="cut.json"))
    for rows in ([json.dumps([PAIR, PAIR])], json.dumps([PAIR, PAIR], indent=1).split("\n")):
        with pytest.raises(
            DataError, match=r"one JSON list of rows.*rename it to list\.json, or write one object a line"
        ):
            read_groups(write(*rows, name="list.jsonl"))
    with pytest.raises(DataError, match=r"texts\.json is one JSON object; a preference file is JSONL, a JSON list"):
        read_groups(write("{", '"a": 1', "}", name="texts.json"))
    with pytest.raises(DataError, match=r"a\.csv is CSV; a preference file is JSONL"):
        read_groups(write("prompt,chosen", name="a.csv"))
    with pytest.raises(DataError, match="holds no rows"):
        read_groups(write("", "  "))
    with pytest.raises(DataError, match=r"(?s)holds no usable row.*2 x missing image.*1 x broken JSON line.*row 1"):
        read_groups(write({**PAIR, "img_path": "x"}, "{", {**PAIR, "img_path": "y"}))


def test_quarantine_report(tmp_path):
    entries = [
        Quarantined("f", 3, "missing image file: a"),
        Quarantined("f", 5, "empty response: b", "id5"),
        Quarantined("f", 9, "missing image file: c\nd", "é"),
    ]
    write_quarantine(tmp_path / "q.jsonl", entries)
    lines = (tmp_path / "q.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Quarantined(**json.loads(line)) for line in lines] == entries
    assert list(json.loads(lines[0])) == ["file", "row", "id", "reason"]
    assert summarise_quarantine(entries) == (
        "3 quarantined:\n  2 x missing image file (first: f row 3)\n  1 x empty response (first: f row 5)"
    )
    assert summarise_quarantine([]) == "nothing quarantined"
