"""`mmrm audit`: data sets in, terminal summary, JSON and report out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress as RichProgress

from mmrm_jax.audit.across import near_duplicates, overlap, text_families, transfer
from mmrm_jax.audit.examples import Example, find_examples
from mmrm_jax.audit.features import Words, count_words
from mmrm_jax.audit.page import AuditPage, write_page
from mmrm_jax.audit.pairs import Corpus, index_comparisons
from mmrm_jax.audit.repeats import repeats
from mmrm_jax.audit.study import Study, study
from mmrm_jax.audit.styles import count_styles
from mmrm_jax.audit.telling import telling_words
from mmrm_jax.audit.terminal import print_audit
from mmrm_jax.audit.verdict import DEFINITION, advice, level, sentences, transfer_sentences
from mmrm_jax.data.quarantine import keep_quarantine
from mmrm_jax.data.records import split_name, summarise_quarantine, write_quarantine
from mmrm_jax.data.sources import GroupSource
from mmrm_jax.train.setup import open_spec
from mmrm_jax.types import Quarantined

Progress = Callable[[str, Iterable], Iterable]


def audit(
    data: Sequence[str], out: Path, image_root: Path | None, console: Console, command: str = ""
) -> dict[str, Any]:
    """Audit every data set, print what was found, and write `out/report.html` and `out/quarantine.jsonl`.

    Raises DataError where a data set cannot be read, ValueError where two have one name.
    """
    started = time.monotonic()
    named, report = name_data(data), out / "report.html"
    if report.exists():
        console.print(f"{report} is there, and will be replaced", soft_wrap=True, highlight=False)
    opened: list[tuple[str, str, GroupSource]] = []
    quarantined: list[Quarantined] = []
    with keep_quarantine(out / "quarantine.jsonl"):
        for name, spec in named.items():
            source, bad = open_spec(spec, Path(), image_root)
            opened.append((name, spec, source))
            quarantined += bad
    if quarantined:
        console.print(summarise_quarantine(quarantined))
        console.print(f"all of them: {out / 'quarantine.jsonl'}", soft_wrap=True, highlight=False)
    with RichProgress(console=console, transient=True, disable=not console.is_terminal) as bar:

        def progress(name: str, items: Iterable) -> Iterable:
            return bar.track(list(items), description=escape(name))

        corpus = index_comparisons(opened, lambda name, rows: progress(f"reading {name}", rows))
        result, examples = study_corpus(corpus, progress)
    result["seconds"] = time.monotonic() - started
    result["quarantined"] = [dataclasses.asdict(entry) for entry in quarantined]
    out.mkdir(parents=True, exist_ok=True)
    write_quarantine(out / "quarantine.jsonl", quarantined)
    write_page(report, AuditPage(command, result, examples, quarantined))
    print_audit(result, console)
    console.print(f"report: {report}", soft_wrap=True, highlight=False)
    return result


def name_data(data: Sequence[str]) -> dict[str, str]:
    """Name -> data of each NAME=DATA; without a name, a file is called by its stem, a split by its own name."""
    named: dict[str, str] = {}
    for text in data:
        given, spec = split_name(text)
        given = given or Path(spec).name.partition(":")[2] or Path(spec).stem
        if not given or not spec:
            raise ValueError(f"{text!r} must be DATA or NAME=DATA")
        if given in named:
            raise ValueError(
                f"two data sets would be called {given!r}: {named[given]} and {spec}; name them, as in "
                f"one={named[given]} two={spec}"
            )
        named[given] = spec
    return named


def study_corpus(
    corpus: Corpus, progress: Progress = lambda name, items: items
) -> tuple[dict[str, Any], list[Example]]:
    """Everything that is measured, as JSON, and comparisons to look at."""
    words = count_words(corpus.texts)
    styles = count_styles(corpus.texts, words.lengths)
    families = text_families(words.sets)
    studies = [
        study(pairs, words, styles, lambda name, items: progress(f"fitting {name}", items))
        for pairs in corpus.environments
    ]
    for each in studies:
        _describe(each, corpus, words)
    matrix = transfer(studies, words)
    result = {
        "definition": DEFINITION,
        "environments": [each.result for each in studies],
        "matrix": matrix,
        "across": transfer_sentences(matrix),
        "overlap": overlap(corpus.environments, families),
    }
    shown = [each for each in studies if level(each.result) != "none"]  # there, sureness would mean nothing
    return result, [example for each in shown for example in find_examples(each)]


def _describe(each: Study, corpus: Corpus, words: Words) -> None:
    """Add words, repeats and the verdict to a study's result."""
    pairs, result = each.pairs, each.result
    weights = each.weights
    result["words"] = [] if weights is None else telling_words(words, weights, pairs.chosen, pairs.rejected)
    result["repeats"] = repeats(pairs)
    result["near_duplicates"] = near_duplicates(pairs, corpus.texts, words.sets)
    result["verdict"] = {"level": level(result), "sentences": sentences(result), "command": advice(result)}
