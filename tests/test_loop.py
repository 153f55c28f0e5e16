"""The training loop leaves the right things behind, and goes on where it stopped as if it never had."""

import dataclasses
import functools
import io
import itertools
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from mmrm_jax.config import RESUMABLE, DecoderConfig, ModelConfig, TrainConfig, VisionConfig
from mmrm_jax.data.images import Preprocessing
from mmrm_jax.data.pipeline import BatchPlan, MakeBatch, batches, buckets_for, index_source
from mmrm_jax.data.processor import Processor
from mmrm_jax.data.sources import MemorySource
from mmrm_jax.data.text import TEMPLATES, ChatTokenizer
from mmrm_jax.tiny.tokenizer import VOCABULARY_SIZE, train_tokenizer
from mmrm_jax.train.checkpoint import CheckpointError, Checkpoints, check_config, write_config
from mmrm_jax.train.interval import Interval
from mmrm_jax.train.loop import TrainingError, TrainResult, resume, train
from mmrm_jax.train.preemption import PREEMPTED, Preempted
from mmrm_jax.train.program import Program, build_program
from mmrm_jax.train.run_files import RunFiles
from mmrm_jax.train.setup import training_steps
from mmrm_jax.train.state import TrainState, init_params
from mmrm_jax.types import Comparison, Group

pytestmark = pytest.mark.usefixtures("one_device")

MODEL = ModelConfig(
    vision=VisionConfig(image_size=16, patch_size=4, width=16, mlp_width=16, num_layers=1, num_heads=2),
    decoder=DecoderConfig(
        vocab_size=VOCABULARY_SIZE, width=16, mlp_width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_width=8
    ),
)
CONFIG = TrainConfig(objective="shortcut_aware", batch_size=8, log_every=2, checkpoint_every=3)
STEPS = 6


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_group(index: int) -> Group:
    responses = ("a circle .", f"a red square and {index} circles .", "no")[: 2 + index % 2]
    comparisons = tuple(Comparison(*pair) for pair in itertools.combinations(range(len(responses)), 2))
    return Group(f"g{index}", f"what is {index} ?", responses, comparisons, picture(index), "e", "data.jsonl", index)


@pytest.fixture(scope="module")
def make() -> MakeBatch:
    processor = Processor(
        ChatTokenizer(train_tokenizer(), TEMPLATES["chatml-plain"], MODEL.visual_tokens_per_tile),
        Preprocessing(image_size=16, max_tiles=1),
        max_length=100,
    )
    source = MemorySource(tuple(make_group(i) for i in range(20)))
    data, quarantined = index_source(source, processor, {"primary": "multimodal", "proxy": "absent"}, cache=True)
    assert not quarantined
    return MakeBatch(data, buckets_for([data], 1), CONFIG.batch_size)


@pytest.fixture(scope="module")
def program() -> Program:
    return build_program(MODEL, CONFIG, STEPS)


PARAMS = functools.cache(lambda: init_params(MODEL, 0))


def fresh_state(program: Program) -> TrainState:
    return program.init(PARAMS(), CONFIG)


def stream(make: MakeBatch, start: int = 0, workers: int = 0):
    plan = BatchPlan([0] * len(make.data), CONFIG.batch_size, 0, STEPS)
    return batches(plan, make, start=start, workers=workers)


def read_metrics(run_dir: Path, *, seconds: bool = True) -> list[dict]:
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return entries if seconds else [{k: v for k, v in e.items() if k != "seconds"} for e in entries]


def arrays(state: TrainState) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def latest(run_dir: Path) -> int | None:
    checkpoints = Checkpoints(run_dir / "checkpoints")
    try:
        return checkpoints.latest()
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def finished(program, make, tmp_path_factory):
    """A whole run: its directory, its result and what it reported."""
    run_dir, reported = tmp_path_factory.mktemp("finished") / "run", []
    result = train(
        program, fresh_state(program), stream(make), CONFIG, steps=STEPS, run_dir=run_dir,
        report=lambda step, metrics: reported.append((step, metrics)),
    )  # fmt: skip
    return run_dir, result, reported


def test_what_a_run_leaves_behind(finished, make):
    run_dir, result, reported = finished
    # An interval ends at every second step, and at a checkpoint.
    assert [e["step"] for e in result.history] == [2, 3, 4, 6]
    assert read_metrics(run_dir) == result.history
    assert reported == [(e["step"], e) for e in result.history]
    assert [e["groups"] for e in result.history] == [16, 24, 32, 48]
    seconds = [e["seconds"] for e in result.history]
    assert seconds == sorted(seconds) and seconds[-1] <= result.seconds
    for e in result.history:
        assert e["loss"] > 0 and 0 < e["sfc"] < 1 and e["grad_norm"] > 0
        assert 0 <= e["primary/accuracy"] <= 1 and 0 <= e["proxy/accuracy"] <= 1
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert latest(run_dir) == STEPS
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["3", "6"]
    assert int(result.state.step) == STEPS


def test_histograms_count_every_comparison(finished, make):
    _, result, _ = finished
    plan = BatchPlan([0] * len(make.data), CONFIG.batch_size, 0, STEPS)
    per_step = [sum(make.data.shapes[p].comparisons for p in plan[step]) for step in range(STEPS)]
    expected = [sum(per_step[:2]), per_step[2], per_step[3], sum(per_step[4:])]
    assert [sum(e["sfc/histogram"]) for e in result.history] == expected


def test_an_interval_is_the_mean_of_its_steps(finished, program, make):
    _, result, _ = finished
    each = train(program, fresh_state(program), stream(make), dataclasses.replace(CONFIG, log_every=1), steps=STEPS)
    assert [e["step"] for e in each.history] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "sfc", "primary/margin", "grad_norm"):
        one, many = [e[name] for e in result.history], [e[name] for e in each.history]
        weights = [1.0] * STEPS if name == "grad_norm" else [e["comparisons"] for e in each.history]
        first, last = (np.average(many[part], weights=weights[part]) for part in (slice(0, 2), slice(4, 6)))
        np.testing.assert_allclose(one, [first, many[2], many[3], last], rtol=1e-6)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(each.state), arrays(result.state), strict=True))


class Stopped(Exception):
    """Stands for whatever ends a process."""


def stopping(batches, after: int):
    yield from itertools.islice(batches, after)
    raise Stopped


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one(finished, program, make, tmp_path, workers):
    """Its position in the data is the step: `stream` goes on with the same groups, read here or by other processes."""
    whole_dir, whole, _ = finished
    with pytest.raises(Stopped):
        train(program, fresh_state(program), stopping(stream(make), 5), CONFIG, steps=STEPS, run_dir=tmp_path)
    assert latest(tmp_path) == 3
    assert [e["step"] for e in read_metrics(tmp_path)] == [2, 3, 4]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed in the middle of a line

    # A new process: nothing is left but the directory and the configuration.
    program = build_program(MODEL, CONFIG, STEPS)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = checkpoints.restore(checkpoints.latest(), program.abstract)
    checkpoints.close()
    assert int(state.step) == 3
    for restored, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(program.shardings), strict=True):
        assert restored.sharding == sharding
    rest = stream(make, start=3, workers=workers)
    resumed = train(program, state, rest, CONFIG, steps=STEPS, run_dir=tmp_path)

    assert jax.tree.structure(resumed.state) == jax.tree.structure(whole.state)
    for a, b in zip(arrays(resumed.state), arrays(whole.state), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert read_metrics(tmp_path, seconds=False) == read_metrics(whole_dir, seconds=False)
    assert resumed.history == read_metrics(tmp_path)
    assert latest(tmp_path) == STEPS


def test_starting_again_replaces_what_an_earlier_run_left(finished, program, make, tmp_path):
    for steps in (STEPS, 3):
        train(program, fresh_state(program), stream(make), CONFIG, steps=steps, run_dir=tmp_path)
    assert [e["step"] for e in read_metrics(tmp_path)] == [2, 3]
    assert latest(tmp_path) == 3


def test_every_checkpoint_holds_its_own_step(program, make, tmp_path):
    """Even if the one before is still being written, and the next step takes over the state's buffers meanwhile."""
    state, expected = fresh_state(program), {}
    checkpoints = Checkpoints(tmp_path, dataclasses.replace(CONFIG, keep_last=10))
    for step, batch in enumerate(itertools.islice(stream(make), 4)):
        expected[step] = [np.array(x) for x in jax.tree.leaves(state)]
        checkpoints.save(step, state)
        state, _ = program.train_step(state, program.put(batch))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, dataclasses.replace(CONFIG, keep_last=10))
    for step, values in expected.items():
        restored = checkpoints.restore(step, program.abstract)
        assert all(np.array_equal(a, b) for a, b in zip(arrays(restored), values, strict=True)), step
    checkpoints.close()


def test_a_loss_that_is_not_finite_stops_the_run(finished, program, make, tmp_path):
    def poisoned():
        for step, batch in enumerate(stream(make), start=1):
            if step == 5:
                comparisons = dataclasses.replace(batch.comparisons, margin=batch.comparisons.margin + np.inf)
                batch = dataclasses.replace(batch, comparisons=comparisons)
            yield batch

    with pytest.raises(TrainingError, match=r"is (inf|nan) at step 5: lower the learning rate or check") as error:
        train(
            program, fresh_state(program), poisoned(), CONFIG, steps=STEPS, run_dir=tmp_path,
            describe=make.data.describe,
        )  # fmt: skip
    assert [e["step"] for e in read_metrics(tmp_path)] == [2, 3, 4]
    assert latest(tmp_path) == 3
    found = json.loads((tmp_path / "batch-5.json").read_text())
    assert str(tmp_path / "batch-5.json") in str(error.value) and found["step"] == 5 and " at step 5" in found["reason"]
    plan = BatchPlan([0] * len(make.data), CONFIG.batch_size, 0, STEPS)
    expected = [{"index": i, "id": f"g{i}", "file": "data.jsonl", "row": i} for i in map(int, plan[4])]
    assert sorted(found["groups"], key=lambda g: g["index"]) == sorted(expected, key=lambda g: g["index"])


def test_a_state_that_is_not_finite_is_not_saved(finished, program, make, tmp_path):
    def poisoned():
        yield from itertools.islice(stream(make), 3)

    state = fresh_state(program)
    assert program.is_finite(state)
    worst = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.inf), state.opt_state[1][0].nu)
    adam = (state.opt_state[1][0]._replace(nu=worst), *state.opt_state[1][1:])
    state = dataclasses.replace(state, opt_state=(state.opt_state[0], adam, *state.opt_state[2:]))
    # An infinite second moment makes no update at all, so loss and gradients stay finite.
    with pytest.raises(TrainingError, match=r"optimiser moment is nan at step 3: .*batch-3.json"):
        train(program, state, poisoned(), CONFIG, steps=STEPS, run_dir=tmp_path)
    assert [e["step"] for e in read_metrics(tmp_path)] == [2]
    assert latest(tmp_path) is None


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not(finished, program, make, tmp_path, at):
    """In the middle of a logging interval too: what was measured in it is saved."""
    whole_dir, whole, _ = finished
    asked = itertools.count(1)  # after every step
    with pytest.raises(Preempted, match=f"SIGTERM and saved at step {at};") as error:
        train(
            program, fresh_state(program), stream(make), CONFIG, steps=STEPS, run_dir=tmp_path,
            stop=lambda: signal.SIGTERM if next(asked) == at else None,
        )  # fmt: skip
    assert error.value.status == PREEMPTED and latest(tmp_path) == at
    state = resume(program, tmp_path)
    assert state is not None and int(state.step) == at
    resumed = train(program, state, stream(make, start=at), CONFIG, steps=STEPS, run_dir=tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(arrays(resumed.state), arrays(whole.state), strict=True))
    assert read_metrics(tmp_path, seconds=False) == read_metrics(whole_dir, seconds=False)


def test_the_best_checkpoints_are_kept_beside_the_newest(finished, program, make, tmp_path):
    values = {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.4, 5: 0.1, 6: 0.2}
    config = dataclasses.replace(
        CONFIG, checkpoint_every=1, eval_every=1, keep_last=1, keep_best=2, best_metric="held_out/accuracy"
    )

    def evaluate(state: TrainState) -> dict[str, float]:
        return {"held_out/accuracy": values[int(state.step)]}

    def run(config: TrainConfig, out: Path) -> set[str]:
        train(program, fresh_state(program), stream(make), config, steps=STEPS, run_dir=out, evaluate=evaluate)
        return {path.name for path in (out / "checkpoints").iterdir()}

    assert run(config, tmp_path / "highest") == {"2", "3", "6"}
    assert run(dataclasses.replace(config, best_is="lowest"), tmp_path / "lowest") == {"5", "6"}
    values[2] = None  # undefined there: that checkpoint has no rank
    assert run(config, tmp_path / "undefined") == {"3", "4", "6"}
    values[2] = 0.9
    with pytest.raises(TrainingError, match=r"best_metric 'accuracy' is not among .*held_out/accuracy"):
        run(dataclasses.replace(config, best_metric="accuracy"), tmp_path / "unknown")
    assert (tmp_path / "unknown" / "checkpoints" / "1").is_dir()  # what was trained is not lost with it


def test_an_evaluation_that_fails_loses_no_training(program, make, tmp_path):
    """The checkpoint is there before; the same run goes on with the evaluation, and is ranked by it."""
    config = dataclasses.replace(CONFIG, eval_every=3, keep_last=1, keep_best=1, best_metric="held_out/accuracy")
    asked = []

    def evaluate(state: TrainState) -> dict[str, float]:
        asked.append(int(state.step))
        if asked[-1] == STEPS and asked.count(STEPS) == 1:
            raise MemoryError("too large a batch")
        return {"held_out/accuracy": 1.0 / asked[-1]}

    def go_on(folder: Path) -> TrainResult:
        state = resume(program, folder) or fresh_state(program)
        rest = stream(make, start=int(state.step))
        return train(program, state, rest, config, steps=STEPS, run_dir=folder, evaluate=evaluate)

    with pytest.raises(MemoryError, match="too large a batch"):
        go_on(tmp_path / "a")
    assert latest(tmp_path / "a") == STEPS and [e["step"] for e in read_metrics(tmp_path / "a")] == [2, 3, 4]
    result = go_on(tmp_path / "a")
    assert asked == [3, 6, 6] and [e["step"] for e in result.history] == [2, 3, 4, 6]
    whole = go_on(tmp_path / "b")
    assert all(np.array_equal(a, b) for a, b in zip(arrays(result.state), arrays(whole.state), strict=True))
    assert read_metrics(tmp_path / "a", seconds=False) == read_metrics(tmp_path / "b", seconds=False)
    assert {p.name for p in (tmp_path / "a" / "checkpoints").iterdir()} == {"3", "6"}  # the best and the newest
    go_on(tmp_path / "a")
    assert asked == [3, 6, 6, 3, 6], "what is there is not measured again"


@pytest.mark.parametrize("alone", [True, False])
def test_closing_hides_no_error_and_waits_for_nobody_who_knows_nothing_of_it(monkeypatch, tmp_path, alone):
    closed = []

    def close(self: Checkpoints) -> None:
        closed.append(True)
        raise TimeoutError("at a barrier")

    monkeypatch.setattr(Checkpoints, "close", close)
    with pytest.raises(TimeoutError), RunFiles(tmp_path / "a", 0, CONFIG):
        pass
    with pytest.raises(OSError, match="disk"), RunFiles(tmp_path / "b", 0, CONFIG):
        monkeypatch.setattr(jax, "process_count", lambda: 1 if alone else 2)
        raise OSError("disk")
    assert len(closed) == 1 + alone


def test_data_that_ends_too_early_is_an_error(finished, program, make):
    with pytest.raises(TrainingError, match="the data ended before step 3"):
        train(program, fresh_state(program), itertools.islice(stream(make), 2), CONFIG, steps=STEPS)


def test_evaluation_runs_when_it_is_due(finished, program, make):
    evaluated = []

    def evaluate(state: TrainState) -> dict[str, float]:
        evaluated.append(int(state.step))
        return {"held_out/accuracy": 0.5}

    config = dataclasses.replace(CONFIG, log_every=4, checkpoint_every=None, eval_every=3)
    result = train(program, fresh_state(program), stream(make), config, steps=5, evaluate=evaluate)
    assert evaluated == [3, 5]
    assert [(e["step"], "held_out/accuracy" in e) for e in result.history] == [(3, True), (4, False), (5, True)]


def test_restoring_onto_another_model_lists_the_differences(finished):
    run_dir, _, _ = finished
    checkpoints = Checkpoints(run_dir / "checkpoints")

    def problems(model: ModelConfig, config: TrainConfig) -> str:
        other = build_program(model, config, STEPS)
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(STEPS, other.abstract)
        return str(error.value)

    wide = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, mlp_width=24))
    text = problems(wide, CONFIG)
    assert f"{run_dir / 'checkpoints'}, step {STEPS}, does not fit" in text
    assert "saved (16, 16), wanted (16, 24)" in text or "saved (1, 16, 16), wanted (1, 16, 24)" in text
    assert "missing" not in text and "superfluous" not in text
    text = problems(MODEL, dataclasses.replace(CONFIG, objective="standard"))
    assert "superfluous: params/proxy/" in text and "missing" not in text
    text = problems(MODEL, dataclasses.replace(CONFIG, freeze=("decoder",)))
    assert "superfluous: params/primary/decoder" in text and "missing: params/primary/vision" in text
    checkpoints.close()


def test_restoring_checks_dtypes(finished, program):
    run_dir, _, _ = finished
    like = program.abstract
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=x.sharding), like.frozen)
    checkpoints = Checkpoints(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="dtype of frozen/.*: saved float32, wanted bfloat16"):
        checkpoints.restore(STEPS, dataclasses.replace(like, frozen=frozen))
    checkpoints.close()


def test_names_in_a_checkpoint_are_parameter_paths(finished):
    run_dir, result, _ = finished
    checkpoints = Checkpoints(run_dir / "checkpoints")
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(STEPS, dataclasses.replace(result.state, params={}, frozen=nnx.State({})))
    checkpoints.close()
    lines = str(error.value).splitlines()[1:]
    count = len(jax.tree.leaves((result.state.params, result.state.frozen)))
    assert len(lines) == len(set(lines)) == count


def test_another_runs_directory_is_refused(tmp_path):
    check_config(tmp_path / "run", {"seed": 0})
    write_config(tmp_path / "run", {"seed": 0})
    check_config(tmp_path / "run", {"seed": 0})
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"seed": 0}
    assert check_config(tmp_path / "run", {"seed": 0, "title": "new"}, ignore=("title",)) == ["title: None -> 'new'"]
    nested = {"seed": 0, "mesh": {"data": 1}, "data": {"workers": 1, "holdout": 0.1}}
    write_config(tmp_path / "nested", nested)
    other = {"seed": 0, "mesh": {"data": 2}, "data": {"workers": 2, "holdout": 0.2}}
    with pytest.raises(CheckpointError, match=r"configuration:\n  data.holdout: 0.1 -> 0.2\nname"):
        check_config(tmp_path / "nested", other, ignore=RESUMABLE)
    other["data"]["holdout"] = 0.1
    assert check_config(tmp_path / "nested", other, RESUMABLE) == ["data.workers: 1 -> 2", "mesh.data: 1 -> 2"]
    with pytest.raises(CheckpointError, match=r"holds a run with another configuration:\n  seed: 0 -> 1"):
        check_config(tmp_path / "run", {"seed": 1})
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"seed": 0}


@pytest.mark.parametrize(
    ("groups", "epochs", "steps"), [(190, 1.0, 2), (128, 1.0, 1), (1, 0.5, 1), (30, 0.1 * 3, 1), (129, 2.0, 3)]
)
def test_no_group_is_left_out_of_an_epoch(groups, epochs, steps):
    assert training_steps(dataclasses.replace(CONFIG, steps=None, epochs=epochs, batch_size=128), groups) == steps


def test_an_interval_weighs_steps_by_their_comparisons() -> None:
    names = ("primary/loss", "primary/accuracy", "comparisons", "decided", "grad_norm", "sfc/histogram")
    steps = [(0.25, 0.0, 8, 0, 1.0, [8, 0]), (0.5, 0.75, 48, 40, 2.0, [40, 8]), (1.0, 0.25, 8, 8, 3.0, [0, 8])]
    metrics = [{n: np.asarray(v, np.float32).tolist() for n, v in zip(names, step)} for step in steps]
    entry = Interval(metrics).close()
    assert entry["primary/loss"] == pytest.approx((8 * 0.25 + 48 * 0.5 + 8 * 1.0) / 64)
    assert entry["primary/accuracy"] == pytest.approx((40 * 0.75 + 8 * 0.25) / 48)
    assert (entry["comparisons"], entry["decided"], entry["grad_norm"]) == (64, 48, 2.0)
    assert entry["sfc/histogram"] == [48, 16]
    assert Interval(metrics[:1]).close()["primary/accuracy"] is None  # ties alone
