"""Numbers kept of every comparison from visit to visit: by hand, through real steps, on any mesh, and over a resume."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import signal
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run, write_pairs
from test_objectives import comparisons, seen
from test_rivals import HIGH, LN2, LOW, SURE
from test_sharding import groups
from test_sharding import program as program_on
from tiny_models import MODEL, make_batch, random_params, with_numbers

from mmrm_jax.config import OptimizerConfig, TrainConfig
from mmrm_jax.data.buckets import GroupShape
from mmrm_jax.data.pipeline import EncodedSource
from mmrm_jax.eval import single
from mmrm_jax.objectives import Terms, find_objective
from mmrm_jax.train.preemption import PREEMPTED
from mmrm_jax.train.step import _learnt, _remembered

CONFIG = TrainConfig(objective="lff", optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0))
SMALL = ["--batch-size", 8, "--data.holdout", 0, "--data.buckets", 1, "--log-every", 1, "--checkpoint-every", 1]


@pytest.mark.usefixtures("strict_numerics")
def test_weights_go_by_running_means_by_hand() -> None:
    """Three comparisons with the same margins now: seen with other losses before, with losses of 1, and never."""
    memory = jnp.asarray([[HIGH, LN2], [1.0, 1.0], [0.0, 0.0]])
    margins = {"primary": jnp.full(3, SURE), "proxy": jnp.full(3, -SURE)}

    def terms(spec: str):
        what = dataclasses.replace(seen(margins, comparisons(3)), memory=memory)
        found = find_objective(spec).terms
        return jax.jit(lambda s: (found(s).loss, found(s).memory))(what)

    loss, kept = terms("lff:q=0,running=0.5")
    means = np.array([[(HIGH + LOW) / 2, (LN2 + HIGH) / 2], [(1 + LOW) / 2, (1 + HIGH) / 2], [LOW, HIGH]])
    np.testing.assert_allclose(kept, means, rtol=1e-5)
    np.testing.assert_allclose(loss, means[:, 1] / means.sum(1) * LOW + HIGH, rtol=1e-5)
    # Nothing kept is the step's losses, all kept those of the first visit.
    np.testing.assert_allclose(terms("lff:q=0,running=0")[0], HIGH / (HIGH + LOW) * LOW + HIGH, rtol=1e-5)
    first = np.array([LN2 / (LN2 + HIGH), 0.5, HIGH / (HIGH + LOW)])
    np.testing.assert_allclose(terms("lff:q=0,running=1")[0], first * LOW + HIGH, rtol=1e-5)


def test_means_have_no_gradient() -> None:
    objective = find_objective("lff:q=0")

    def total(d):
        what = dataclasses.replace(seen({"primary": d, "proxy": d}, comparisons(2)), memory=jnp.ones((2, 2)))
        return jnp.sum(objective.terms(what).loss)

    # Both branches lose alike, so every weight is 1/2: (1/2 + 1) times the gradient -(1 - p) of each.
    found = jax.grad(total)(jnp.asarray([SURE, -SURE]))
    np.testing.assert_allclose(found, [-1.5 / 4, -1.5 * 3 / 4], rtol=1e-5)


def two_steps(monkeypatch, sizes=(1, 1, 1), **options) -> tuple[np.ndarray, list[dict[str, float]]]:
    """What is known of the comparisons after two steps on the same groups, and the metrics of both."""
    micro_batches = options.get("micro_batches", 1)
    program = program_on(monkeypatch, sizes, dataclasses.replace(CONFIG, micro_batches=micro_batches))
    known = with_numbers(groups())
    program = dataclasses.replace(program, comparisons=sum(len(g.comparisons) for g in known))
    batch = program.put(make_batch(known, MODEL, **{"num_groups": 8} | options))
    state = program.init(random_params(MODEL, 1), CONFIG)
    metrics = []
    for _ in range(2):
        state, found = program.train_step(state, batch)
        metrics.append({k: float(v) for k, v in jax.device_get(found).items()})
    return np.asarray(state.memory), metrics


def test_the_same_is_kept_on_any_mesh(monkeypatch) -> None:
    expected, metrics = two_steps(monkeypatch)
    memory, found = two_steps(monkeypatch, (2, 2, 2), micro_batches=2, num_groups=16, extra=1)
    np.testing.assert_allclose(memory, expected, rtol=1e-5, atol=1e-5)
    assert found[1]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-5)
    # Means over comparisons of exponential means are those of the means over comparisons.
    for column, branch in enumerate(("primary", "proxy")):
        mean = 0.7 * metrics[0][f"{branch}/loss"] + 0.3 * metrics[1][f"{branch}/loss"]
        assert expected[:, column].mean() == pytest.approx(mean, rel=1e-5)
    assert len(np.unique(expected[:, 0])) > 5 and np.all(expected > 0)


def test_a_comparison_that_a_batch_has_several_times_is_kept_as_once() -> None:
    """Two copies of one, of which the mean is kept, another by itself, and padding, which is none."""
    memory = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    c = comparisons(4, mask=[True, True, True, False])
    c = dataclasses.replace(c, given={"number": jnp.asarray([2.0, 2.0, 0.0, 0.0])})
    kept = jnp.asarray([[7.0, 8.0], [9.0, 12.0], [-1.0, -2.0], [50.0, 50.0]])
    terms = Terms(jnp.zeros(4), {}, memory=kept)
    parts = [dataclasses.replace(c, mask=c.mask & jnp.asarray(here)) for here in ([1, 0, 0, 1], [0, 1, 1, 1])]
    for learnt in (_learnt(terms, c, memory), sum(_learnt(terms, part, memory) for part in parts)):
        np.testing.assert_allclose(_remembered(memory, learnt), [[-1, -2], [3, 4], [8, 10]], rtol=1e-6)
    assert _remembered(None, None) is None


def test_comparisons_are_numbered_over_all_groups() -> None:
    shapes = tuple(GroupShape({}, (1, 1), 0, count) for count in (2, 1, 0, 3))
    cache = dict.fromkeys(range(4))
    data = EncodedSource(None, None, {}, tuple(range(4)), shapes, cache)  # type: ignore[arg-type]
    numbers = data.with_numbers().given["number"]
    assert [n.tolist() for n in numbers] == [[0, 1], [2], [], [3, 4, 5]] and data.comparisons == 6
    many = dataclasses.replace(data, shapes=(GroupShape({}, (1, 1), 0, 2**24 + 1),))
    with pytest.raises(ValueError, match="at most 16777216 comparisons, and there are 16777217"):
        many.with_numbers()


@pytest.mark.usefixtures("its_own_device")
def test_a_stopped_run_goes_on_with_what_it_knew(capsys, tmp_path: Path, monkeypatch) -> None:
    """Twelve comparisons in batches of 8: the second step sees some again. Exporting takes no heed of memory."""
    write_pairs(tmp_path, "a", 12)
    command = functools.partial(run, capsys, "train", "--data", tmp_path / "a.jsonl", "--objective", "lff", *SMALL)
    status, text = command("--steps", 3, "--out", tmp_path / "whole")
    assert status == 0, text
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(single, "handled", lambda mesh: nullcontext(lambda: signal.SIGTERM if next(asked) == 2 else None))
        status, text = command("--steps", 3, "--out", tmp_path / "stopped")
        assert status == PREEMPTED, text
    status, text = command("--steps", 3, "--out", tmp_path / "stopped")
    assert status == 0 and "going on from step" in text, text
    lines = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    assert lines[0] == lines[1]
    status, text = run(capsys, "export", "--run", tmp_path / "stopped", "--out", tmp_path / "model")
    assert status == 0, text
