"""`mmrm audit`: what text alone gives away, on small cases worked out by hand and on planted shortcuts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from commands import run, write_pairs
from scipy.sparse import csr_array

from mmrm_jax.audit.across import near_duplicates, text_families, transfer
from mmrm_jax.audit.baselines import (
    accuracy_by_text,
    accuracy_by_unit,
    fit_linear,
    held_out_length,
    held_out_linear,
    held_out_texts,
)
from mmrm_jax.audit.features import count_words
from mmrm_jax.audit.folds import balanced_folds
from mmrm_jax.audit.near import near_pairs
from mmrm_jax.audit.pairs import PROMPT_IMAGES, by_appearance, index_comparisons, linked, occurrences
from mmrm_jax.audit.repeats import repeats
from mmrm_jax.audit.run import name_data, study_corpus
from mmrm_jax.audit.study import shortcut_share, study
from mmrm_jax.audit.styles import STYLES, count_styles
from mmrm_jax.audit.telling import telling_words
from mmrm_jax.data.sources import MemorySource, open_source
from mmrm_jax.types import Comparison, Group

GROCERY = Path(__file__).parents[1].parent / "shared" / "data" / "grocery"
ATTACK = "<script>alert('x')</script> \"&' \x00 $\\frac{"


def group(row, chosen, rejected, *, prompt=None, image=None, tie=False) -> Group:
    prompt = f"question {row}" if prompt is None else prompt
    comparison = Comparison(0, 1, tie=tie)
    return Group(str(row), prompt, (chosen, rejected), (comparison,), image, "here", "file.jsonl", row)


def corpus_of(*groups: Group, name="here"):
    return index_comparisons([(name, name, MemorySource(groups))])


def audited(*groups: Group):
    """The JSON of the one environment."""
    return study_corpus(corpus_of(*groups))[0]["environments"][0]


def baseline(result, name):
    return next(row for row in result["baselines"] if row["name"] == name)


def sentence(rng, words=10) -> str:
    return " ".join(f"word{w}" for w in rng.integers(200, size=words))


# --- units and folds -----------------------------------------------------------------------------------------------


def test_images_link_and_so_do_prompts_that_few_images_have():
    image = np.asarray([0, 0, 1, 2, 3])
    prompt = np.asarray([0, 1, 1, 2, 2])  # image 0 and 1 by prompt 1; 2 and 3 by prompt 2
    unit = linked(image, prompt)
    assert unit[0] == unit[1] == unit[2] and unit[3] == unit[4] and unit[0] != unit[3]


def test_labels_are_numbered_as_they_appear():
    assert by_appearance(np.asarray([7, 2, 7, 9, 2])).tolist() == [0, 1, 0, 2, 1]


def test_a_prompt_asked_of_everything_links_nothing():
    image = np.arange(PROMPT_IMAGES + 1)
    assert len(np.unique(linked(image, np.zeros_like(image)))) == len(image)
    assert len(np.unique(linked(image[1:], np.zeros_like(image[1:])))) == 1


def test_the_same_bytes_are_one_image_whatever_the_name(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"the same")
    pairs = corpus_of(
        group(1, "a", "b", image=tmp_path / "a.png"), group(2, "c", "d", image=tmp_path / "b.png"), group(3, "e", "f")
    ).environments[0]
    assert pairs.unit[0] == pairs.unit[1] != pairs.unit[2]


def test_folds_keep_labels_whole_and_are_of_one_size():
    labels = np.repeat(np.arange(12), [7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])  # 18 comparisons
    fold = balanced_folds(labels, 2, np.random.default_rng(0))
    assert all(len(np.unique(fold[labels == label])) == 1 for label in labels)
    assert sorted(np.bincount(fold)) == [9, 9]
    assert set(balanced_folds(np.asarray([4, 4, 9]), 5, np.random.default_rng(0))) == {0, 1}


# --- baselines -----------------------------------------------------------------------------------------------------


def test_the_fit_is_antisymmetric_and_solves_its_equation():
    # One feature, 1 in three rows: w minimises w^2/2 + 3 log(1 + exp(-w)), so w = 3 / (1 + exp(w)).
    weight = fit_linear(csr_array(np.ones((3, 1))))[0]
    assert weight == pytest.approx(3 / (1 + np.exp(weight)), abs=1e-3)
    rows = np.random.default_rng(0).normal(size=(40, 3))
    assert fit_linear(csr_array(-rows)) == pytest.approx(-fit_linear(csr_array(rows)), abs=1e-3)
    assert fit_linear(csr_array((0, 4))).tolist() == [0, 0, 0, 0]


def test_length_is_judged_by_the_other_folds():
    # Fold 0 is judged by fold 1, where the shorter one wins, and the other way round.
    margins = held_out_length(np.asarray([5, 3, -2, -4, 1]), np.asarray([0, 0, 1, 1, 1]))
    assert margins.tolist() == [-5, -3, -2, -4, 1]


def test_a_comparison_is_never_tested_on_a_fit_that_saw_its_texts():
    # Every text wins or loses always; only its own comparisons could say so, and these are held out.
    rng = np.random.default_rng(0)
    texts = csr_array(np.eye(40))
    chosen, rejected = rng.integers(20, size=400), 20 + rng.integers(20, size=400)
    differences = csr_array(texts[chosen] - texts[rejected])
    unit = np.arange(400)
    assert np.all(held_out_linear(differences, unit % 5) > 0)
    assert np.all(held_out_texts(differences, chosen, rejected, unit, rng) == 0)


def test_accuracies_of_the_sample_come_first():
    columns = np.asarray([[[1.0, 1.0]], [[0.0, 1.0]], [[1.0, 1.0]], [[0.0, 0.0]]])
    index = np.asarray([0, 0, 1, 1])
    rng = np.random.default_rng(0)
    assert accuracy_by_unit(columns, index, rng)[0, 0] == pytest.approx(2 / 3)
    draws = accuracy_by_text(columns, index, index + 2, rng, resamples=50)
    assert draws[0, 0] == pytest.approx(2 / 3) and draws.shape == (51, 1)


def test_the_share_is_that_of_the_surest_baseline():
    sure = {"name": "sure", "accuracy": 0.75, "draws": np.linspace(0.7, 0.8, 1001)}
    high = {"name": "high", "accuracy": 0.8, "draws": np.linspace(0.4, 1.0, 1001)}
    share = shortcut_share([high, sure])
    assert share["baseline"] == "sure" and share["share"] == pytest.approx(0.5) and share["above"]
    assert share["low"] == pytest.approx(2 * (0.7 + 0.1 * 0.0125) - 1)  # 2.5 % for two baselines: 1.25 %
    assert shortcut_share([]) is None


def test_styles_are_counted():
    texts = ["I think it might rain!", "# Title\n- one\n2. **two**", "I'm sorry, I cannot help. 42?", "日本"]
    counts = count_styles(texts, count_words(texts).lengths)
    found = [dict(zip(STYLES, row, strict=True)) for row in counts.tolist()]
    assert found[0]["hedging"] == 2 and found[0]["exclamation marks"] == 1 and found[0]["first person"] == 1
    assert found[1]["lists and markdown"] == 5 and found[1]["digits"] == 1
    assert found[2]["refusals"] == 2 and found[2]["digits"] == 2 and found[2]["question marks"] == 1
    assert [row["words"] for row in found] == [5, 4, 6, 2] and found[3]["characters"] == 2


def test_words_are_told_apart_and_counted():
    words = count_words(["good pear", "bad pear", "good plum", "bad plum"])
    chosen, rejected = np.asarray([0, 2, 0, 2, 1, 0]), np.asarray([1, 3, 3, 1, 0, 2])
    weights = np.zeros(len(words.names))
    weights[list(words.names).index("good")] = 1.0
    weights[list(words.names).index("bad")] = -0.5
    assert telling_words(words, weights, chosen, rejected) == [
        {"word": "good", "weight": 1.0, "n": 5, "accuracy": 4 / 5},
        {"word": "bad", "weight": -0.5, "n": 5, "accuracy": 4 / 5},
    ]


# --- repeats -------------------------------------------------------------------------------------------------------


def test_duplicates_conflicts_and_the_ceiling():
    found = repeats(
        corpus_of(
            group(1, "a", "b", prompt="p"),
            group(2, "a", "b", prompt="p"),  # once more
            group(3, "b", "a", prompt="p"),  # the contrary
            group(4, "a", "b", prompt="q"),  # another prompt
        ).environments[0]
    )
    assert (found["duplicates"], found["conflicts"], found["conflicting"], found["conflict_errors"]) == (1, 1, 3, 1)
    assert found["turned"] == 0.75 and found["ceiling"] == 0.75 and found["cycles"] == 0


def test_the_ceiling_sees_no_image(tmp_path):
    for name in "xy":
        (tmp_path / name).write_text(name)
    first = group(1, "a", "b", prompt="p", image=tmp_path / "x")
    found = repeats(corpus_of(first, group(2, "b", "a", prompt="p", image=tmp_path / "y")).environments[0])
    assert (found["conflicts"], found["turned"], found["ceiling"]) == (0, 1.0, 0.5)


@pytest.mark.parametrize(("last", "cycles"), [(("c", "a"), 1), (("a", "c"), 0)])
def test_preferences_that_go_round(last, cycles):
    chain = [("a", "b"), ("b", "c"), last]
    groups = [group(i, *pair, prompt="p") for i, pair in enumerate(chain)]
    groups.append(group(9, "c", "a", prompt="elsewhere"))
    assert repeats(corpus_of(*groups).environments[0])["cycles"] == cycles


def test_how_texts_come_back():
    pairs = corpus_of(group(1, "a", "b"), group(2, "b", "c"), group(3, "d", "e")).environments[0]
    assert occurrences(pairs) == {"distinct": 5, "repeated": 2 / 3, "balance": 0.0}
    pairs = corpus_of(group(1, "a", "b"), group(2, "a", "c")).environments[0]
    assert occurrences(pairs) == {"distinct": 3, "repeated": 1.0, "balance": 1.0}


def test_near_duplicates_are_found_and_others_are_not():
    rng = np.random.default_rng(0)
    texts = [sentence(rng) for _ in range(200)]
    texts += [texts[0] + " more", "", texts[7].upper() + "!"]
    pairs, similarity = near_pairs(count_words(texts).sets)
    assert pairs.tolist() == [[0, 200], [7, 202]] and similarity[1] == 1.0 and 0.8 < similarity[0] < 1
    families = text_families(count_words(texts).sets)
    assert families[0] == families[200] and len(set(families)) == 201
    assert near_pairs(count_words(["", "!"]).sets)[0].shape == (0, 2)


def test_near_duplicates_of_an_environment_are_its_own():
    """Two texts that only a third, of another environment, is near to both of."""
    words = [f"word{i}" for i in range(40)]
    one, between, two = (" ".join(words[start : start + 34]) for start in (0, 3, 6))
    here = MemorySource((group(1, one, "good"), group(2, two, "bad")))
    there = MemorySource((group(3, between, "else"),))
    corpus = index_comparisons([("here", "here", here), ("there", "there", there)])
    sets = count_words(corpus.texts).sets
    assert len(set(text_families(sets)[[0, 2, 4]])) == 1, "the third links them"
    found = near_duplicates(corpus.environments[0], corpus.texts, sets)
    assert (found["near"], found["examples"]) == (0, [])
    both = corpus_of(*(here[i] for i in range(2)), there[0])
    found = near_duplicates(both.environments[0], both.texts, count_words(both.texts).sets)
    assert found["near"] == 3 and found["examples"][0]["similarity"] > 0.8


def test_of_equal_lengths_nothing_is_said_of_the_longer_one():
    """In 40 % of comparisons the winner is longer, in none the loser: not 70 % with half of the others."""
    rng = np.random.default_rng(0)
    texts = [[sentence(rng), sentence(rng)] for _ in range(200)]
    long = [[f"{a[:60]:.<60}" + "!" * 20 * (i < 80), f"{b[:60]:.<60}"] for i, (a, b) in enumerate(texts)]
    said = " ".join(audited(*(group(i, *pair) for i, pair in enumerate(long)))["verdict"]["sentences"])
    assert "Where one is longer, the longer response wins in 100.0 % (100.0 to 100.0; n = 80;" in said


# --- whole environments --------------------------------------------------------------------------------------------


def planted(count, agreement, seed, cue=" certainly") -> list[Group]:
    """Fresh random texts; the chosen one has the cue in a share of comparisons, the rejected one in the others."""
    rng = np.random.default_rng(seed)
    groups = []
    for row in range(count):
        marked = [sentence(rng) + cue, sentence(rng)]
        groups.append(group(row, *(marked if rng.random() < agreement else marked[::-1])))
    return groups


def test_a_planted_word_is_found_and_called_what_it_is():
    result = audited(*planted(200, 0.9, seed=0))
    words = baseline(result, "bag of words")
    assert 0.7 < words["low"] < words["accuracy"] < 0.95
    assert result["verdict"]["level"] == "strong" and result["shortcut"]["low"] > 0.4
    assert result["words"][0]["word"] == "certainly" and result["words"][0]["n"] == 200
    assert "certainly" in " ".join(result["verdict"]["sentences"])
    assert result["verdict"]["command"].startswith("mmrm train --objective text_only --data here")


def test_a_planted_style_is_found():
    result = audited(*planted(200, 0.9, seed=1, cue="!!"))
    assert result["shortcut"]["baseline"] in ("length and style", "length in characters")
    assert result["verdict"]["level"] == "strong"
    style = next(row for row in result["styles"] if row["style"] == "exclamation marks")
    assert style["n"] == 200 and style["low"] < 0.9 < style["high"]
    assert "exclamation marks" in " ".join(result["verdict"]["sentences"])


def test_nothing_is_found_where_nothing_is():
    levels = [audited(*planted(150, 0.5, seed=seed))["verdict"]["level"] for seed in range(3)]
    assert levels == ["none"] * 3


def test_a_derangement_is_no_shortcut(tmp_path):
    # Every text is chosen once and rejected once: what is held out tips the rest the other way.
    rng = np.random.default_rng(0)
    texts, groups = [sentence(rng) for _ in range(300)], []
    for row, text in enumerate(texts):
        (tmp_path / str(row)).write_text(str(row))
        groups.append(group(row, text, texts[(row + 7) % 300], prompt="Which?", image=tmp_path / str(row)))
    result = audited(*groups)
    words, new = baseline(result, "bag of words"), baseline(result, "bag of words, new texts")
    assert words["high"] < 0.5 and new["low"] < 0.5 < new["high"] and new["resampled"] == "texts"
    assert result["responses"]["balance"] == 0 and result["shortcut"]["low"] == 0
    assert result["verdict"]["level"] == "none" and "that is no shortcut" in result["verdict"]["sentences"][1]


def test_what_holds_elsewhere_and_what_is_turned_round():
    named = [("one", 0.9, 0), ("two", 0.1, 1), ("three", 0.9, 2)]
    sources = [(name, name, MemorySource(tuple(planted(150, share, seed)))) for name, share, seed in named]
    corpus = index_comparisons(sources)
    result, _ = study_corpus(corpus)
    cells = {(row["train"], row["test"]): row for row in result["matrix"]}
    assert cells["one", "two"]["high"] < 0.3 and cells["one", "three"]["low"] > 0.7 and len(cells) == 9
    assert "What words say in one is turned round in two" in " ".join(result["across"])
    assert not any(row["images"] == 0 for row in result["overlap"])  # the same prompts stand in for images
    words = count_words(corpus.texts)
    only = study(corpus.environments[0], words, count_styles(corpus.texts, words.lengths))
    again = index_comparisons([sources[0], ("again", "again", sources[0][2])]).environments[1]
    copy = study(again, words, count_styles(corpus.texts, words.lengths))
    (cell,) = [row for row in transfer([only, copy], words) if row["test"] == "again" and row["train"] == "one"]
    assert cell["n"] == 0 and cell["accuracy"] is None  # every comparison has been seen


def test_what_holds_elsewhere_is_no_surer_than_the_texts_there_are():
    """Labels without a rule, and ten pairs of texts on forty images each: what words say there is chance."""
    rng = np.random.default_rng(1)
    pairs = [(sentence(rng), sentence(rng)) for _ in range(10)]
    random = [group(i, sentence(rng), sentence(rng), prompt=f"a{i}") for i in range(200)]
    repeated = [group(i, *pairs[i % 10], prompt=f"b{i}") for i in range(400)]
    corpus = index_comparisons([("a", "a", MemorySource(tuple(random))), ("b", "b", MemorySource(tuple(repeated)))])
    result, _ = study_corpus(corpus)
    (cell,) = [row for row in result["matrix"] if (row["train"], row["test"]) == ("a", "b")]
    assert cell["n"] == 400 and cell["high"] - cell["low"] > 0.3  # 400 images would have .1


@pytest.mark.parametrize("count", [1, 2, 19])
def test_too_few_comparisons_are_said_so(count):
    result = audited(*planted(count, 0.9, seed=0))
    assert result["verdict"]["level"] == "too few" and result["shortcut"] is None and result["baselines"] == []
    assert f"{count} comparison" in result["verdict"]["sentences"][0]


def test_few_groups_are_not_enough_whatever_they_compare():
    rng = np.random.default_rng(0)
    rows = [group(i, sentence(rng) + " certainly", sentence(rng), prompt=str(i % 3)) for i in range(60)]
    result = audited(*rows)
    assert result["folds"] == 3 and result["units"] == 3 and result["verdict"]["level"] == "too few"


def test_ties_and_empty_data_leave_nothing():
    result = audited(*(group(i, "a", "b", tie=True) for i in range(30)))
    assert result["ties"] == 30 and result["comparisons"] == 0 and result["verdict"]["level"] == "too few"
    assert audited()["comparisons"] == 0


def test_texts_without_words_are_ties_for_a_bag_of_words():
    result = audited(*(group(i, "!" * (i + 2), "?") for i in range(30)))
    assert baseline(result, "bag of words")["accuracy"] == 0.5
    assert baseline(result, "length in characters") | {"low": 1, "high": 1} == {
        "name": "length in characters",
        "accuracy": 1.0,
        "low": 1,
        "high": 1,
        "resampled": "texts",  # "?" comes back
        "direction": "longer",
    }


# --- the command ---------------------------------------------------------------------------------------------------


def write_rows(path: Path, groups) -> Path:
    rows = [
        {"id": g.id, "prompt": g.prompt, "img_path": None, "chosen": g.responses[0], "rejected": g.responses[1]}
        for g in groups
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_only_files_from_the_command_line(tmp_path, capsys):
    one = write_rows(tmp_path / "one.jsonl", planted(80, 0.95, seed=0, cue=f" certainly {ATTACK}"))
    two = write_rows(tmp_path / "two.jsonl", planted(80, 0.05, seed=1))
    two.write_text(two.read_text() + '{"prompt": "x"}\n')
    out = tmp_path / "out"
    status, text = run(capsys, "audit", one, f"other={two}", "--out", out, "--json", tmp_path / "r.json")
    assert status == 0 and "replaced" not in text, text
    for said in ("one: strong", "other: strong", "turned round in other", "1 quarantined", "Shortcut share: max(0"):
        assert said in " ".join(text.split())
    result = json.loads((tmp_path / "r.json").read_text())
    assert [each["name"] for each in result["environments"]] == ["one", "other"]
    assert result["environments"][0]["groups_with_image"] == 0 and len(result["quarantined"]) == 1
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 1
    page = (out / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert "&lt;script&gt;" in page and "no image" in page and page.count("data:image/png") >= 6


def test_examples_are_shown_beside_their_images(tmp_path, capsys):
    file = write_pairs(tmp_path, "pairs", 40)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["chosen"] += " Truly so."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("an earlier one")
    status, text = run(capsys, "audit", file, "--out", tmp_path / "out")
    assert status == 0 and "report.html is there, and will be replaced" in " ".join(text.split()), text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "pairs: right and surest" in page and page.count("alt='Image of the prompt: Colour?'") >= 1


def test_names_of_data():
    assert name_data(["a/b.jsonl", "d:train", "x=c.jsonl"]) == {"b": "a/b.jsonl", "train": "d:train", "x": "c.jsonl"}
    assert name_data(["runs/p=1/b.jsonl"]) == {"b": "runs/p=1/b.jsonl"}
    with pytest.raises(ValueError, match="two data sets would be called 'b'.*one=a/b.jsonl two=c/b.jsonl"):
        name_data(["a/b.jsonl", "c/b.jsonl"])


def test_what_is_missing_is_named(tmp_path, capsys):
    assert run(capsys, "audit", tmp_path / "no.jsonl", "--out", tmp_path)[1].endswith("no.jsonl does not exist\n")
    assert "no data: name one preference file" in run(capsys, "audit")[1]


# --- photos of groceries -------------------------------------------------------------------------------------------


def test_the_grocery_shortcut_is_found_and_none_in_the_neutral_file():
    if not GROCERY.is_dir():
        pytest.skip("the grocery photos are not in shared/data")
    named = [(n, n, open_source(GROCERY / f"{n}.jsonl")[0]) for n in ("train", "train_neutral", "test_ood")]
    result, examples = study_corpus(index_comparisons(named))
    found = {each["name"]: each for each in result["environments"]}
    cells = {(row["train"], row["test"]): row["accuracy"] for row in result["matrix"]}
    assert cells["train", "train"] == pytest.approx(0.82, abs=0.02)
    assert cells["train", "test_ood"] == pytest.approx(0.18, abs=0.02)
    assert cells["train", "train_neutral"] == pytest.approx(0.5, abs=0.02)
    assert found["train"]["verdict"]["level"] == "strong"
    assert {"yoghurt", "milk"} <= {word["word"] for word in found["train"]["words"]}
    neutral = found["train_neutral"]
    new = baseline(neutral, "bag of words, new texts")
    assert new["low"] < 0.5 < new["high"] and neutral["verdict"]["level"] == "none"
    assert neutral["shortcut"]["low"] == 0 and neutral["words"] == [] and neutral["responses"]["balance"] == 0
    assert {example.environment for example in examples} == {"train", "test_ood"}
    assert all(example.images for example in examples)
