"""What the numbers mean, in plain words."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from mmrm_jax.audit.baselines import MIN_COMPARISONS
from mmrm_jax.audit.study import NEW_TEXTS, WORDS, words_tell
from mmrm_jax.audit.styles import LENGTHS, STYLES
from mmrm_jax.eval.metrics import MIN_CLUSTERS
from mmrm_jax.eval.summary import between, percent

Level = Literal["too few", "none", "weak", "clear", "strong"]
_SAID = 6
_OTHERS = STYLES[len(LENGTHS) :]
_BALANCED = 0.2  # the most that is left over of texts which are chosen about as often as rejected
CLEAR, STRONG = 0.1, 0.4  # shortcut shares from which it is called so: accuracies of .55 and .70

DEFINITION = (
    "Shortcut share: max(0, 2 × accuracy − 1) of the surest text-only baseline on held-out comparisons, the share of "
    "comparisons that text explains beyond chance. It is a lower bound: a better text-only model may find more. Its "
    "interval holds for all baselines together (Bonferroni)."
)


def level(result: Mapping[str, Any]) -> Level:
    """How much of a shortcut there is; "too few" comparisons or images say nothing."""
    found = result["shortcut"]
    if found is None or result["units"] < MIN_CLUSTERS:
        return "too few"
    if not found["above"]:
        return "none"
    return "weak" if found["share"] < CLEAR else "clear" if found["share"] < STRONG else "strong"


def sentences(result: Mapping[str, Any]) -> list[str]:
    """The verdict on one environment, the most important first."""
    found = level(result)
    if found == "too few":
        return [_too_few(result)]
    said = [_none(result) if found == "none" else _some(result, found), *_below_chance(result)]
    if found != "none":
        said += _length(result) + _styles(result) + _words(result)
    return said + _ceiling(result) + _conflicts(result)


def furthest(results: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The environment in which text goes furthest; the first where several are alike."""
    order: tuple[Level, ...] = ("strong", "clear", "weak", "none", "too few")
    return min(results, key=lambda each: order.index(level(each)))


def advice(result: Mapping[str, Any]) -> str | None:
    """The command that asks a text-only model, where there is something to ask."""
    if level(result) in ("none", "too few"):
        return None
    command = ("mmrm", "train", "--objective", "text_only", "--data", result["data"], "--out", "runs/text-only")
    return shlex.join(command)


def _too_few(result: Mapping[str, Any]) -> str:
    return (
        f"Too little to say: {_many(result['comparisons'], 'comparison')} in "
        f"{_many(result['units'], 'independent group')}; a held-out estimate needs at least {MIN_COMPARISONS} in "
        f"{MIN_CLUSTERS}."
    )


def _none(result: Mapping[str, Any]) -> str:
    found = result["shortcut"]
    best = _baseline(result, found["baseline"])
    return (
        f"No text-only shortcut was found: the surest of {len(result['baselines'])} text-only baselines "
        f"({found['baseline']}) is right in {_rate(best)} of held-out comparisons, no better than guessing. One that "
        f"explains up to {percent(found['high'])} % may have gone unseen, and so may one that is not in single words."
    )


def _some(result: Mapping[str, Any], found: Level) -> str:
    share = result["shortcut"]
    best = _baseline(result, share["baseline"])
    words = {"weak": "Text gives a little away", "clear": "Text gives much away", "strong": "Text alone goes far"}
    return (
        f"{words[found]}: a baseline that never sees an image ({share['baseline']}) is right in {_rate(best)} of "
        f"held-out comparisons. Text explains {percent(share['share'])} % of them beyond chance "
        f"({between(share['low'], share['high'], percent)}), or more: this is a lower bound."
    )


def _rate(row: Mapping[str, Any]) -> str:
    bounds = between(row["low"], row["high"], percent)
    return f"{percent(row['accuracy'])} %" + (f" ({bounds})" if bounds else "")


def _baseline(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(row for row in result["baselines"] if row["name"] == name)


def _below_chance(result: Mapping[str, Any]) -> list[str]:
    """Why a bag of words may be worse than guessing, which is no shortcut."""
    row = _baseline(result, WORDS)
    if row["high"] is None or row["high"] >= 0.5:
        return []
    said = f"The bag of words is right in only {_rate(row)}, less than guessing; that is no shortcut."
    balance = result["responses"]["balance"]
    held_out = any(row["name"] == NEW_TEXTS for row in result["baselines"])
    if held_out and balance is not None and balance < _BALANCED:
        new = _baseline(result, NEW_TEXTS)
        said += (
            " The same responses come back with other images, chosen about as often as rejected (of their "
            f"appearances {percent(balance)} % are left over), so what is held out tips the rest the other way. Where "
            f"the texts of a comparison are held out too, it is {_rate(new)}."
        )
    return [said]


def _length(result: Mapping[str, Any]) -> list[str]:
    """Where one is longer, how often the longer one wins, or the shorter."""
    for row in _marked(result, LENGTHS):
        longer = row["agreement"] > 0.5
        ends = (row["low"], row["high"]) if longer else (1 - row["high"], 1 - row["low"])
        rate = max(row["agreement"], 1 - row["agreement"])
        return [
            f"Where one is longer, the {'longer' if longer else 'shorter'} response wins in {percent(rate)} % "
            f"({between(*ends, percent)}; n = {row['n']}; length in {row['style']})."
        ]
    return []


def _marked(result: Mapping[str, Any], names: Collection[str]) -> list[Mapping[str, Any]]:
    """The rows of these styles that lie on one side of chance."""
    rows = [row for row in result["styles"] if row["style"] in names and row["low"] is not None]
    return [row for row in rows if row["n"] >= MIN_COMPARISONS and not row["low"] <= 0.5 <= row["high"]]


def _styles(result: Mapping[str, Any]) -> list[str]:
    """The styles, lengths apart, that lie on one side of chance, the farthest first."""
    marked = sorted(_marked(result, _OTHERS), key=lambda row: -abs(row["agreement"] - 0.5))
    told = [
        f"{row['style']} {percent(row['agreement'])} % ({between(row['low'], row['high'], percent)}; n = {row['n']})"
        for row in marked[:3]
    ]
    return (
        [f"Where the two differ in style, how often the one with more of it wins: {', '.join(told)}."] if told else []
    )


def _words(result: Mapping[str, Any]) -> list[str]:
    if not words_tell(result):
        return []
    sides = {sign: [w["word"] for w in result["words"] if sign * w["weight"] > 0][:5] for sign in (1, -1)}
    names = {1: "for", -1: "against"}
    parts = [f"{names[sign]} a response: {', '.join(words)}" for sign, words in sides.items() if words]
    return [f"Words that speak {'; '.join(parts)}."] if parts else []


def _ceiling(result: Mapping[str, Any]) -> list[str]:
    found = result["repeats"]
    if not found["turned"]:
        return []
    return [
        f"{percent(found['turned'])} % of the comparisons are of two responses that another image, or the same, ranks "
        f"the other way: no text-only model is right in more than {percent(found['ceiling'])} % of this file."
    ]


def _conflicts(result: Mapping[str, Any]) -> list[str]:
    found = result["repeats"]
    said = []
    if found["conflicts"]:
        said.append(
            f"{_many(found['conflicts'], 'pair')} of responses to the same image and prompt "
            f"{'is' if found['conflicts'] == 1 else 'are'} labelled both ways; any model is wrong in at least "
            f"{found['conflict_errors']} of the comparisons."
        )
    if found["cycles"]:
        said.append(f"Preferences go round in a circle for {_many(found['cycles'], 'image')} with a prompt.")
    return said


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


def transfer_sentences(matrix: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where words learnt in one environment are turned round in another, or carry over: the _SAID most marked."""
    said: list[tuple[float, str]] = []
    for row in matrix:
        if row["train"] == row["test"] or row["low"] is None:
            continue
        rate = f"{percent(row['accuracy'])} % ({between(row['low'], row['high'], percent)})"
        if row["high"] < 0.5:
            said.append(
                (row["accuracy"], f"What words say in {row['train']} is turned round in {row['test']}: {rate}.")
            )
        elif row["low"] > 0.5:
            said.append((1 - row["accuracy"], f"What words say in {row['train']} holds in {row['test']} too: {rate}."))
    return [sentence for _, sentence in sorted(said)[:_SAID]]
