"""Objectives with a run before theirs: losses by hand, whose margins they are given, what they start from and train."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run, write_pairs
from test_objectives import comparisons, seen
from test_rivals import HIGH, LN2, LOW, SURE

from mmrm_jax.data.batching import EncodedGroup
from mmrm_jax.data.buckets import GroupShape
from mmrm_jax.data.pipeline import BatchPlan, EncodedSource
from mmrm_jax.eval import stages
from mmrm_jax.eval.evaluate import Evaluation
from mmrm_jax.eval.stages import with_margins
from mmrm_jax.files import alone
from mmrm_jax.objectives import Before, find_objective
from mmrm_jax.signals import PREEMPTED

pytestmark = pytest.mark.usefixtures("one_device")

GIVEN = {"primary": [1.0, -1.0, 2.0, 0.0], "proxy": [-1.0, 1.0, 0.0, SURE]}


def losses(spec: str, **fields) -> np.ndarray:
    """Of margins (ln 3, -ln 3, 0, 0), the third a tie, with GIVEN from the run before."""
    c = comparisons(4, tie=[False, False, True, False], **fields)
    given = {name: jnp.asarray(values, jnp.float32) for name, values in GIVEN.items()}
    what = seen({"primary": jnp.asarray([SURE, -SURE, 0.0, 0.0])}, dataclasses.replace(c, given=given))
    return np.asarray(jax.jit(lambda s: find_objective(spec).terms(s).loss)(what))


@pytest.mark.usefixtures("strict_numerics")
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # The model before was wrong on the second, undecided on the last, and saw a difference (2 sqrt(p q) = .65) in
        # the tie, where text saw none.
        ("jtt:weight=3", [LOW, 3 * HIGH, LN2, 3 * LN2]),
        ("jtt:weight=3,errors=text", [3 * LOW, HIGH, LN2, LN2]),
        ("text_filtered", [LOW, 0, 0, 0]),
        ("text_filtered:keep=0.5,folds=2", [LOW, HIGH / 2, LN2 / 2, LN2 / 2]),
    ],
)
def test_weights_by_hand(spec: str, expected: list[float]) -> None:
    np.testing.assert_allclose(losses(spec), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("strict_numerics")
def test_targets_of_the_teacher_by_hand() -> None:
    # p_b = sigmoid(-1), sigmoid(1), 1 of the tie whose two are equal to text, 3/4; the last teacher is undecided.
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    targets = [sigmoid(1 - sigmoid(-1)), sigmoid(-(1 - sigmoid(1))), 0.5, 0.5]
    expected = [t * low + (1 - t) * high for t, low, high in zip(targets, (LOW, HIGH, LN2, LN2), (HIGH, LOW, LN2, LN2))]
    np.testing.assert_allclose(losses("confidence_reg"), expected, rtol=1e-5)


@pytest.mark.usefixtures("strict_numerics")
def test_coefficients_of_a_text_only_model_of_before_by_hand() -> None:
    # Lt = softplus(1), softplus(-1), ln 2, ln 4/3; SFC = Lt / (Lt + L), and the last primary loss is ln 2.
    text = [math.log1p(math.e), math.log1p(math.exp(-1)), LN2, LOW]
    expected = [t / (t + own) * own for t, own in zip(text, (LOW, HIGH, LN2, LN2))]
    np.testing.assert_allclose(losses("frozen_proxy"), expected, rtol=1e-5)
    assert find_objective("frozen_proxy").branches == {"primary": "multimodal"}


@pytest.mark.usefixtures("strict_numerics")
def test_the_last_layer_sees_a_balance_by_hand() -> None:
    # Text is wrong on the first alone: half of the weight is its; the mean over the batch is that of both halves.
    found = losses("dfr")
    assert found.mean() == pytest.approx(LOW / 2 + (HIGH + LN2 + LN2) / 3 / 2, rel=1e-5)
    # Where the batch has one kind alone, that has all.
    alone = losses("dfr", mask=[True, False, False, False])
    assert alone[0] == pytest.approx(LOW, rel=1e-5)


def test_what_a_run_before_cannot_be() -> None:
    with pytest.raises(ValueError, match="share is 0"):
        Before("standard", share=0.0)
    with pytest.raises(ValueError, match="folds is 3; it must be at least 1, and 1 where a run starts from another"):
        Before("standard", folds=3, start="primary")
    for spec, message in (("text_filtered:folds=1", "at least 2"), ("jtt:errors=all", "model or text")):
        with pytest.raises(ValueError, match=message):
            find_objective(spec)


def test_more_parts_than_images_are_refused(capsys, tmp_path) -> None:
    data = write_pairs(tmp_path, "a", 4)
    status, text = run(
        *(capsys, "train", "--data", data, "--out", tmp_path / "run", "--objective", "text_filtered:folds=5"),
        *("--batch-size", 4, "--steps", 2, "--data.holdout", 0),
    )
    assert status == 2 and "text_filtered:folds=5 takes 5 parts of the images, and the data have 4" in text, text


def test_margins_go_to_the_groups_they_are_of() -> None:
    counts = (2, 1, 0, 3)
    shapes = tuple(GroupShape({}, (1, 1), 0, count) for count in counts)
    groups = {i: EncodedGroup(i, {}, (), None, ()) for i in range(4)}
    data = EncodedSource(None, None, {}, tuple(range(4)), shapes, groups)  # type: ignore[arg-type]

    def found(group: list[int], margins: list[float]) -> Evaluation:
        n = np.zeros(len(group), np.int32)
        return Evaluation(np.asarray(group), n, n, n > 0, {"proxy": np.asarray(margins, np.float32)}, None, {})

    both = [found([3, 3, 3], [4.0, 5.0, 6.0]), found([0, 0], [1.0, 2.0])]  # group 1 could not be read
    given = with_margins(data, ("proxy",), both)
    assert [given.encode(i).given["proxy"].tolist() for i in range(4)] == [[1, 2], [0], [], [4, 5, 6]]  # type: ignore
    assert given.only([3, 1]).encode(0).given["proxy"].tolist() == [4, 5, 6]  # type: ignore[union-attr]


def test_a_plan_of_some_groups_visits_these_and_no_others() -> None:
    positions = np.array([1, 4, 5, 7, 8])
    plan = BatchPlan([0, 0, 1, 0, 1], 2, 0, 5, positions)
    visited = np.concatenate([plan[i] for i in range(5)])
    assert sorted(visited.tolist()) == sorted([*positions.tolist()] * 2)


@pytest.mark.parametrize("spec", ["text_filtered:folds=2", "dfr", "mmlora:rank=2"])
def test_a_run_with_one_before_it_goes_on_to_the_same(capsys, tmp_path, spec: str) -> None:
    """What follows starts from the run before, trains what it may, and a second command changes nothing."""
    write_pairs(tmp_path, "t", 16)
    out = tmp_path / "run"
    command = ["train", "--data", tmp_path / "t.jsonl", "--out", out, "--objective", spec, "--steps", 2]
    command += ["--batch-size", 8, "--data.holdout", 0, "--data.buckets", 1]
    status, text = run(capsys, *command)
    assert status == 0, text
    runs = sorted(p.name for p in (out / "before").iterdir())
    assert runs == (["0", "1"] if spec.startswith("text_filtered") else ["0"])
    before = (out / "metrics.jsonl").read_text()
    status, text = run(capsys, *command)
    assert status == 0 and "finished before, at step 2" in text, text
    assert (out / "metrics.jsonl").read_text() == before


def test_a_signal_while_the_run_before_is_measured_stops(monkeypatch, capsys, tmp_path) -> None:
    """What it has trained is saved, and is not trained again."""
    write_pairs(tmp_path, "t", 16)
    command = ["train", "--data", tmp_path / "t.jsonl", "--out", tmp_path / "run", "--objective", "frozen_proxy"]
    command += ["--steps", 2, "--batch-size", 8, "--data.holdout", 0, "--data.buckets", 1]
    measure = stages.evaluate

    def signalled(*args, **kwargs) -> Evaluation:
        os.kill(os.getpid(), signal.SIGTERM)
        while "saving after this step" not in capsys.readouterr().err:
            time.sleep(0.01)
        return measure(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate", signalled)
        status, text = run(capsys, *command)
    assert status == PREEMPTED and "stopped by SIGTERM and saved at step 2" in text, text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    trained = (tmp_path / "run" / "before" / "0" / "metrics.jsonl").stat().st_mtime_ns
    status, text = run(capsys, *command)
    assert status == 0 and (tmp_path / "run" / "metrics.jsonl").exists(), text
    last = json.loads((tmp_path / "run" / "before" / "0" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and trained


def test_a_second_command_in_the_same_directory_is_refused(capsys, tmp_path) -> None:
    write_pairs(tmp_path, "t", 16)
    out = tmp_path / "run"
    command = ["train", "--data", tmp_path / "t.jsonl", "--out", out, "--steps", 1, "--batch-size", 8]
    matrix = ["matrix", "--env", "A=t.jsonl,t.jsonl", "--root", tmp_path, "--out", out]
    with alone(out, ".lock", "is training there"):
        for words in (command, matrix):
            status, text = run(capsys, *words)
            assert status == 2 and f"{out} is in use: another command" in " ".join(text.split()), text
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert not out.exists(), "nothing came of it"
