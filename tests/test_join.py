"""Rows of one image and prompt as one group: the same comparisons, loss and gradients, with fewer images."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tiny_models import flat, relative_errors

from mmrm_jax.config import DataConfig, MeshConfig, TrainConfig
from mmrm_jax.data.join import join_groups, join_rows
from mmrm_jax.data.pipeline import MakeBatch, buckets_for, index_source
from mmrm_jax.data.records import read_quarantine
from mmrm_jax.data.sources import open_source
from mmrm_jax.sharding import make_mesh
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.compiling import compilations_heard
from mmrm_jax.train.program import build_program
from mmrm_jax.train.setup import compile_ahead, encode, initial_params, open_checkpoint, training_feed
from mmrm_jax.types import Comparison, Group

VIEWS = {"primary": "multimodal", "proxy": "absent"}


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(MODEL_DIR)


@pytest.fixture
def rows(tmp_path):
    """Seven rows of three images, two of which are the same bytes under two names."""
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes())
    texts = [("a", "x", "y"), ("b", "x", "y"), ("c", "z", "x"), ("a", "x", "y"), ("b", "y", "w"), ("a", "y", "w")]
    lines = [
        {"id": str(i), "prompt": "what?", "img_path": f"{image}.png", "chosen": chosen, "rejected": rejected}
        for i, (image, chosen, rejected) in enumerate(texts)
    ]
    lines.append(lines[0] | {"id": "6", "prompt": "why?"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_source(file)[0]


def compared(data):
    groups = [data.group(i) for i in range(len(data))]
    return sorted((g.prompt, g.responses[c.winner], g.responses[c.loser]) for g in groups for c in g.comparisons)


def test_responses_stand_once_and_comparisons_follow_them():
    group = Group("1", "p", ("a", "b"), (Comparison(1, 0, 0.5),), None, "e", "f", 3)
    other = dataclasses.replace(group, id="2", responses=("c", "b", "a"), row=9, comparisons=(Comparison(0, 2),))
    joined = join_groups([group, other])
    assert joined.responses == ("a", "b", "c") and joined.comparisons == (Comparison(1, 0, 0.5), Comparison(2, 0))
    assert (joined.id, joined.row) == ("1, 2", 3)


@pytest.mark.parametrize("cache", [True, False])
def test_rows_of_one_image_and_prompt_are_one_group(rows, checkpoint, cache):
    data, _ = index_source(rows, checkpoint.processor, VIEWS, cache=cache)
    joined = join_rows(data, 9)
    assert [joined.group(i).id for i in range(len(joined))] == ["0, 2, 3, 5", "1, 4", "6"]
    assert compared(joined) == compared(data)  # the doubled row counts twice, as it did
    assert joined.group(0).responses == ("x", "y", "z", "w")
    assert [len(joined.encode(i).comparisons) for i in range(3)] == [4, 2, 1]
    two = join_rows(data, 2)
    assert [two.group(i).id for i in range(len(two))] == ["0, 2", "1, 4", "3, 5", "6"]


@pytest.mark.parametrize("most", [1, 9])
def test_every_row_of_an_image_that_does_not_decode_is_reported(rows, checkpoint, tmp_path, most):
    groups = list(rows.groups)
    # Its header is whole: that it is damaged is met while training.
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    for i in (0, 2, 3):
        groups[i] = dataclasses.replace(groups[i], image=tmp_path / "cut.png")
    data, _ = index_source(dataclasses.replace(rows, groups=tuple(groups)), checkpoint.processor, VIEWS, cache=False)
    data = data if most == 1 else join_rows(data, most)
    MakeBatch(data, buckets_for([data], 1), 8, quarantine=tmp_path / "bad.jsonl")(np.arange(len(data)))
    bad = read_quarantine(tmp_path / "bad.jsonl")
    assert [(q.row, q.id) for q in bad] == [(1, "0"), (3, "2"), (4, "3")]
    assert all("cut.png" in q.reason for q in bad)


@pytest.mark.parametrize("cache", [True, False])
def test_a_row_without_a_comparison_is_quarantined(rows, checkpoint, cache):
    groups = list(rows.groups)
    groups[1] = dataclasses.replace(groups[1], comparisons=())
    config = TrainConfig(data=DataConfig(cache=cache))
    source = dataclasses.replace(rows, groups=tuple(groups))
    data, quarantined = encode(source, checkpoint, VIEWS, config, name="rows", console=Console(quiet=True))
    assert [(q.row, q.reason.split(":")[0]) for q in quarantined] == [(2, "no comparison")]
    found = [data.encode(i) for i in range(len(data))]
    assert [e.index for e in found] == list(range(len(rows.groups) - 1))
    assert [data.group(i).id for i in range(len(data))] == [g.id for g in groups if g.comparisons]
    assert tuple(e.shape for e in found) == data.shapes


def test_a_row_that_does_not_fit_is_left_out_alone(rows, checkpoint):
    groups = list(rows.groups)
    groups[2] = dataclasses.replace(groups[2], responses=("word " * 5000, "x"))
    data, quarantined = encode(
        dataclasses.replace(rows, groups=tuple(groups)),
        checkpoint,
        VIEWS,
        TrainConfig(),
        name="rows",
        console=Console(quiet=True),
        join=9,
    )
    assert [entry.row for entry in quarantined] == [3]
    assert data.group(0).id == "0, 3, 5"


@pytest.mark.parametrize("batch_size, devices", [(2, 1), (8, 8)])
def test_a_step_that_was_compiled_ahead_is_not_compiled_again(rows, checkpoint, batch_size, devices):
    config = TrainConfig(batch_size=batch_size, data=DataConfig(buckets=2))
    mesh = make_mesh(MeshConfig(devices), jax.devices()[:devices])
    program = build_program(checkpoint.config, config, 10, mesh)
    data, _ = index_source(rows, checkpoint.processor, VIEWS, cache=True)
    buckets = buckets_for([data], config.data.buckets)
    feed = training_feed(data, buckets, config, 10, program.mesh, quarantine=Path("unused"))
    with compilations_heard((ahead := []).append):
        assert compile_ahead(program, feed) > 0
    state = program.init(initial_params(checkpoint, 0, program.mesh)[0], config)
    batches = [program.put(batch) for batch in feed.batches(0)]
    assert len({tuple(x.shape for x in jax.tree.leaves(batch)) for batch in batches}) == 2
    with compilations_heard((again := []).append):
        for batch in batches:
            state, _ = program.train_step(state, batch)
    assert (len(ahead), len(again)) == (2, 0)


def test_the_loss_and_gradients_are_those_of_the_rows(rows, checkpoint):
    config = TrainConfig(batch_size=8, freeze=())
    program = build_program(checkpoint.config, config, 10)
    data, _ = index_source(rows, checkpoint.processor, VIEWS, cache=True)
    found = []
    for source in (data, join_rows(data, 9)):
        state = program.init(initial_params(checkpoint, 0, program.mesh)[0], config)
        batch = MakeBatch(source, buckets_for([source], 1), 8)(np.arange(len(source)))
        state, metrics = program.train_step(state, program.put(batch))
        moments = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        mu = next(m.mu for m in moments if hasattr(m, "mu"))
        found.append((float(metrics["loss"]), float(metrics["grad_norm"]), mu))
    (loss, norm, mu), (joined_loss, joined_norm, joined_mu) = found
    assert joined_loss == pytest.approx(loss, rel=1e-5) and joined_norm == pytest.approx(norm, rel=1e-5)
    for branch in VIEWS:
        errors = relative_errors(flat(joined_mu[branch]), flat(mu[branch]))
        errors = {name: error for name, error in errors.items() if not name.endswith("vision/layers/k/bias")}
        assert max(errors.values()) < 1e-4, branch
