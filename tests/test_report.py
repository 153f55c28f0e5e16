"""The HTML report: complete, well-formed, escaped, and honest in its headline. Numbers here are made up."""

from __future__ import annotations

import dataclasses
import io
import re
import struct
import zlib
from html.parser import HTMLParser
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from mmrm_jax.eval.metrics import CellScores, cell_row
from mmrm_jax.eval.report import ReportData, SfcExample, headline, write_report
from mmrm_jax.eval.report_plots import Curve, SfcHistory, heat_map, pool_seeds, training_curves
from mmrm_jax.eval.summary import summarise
from mmrm_jax.types import Quarantined

IID = {"long": "test_long", "hedged": "test_hedged", "short": "test_short"}
TESTS = (*IID.values(), "test_neutral")
ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)> \"&' \x00 \ud800 $\\frac{"
EXTREMES: tuple[tuple[Literal["highest", "lowest"], float, float], ...] = (
    ("highest", 0.97, -2.4),
    ("lowest", 0.03, 3.1),
)
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def png(size=(32, 32), mode="RGB", kind="PNG") -> bytes:
    buffer = io.BytesIO()
    image = Image.new(mode, size, "white" if mode != "RGBA" else (0, 0, 0, 0))
    if mode != "L":
        image.paste((200, 60, 40), (size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4))
    image.save(buffer, kind)
    return buffer.getvalue()


def demo_cells(seeds=(0, 1, 2), n=150) -> list[CellScores]:
    rng = np.random.default_rng(0)
    cells = []
    for seed in seeds:
        for train, own in IID.items():
            for test in TESTS:
                agreement = 0.9 if test == own else 0.5 if test == "test_neutral" else 0.25
                cue = np.where(rng.random(n) < agreement, 1.0, -1.0)
                for objective, weight in (("text_only", None), ("standard", 1.2), ("shortcut_aware", 0.3)):
                    margins = cue if weight is None else weight * cue + rng.normal(1.0, 1.0, n)
                    cells.append(
                        CellScores(
                            objective, train, test, seed, margins, cue, np.arange(n), np.zeros(n, bool), 0.1, None
                        )
                    )
    return cells


def demo(**changes) -> ReportData:
    rng = np.random.default_rng(1)
    cells = demo_cells()
    steps = np.arange(0, 900, 30)
    edges = np.linspace(0, 1, 21)
    histories = []
    for train in IID:
        for seed in range(3):
            spread = np.linspace(0.3, 5, len(steps))[:, None]
            sfc = 1 / (1 + np.exp(spread * rng.normal(0.3, 1, (len(steps), 256))))
            histories.append(SfcHistory(train, seed, steps, np.stack([np.histogram(s, edges)[0] for s in sfc]), edges))
    examples = [
        SfcExample(train, kind, sfc, (png(),), "What is in the picture?", "A red square.", "A blue circle.", 1.5, b)
        for train in IID
        for kind, sfc, b in EXTREMES
        for _ in range(3)
    ]
    values = {
        "title": "mmrm_jax: shapes world",
        "command": "mmrm quickstart --seeds 3",
        "facts": {"seconds": "312", "jax": "0.10.2", "learning rate": "1e-3"},
        "rows": [cell_row(cell, rng, 200) for cell in cells],
        "summary": summarise(cells, IID, resamples=200),
        "objectives": ("text_only", "standard", "shortcut_aware"),
        "trains": tuple(IID),
        "tests": TESTS,
        "iid": IID,
        "sfc_histories": histories,
        "examples": examples,
        "curves": [
            Curve("loss", f"{t}, seed 0", range(50), list(np.exp(-np.arange(50) / 20) + 0.02 * i))
            for i, t in enumerate(IID)
        ],
        "quarantined": [Quarantined("train.jsonl", row, f"image not found: {row}.png") for row in range(1, 4)],
    }
    return ReportData(**{**values, **changes})


@pytest.fixture(scope="module")
def data() -> ReportData:
    return demo()


def written(tmp_path, data: ReportData) -> str:
    path = tmp_path / "report.html"
    write_report(path, data)
    return path.read_text(encoding="utf-8")


def test_report_has_everything_and_needs_no_network(tmp_path, data):
    text = written(tmp_path, data)
    page = Page(text)
    for part in (
        "Shortcut-aware training raised accuracy out of distribution", "In short", "Trained here, tested there",
        "SFC over training", "Comparisons with the highest and lowest SFC", "How it was run",
        "mmrm quickstart --seeds 3",
        "0.10.2", "image not found", "Rows that could not be used: 3", "3 seeds",
        "With the image right, from text alone wrong; the image model fits the label better, so this comparison weighs",
        "Both models are right; the text-only model fits the label better, so this comparison weighs less.",
        "All numbers", "Show 108 rows", "hedged, seeds 0, 1, 2",
    ):  # fmt: skip
        assert part in page.text, part
    # 3 accuracy maps, 3 SFD maps, 3 SFC panels, 1 curve plot, 18 examples
    images = page.all("img")
    assert len(images) == 28
    assert all((image["src"] or "").startswith("data:image/") and image["alt"] for image in images)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))
    assert "viewport" in [meta.get("name") for meta in page.all("meta")]
    row = data.rows[0]
    assert f"{100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f}" in page.text


def test_records_are_escaped_everywhere(tmp_path):
    cells = demo_cells(seeds=(0,), n=20)[:3]
    evil = [dataclasses.replace(c, train=ATTACK, objective=ATTACK + c.objective) for c in cells]
    rng = np.random.default_rng(0)
    history = SfcHistory(ATTACK, 0, np.array([0]), np.array([[1, 2]]), np.array([0.0, 0.5, 1.0]))
    text = written(
        tmp_path,
        ReportData(
            title=ATTACK + "{0}",
            command=ATTACK,
            facts={ATTACK: ATTACK},
            rows=[cell_row(c, rng, 5) for c in evil],
            summary=summarise(evil, {ATTACK: cells[0].test}, resamples=5),
            objectives=[c.objective for c in evil],
            trains=[ATTACK.replace("\x00", "").replace("\ud800", "")],
            tests=[cells[0].test],
            iid={ATTACK: cells[0].test},
            sfc_histories=[history],
            examples=[SfcExample(ATTACK, "highest", 0.5, (png(),), ATTACK, ATTACK, ATTACK, 0.0, -1.0)],
            quarantined=[Quarantined(ATTACK, 1, ATTACK)],
        ),
    )
    page = Page(text)
    assert page.all("script") == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert "<script>alert('x')</script>" in page.text  # shown, as text


def test_braces_in_records_are_kept(tmp_path, data):
    text = written(tmp_path, dataclasses.replace(data, rows=(), summary=(), command="a {title} {} {{x}}"))
    assert "a {title} {} {{x}}" in Page(text).text


def test_empty_report_renders(tmp_path):
    text = written(tmp_path, ReportData("empty", "", {}, [], [], (), (), (), {}))
    page = Page(text)
    for part in (
        "No model has been evaluated yet.",
        "No results.",
        "No objective here weighs by one text-only proxy.",
        "No comparisons were kept.",
    ):
        assert part in page.text
    assert page.all("img") == []


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        (None, "no image"),
        (b"not an image", "image cannot be shown"),
        (png((64, 64))[:80], "image cannot be shown"),
        (b"<svg onload='alert(1)'/>", "image cannot be shown"),
    ],
)
def test_examples_without_a_usable_image(tmp_path, data, image, shown):
    example = dataclasses.replace(data.examples[0], images=() if image is None else (image,))
    page = Page(
        written(
            tmp_path, dataclasses.replace(data, rows=(), summary=(), examples=[example], sfc_histories=(), curves=())
        )
    )
    assert shown in page.text
    assert page.all("img") == []


def test_oversized_image_is_not_decoded(tmp_path, data):
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + png((1, 1))[24:29]
    image = png((1, 1))[:12] + header + struct.pack(">I", zlib.crc32(header)) + png((1, 1))[33:]
    example = dataclasses.replace(data.examples[0], images=(image,))
    page = Page(
        written(
            tmp_path, dataclasses.replace(data, rows=(), summary=(), examples=[example], sfc_histories=(), curves=())
        )
    )
    assert "image cannot be shown: Image size (400000000 pixels) exceeds limit" in page.text


def test_photos_shrink_and_tiny_images_stay_sharp(tmp_path, data):
    examples = [
        dataclasses.replace(data.examples[0], images=(png((2000, 1000), kind="JPEG"),)),
        dataclasses.replace(data.examples[0], images=(png((200, 100), mode="RGBA"), png((32, 32)))),
    ]
    text = written(
        tmp_path, dataclasses.replace(data, rows=(), summary=(), examples=examples, sfc_histories=(), curves=())
    )
    kinds = [(image["class"], (image["src"] or "")[:15]) for image in Page(text).all("img")]
    assert kinds == [("photo", "data:image/jpeg"), ("photo", "data:image/jpeg"), ("tiny", "data:image/png;")]
    assert len(text) < 60_000


def summary(mean, low, high, *, seeds=3, base=0.6):
    def row(objective, versus, mean, low, high):
        return {
            "measure": "ood",
            "objective": objective,
            "versus": versus,
            "mean": mean,
            "low": low,
            "high": high,
            "seeds": seeds,
        }

    return [
        row("standard", None, base, base - 0.01, base + 0.01),
        row("shortcut_aware", None, base + mean, base, base + 0.1),
        row("shortcut_aware", "standard", mean, low, high),
    ]


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((0.1, 0.08, 0.12), "raised accuracy out of distribution: from 60.0 to 70.0 % (+10.0 points,"),
        ((0.1, 0.08, 0.12), "points, 95 % interval +8.0 to +12.0)."),
        ((-0.1, -0.12, -0.08), "lowered accuracy out of distribution: from 60.0 to 50.0 % (−10.0 points,"),
        ((-0.1, -0.12, -0.08), "points, 95 % interval −12.0 to −8.0)."),
        ((0.01, -0.01, 0.03), "made no measurable difference to accuracy out of distribution: from 60.0 to 61.0 %"),
        ((0.0, 0.0, 0.0), "made no measurable difference"),
        ((0.2, None, None), "made no measurable difference"),
        ((0.2, None, None), "(+20.0 points, too few images for an interval)"),
    ],
)  # fmt: skip
def test_headline_says_what_was_measured(numbers, sentence):
    (first,) = headline(summary(*numbers))
    assert first.startswith("Shortcut-aware training ") and sentence in first


@pytest.mark.parametrize(
    ("low", "high", "ending"),
    [
        (0.4, 0.49, "+6.0). That is worse than guessing (50 %)."),
        (0.4, 0.51, "+6.0). That may be no better than guessing (50 %)."),
        (0.51, 0.6, "+6.0)."),
    ],
)
def test_headline_does_not_boast_of_guessing(low, high, ending):
    rows = summary(0.05, 0.04, 0.06, base=0.4)
    rows[1] |= {"low": low, "high": high}
    first = headline(rows)[0]
    assert "raised accuracy out of distribution: from 40.0 to 45.0 %" in first and first.endswith(ending)


def test_runs_too_short_for_a_chart_say_so(tmp_path, data):
    short = [dataclasses.replace(h, steps=h.steps[:1], counts=h.counts[:1]) for h in data.sfc_histories]
    curves = [dataclasses.replace(c, steps=c.steps[:1], values=c.values[:1]) for c in data.curves]
    page = Page(written(tmp_path, dataclasses.replace(data, sfc_histories=short, curves=curves, examples=(), rows=())))
    assert page.all("img") == [] and page.text.count("so short that they logged once") == 2


def test_headline_is_of_a_method_and_not_of_text_alone():
    rows = summary(0.1, 0.08, 0.12)
    text = [row | {"objective": "text_only"} for row in rows if row["objective"] != "standard"]
    other = [row | {"objective": "focal"} if row["objective"] != "standard" else row for row in rows]
    assert headline(text + other)[0].startswith("Training with focal raised")
    assert headline([*text, rows[0]])[0].startswith("Training with text_only raised")


def test_headline_of_partial_results():
    assert headline([]) == ["No model has been evaluated yet."]
    assert "no pair of standard and other training" in headline(summary(0.1, 0, 1)[:1])[0]
    assert headline(summary(0.1, 0.05, 0.2, seeds=1))[-1].startswith("One seed was run")
    without = [row | {"low": None, "high": None} for row in summary(0.1, 0.05, 0.2, seeds=1)]
    assert not any("intervals" in sentence for sentence in headline(without))
    undefined = [{**row, "mean": None, "low": None, "high": None} for row in summary(0, 0, 0)]
    assert headline(undefined) == ["Neither accuracy nor SFD is defined on these tests; the numbers stand below."]


def test_histories_of_seeds_are_added_up_where_they_fit():
    steps, edges = np.array([0, 10]), np.array([0.0, 0.5, 1.0])
    one = SfcHistory("a", 0, steps, np.array([[1, 2], [3, 4]]), edges)
    two = SfcHistory("a", 1, steps, np.array([[10, 20], [30, 40]]), edges)
    other = SfcHistory("a", 2, steps + 1, np.array([[5, 5], [5, 5]]), edges)
    (pooled, seeds), (alone, rest) = pool_seeds([one, two, other])
    np.testing.assert_array_equal(pooled.counts, [[11, 22], [33, 44]])
    assert seeds == (0, 1) and rest == (2,) and alone is other
    with pytest.raises(ValueError, match=r"SFC history of a, seed 0: counts have shape \(2, 2\), 3 steps"):
        SfcHistory("a", 0, np.arange(3), one.counts, edges)


def test_heat_map_colours_follow_the_numbers():
    """Above chance blue, below red; an undefined cell stays white."""
    rows = [{"train": "a", "test": t, "accuracy": v} for t, v in (("x", 0.95), ("y", 0.05), ("z", None))]
    encoded = heat_map(rows, "accuracy", trains=["a"], tests=["x", "y", "z"], iid={})
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
    blue = np.argwhere(pixels[..., 2] - pixels[..., 0] > 60)[:, 1]
    red = np.argwhere(pixels[..., 0] - pixels[..., 2] > 60)[:, 1]
    assert blue.size > 500 and red.size > 500 and np.median(blue) < np.median(red)


@pytest.mark.parametrize(
    ("sfc", "proxy", "finding"),
    [
        (0.9, -1.0, "With the image right, from text alone wrong; the image model fits the label better, so"),
        (0.6, 1.0, "Both models are right; the image model fits the label better, so this comparison weighs more."),
        (0.1, 1.0, "Both models are right; the text-only model fits the label better, so this comparison weighs less."),
        (0.4, 0.0, "With the image right, from text alone undecided; the text-only model"),
        (0.5, 1.0, "Both models are right; both fit the label equally well."),
    ],
)
def test_examples_say_what_their_margins_mean(tmp_path, sfc, proxy, finding):
    example = SfcExample("long", "highest", sfc, (), "prompt", "yes", "no", 1.0, proxy)
    assert finding in Page(written(tmp_path, ReportData("t", "", {}, [], [], (), (), (), {}, examples=[example]))).text


@pytest.mark.filterwarnings("error:constrained_layout")
@pytest.mark.parametrize("labels", [1, 2, 27, 216])
def test_curves_have_room_beside_their_legend(labels: int):
    curves = [Curve("loss", f"objective {i % labels}", [1, 2], [1.0, i]) for i in range(labels + 2)]
    assert training_curves(curves).startswith(b"\x89PNG")
