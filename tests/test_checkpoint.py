"""Checkpoints that are damaged, half-written or no longer wanted."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mmrm_jax.config import TrainConfig
from mmrm_jax.train.checkpoint import CheckpointError, Checkpoints, kept_steps
from mmrm_jax.train.manifest import add_metrics, damage, read_manifest, write_manifest

MANIFEST = "manifest-0-of-1.json"
KEEP_ALL = TrainConfig(keep_last=100)


def state_of(step: int) -> dict:
    kernel = np.random.default_rng(step).normal(size=(64, 64))
    return {"params": {"kernel": jnp.asarray(kernel, jnp.float32)}, "step": jnp.asarray(step, jnp.int32)}


def save(directory: Path, steps: dict[int, float | None], config: TrainConfig = KEEP_ALL) -> None:
    checkpoints = Checkpoints(directory, config)
    for step, metric in steps.items():
        checkpoints.save(step, state_of(step), pending=[{"loss": [0.1 * step]}])
        checkpoints.rank(step, {"validation/accuracy": metric})
    checkpoints.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("three") / "checkpoints"
    save(directory, {1: None, 2: None, 3: None})
    return directory


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("metrics", "settings", "kept"),
    [
        ({1: None, 2: None, 3: None}, {"keep_last": 1}, {3}),
        ({1: None, 2: None, 3: None}, {"keep_last": 2}, {2, 3}),
        ({1: 0.9, 2: 0.5, 3: 0.1}, {"keep_last": 1, "keep_best": 1}, {1, 3}),
        ({1: 0.9, 2: 0.5, 3: 0.1}, {"keep_last": 1, "keep_best": 1, "best_is": "lowest"}, {3}),
        ({1: 0.9, 2: 0.9, 3: 0.1}, {"keep_last": 1, "keep_best": 1}, {2, 3}),
        ({1: None, 2: 0.2, 3: None, 4: 0.3}, {"keep_last": 1, "keep_best": 5}, {2, 4}),
        ({1: 0.9}, {"keep_last": 3, "keep_best": 2}, {1}),
        ({}, {"keep_best": 1}, set()),
    ],
)
def test_which_checkpoints_are_kept(metrics, settings, kept) -> None:
    config = TrainConfig(eval_every=1, checkpoint_every=1, **settings)
    assert kept_steps(metrics, config) == kept


@pytest.mark.parametrize("last, best", [(1, 2), (1, 3), (2, 4), (2, 5)])
def test_the_best_stay_while_there_are_fewer_than_may_stay(last, best) -> None:
    config = TrainConfig(eval_every=1, checkpoint_every=1, keep_last=last, keep_best=best)
    held: dict[int, float | None] = {}
    for step, metric in enumerate((0.7, 0.9, 0.8, 0.6, 0.5, 0.4, 0.3)):
        held[step] = metric
        held = {kept: held[kept] for kept in kept_steps(held, config)}
    assert set(held) == {*(1, 2, 0, 3, 4)[:best], *(5, 6)[-last:]}


def test_the_newest_is_kept_whatever_its_metric_also_after_a_restart(tmp_path) -> None:
    config = dataclasses.replace(KEEP_ALL, keep_last=1, keep_best=1, eval_every=1, checkpoint_every=1)
    save(tmp_path, {1: 0.2, 2: 0.9, 3: 0.5}, config)
    assert listed(tmp_path) == ["2", "3"]
    save(tmp_path, {4: 0.1}, config)  # it knows 2's metric from its manifest
    assert listed(tmp_path) == ["2", "4"]
    save(tmp_path, {5: 0.95}, config)
    assert listed(tmp_path) == ["5"]
    save(tmp_path, {6: 0.1}, dataclasses.replace(config, best_metric="validation/loss", best_is="lowest"))
    assert listed(tmp_path) == ["6"]  # an accuracy is not ranked among losses


def test_older_ones_are_deleted_once_a_newer_one_has_its_manifest(tmp_path, monkeypatch) -> None:
    config = dataclasses.replace(KEEP_ALL, keep_last=1)
    save(tmp_path, {1: None}, config)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("mmrm_jax.train.checkpoint.write_manifest", full)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path, {2: None}, config)
    assert "1" in listed(tmp_path)
    with pytest.warns(UserWarning, match="checkpoint 2 is passed over: its checksums are missing"):
        assert Checkpoints(tmp_path).latest() == 1


def array_file(folder: Path) -> Path:
    """The largest file: it holds array values."""
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip(folder: Path) -> None:
    content = bytearray(array_file(folder).read_bytes())
    content[len(content) // 2] ^= 1
    array_file(folder).write_bytes(bytes(content))


def truncate(folder: Path) -> None:
    array_file(folder).write_bytes(array_file(folder).read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (flip, "has changed: its SHA-256 is another"),
    "a truncated file": (truncate, r"has \d+ bytes of \d+"),
    "a missing file": (lambda folder: array_file(folder).unlink(), "cannot be read: No such file"),
    "no Orbax metadata": (lambda folder: (folder / "_CHECKPOINT_METADATA").unlink(), "cannot be read: No such file"),
    "no state": (lambda folder: shutil.rmtree(folder / "state"), "cannot be read: No such file"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "its checksums are missing"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"files": {'), "its checksums are missing"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(three, tmp_path, kind) -> None:
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    spoil, reason = DAMAGES[kind]
    spoil(tmp_path / "3")
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match=f"checkpoint 3 is passed over: .*{reason}"):
        assert checkpoints.latest() == 2
    restored = checkpoints.restore(2, state_of(0))
    assert np.array_equal(restored["params"]["kernel"], state_of(2)["params"]["kernel"]) and restored["step"] == 2
    assert checkpoints.pending(2) == [{"loss": [0.2]}] and checkpoints.pending(7) == []
    checkpoints.discard_after(2)
    assert listed(tmp_path) == ["1", "2"]
    checkpoints.save(3, state_of(3))
    checkpoints.close()
    assert Checkpoints(tmp_path).latest() == 3


def test_whole_checkpoints_are_taken_without_a_word(three) -> None:
    assert Checkpoints(three).latest() == 3  # a warning would be an error here


def test_a_save_that_was_killed_is_ignored(three, tmp_path) -> None:
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    shutil.copytree(three / "3", tmp_path / "4.orbax-checkpoint-tmp")
    (tmp_path / "4.orbax-checkpoint-tmp" / MANIFEST).unlink()
    assert Checkpoints(tmp_path).latest() == 3


def test_nothing_but_damage_is_an_error_and_nothing_is_not(three, tmp_path) -> None:
    assert Checkpoints(tmp_path / "empty").latest() is None
    shutil.copytree(three / "3", tmp_path / "one" / "3")
    flip(tmp_path / "one" / "3")
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'one'} holds no checkpoint that is whole")),
    ):
        Checkpoints(tmp_path / "one").latest()


def test_the_only_checkpoint_is_used_where_its_manifest_is_all_that_is_missing(three, tmp_path) -> None:
    """Its process was killed after Orbax had finished, or it comes from a version before manifests."""
    shutil.copytree(three / "3", tmp_path / "3")
    (tmp_path / "3" / MANIFEST).unlink()
    messages: list[str] = []
    assert Checkpoints(tmp_path).latest(messages.append) == 3
    assert len(messages) == 2 and "passed over" in messages[0] and "is used, though" in messages[1]


def test_what_was_being_deleted_is_never_used(three, tmp_path, monkeypatch) -> None:
    """Killed while it deleted the older checkpoint, whose manifest went first; the newer one is damaged later."""
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "1")
    config = dataclasses.replace(KEEP_ALL, keep_last=1)

    def killed(self: object, step: int) -> None:
        (tmp_path / str(step) / MANIFEST).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("orbax.checkpoint.v1.training.Checkpointer.delete", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, {4: None}, config)
    assert {"2", "2.deleting"} <= set(listed(tmp_path))
    for step in (3, 4):
        flip(tmp_path / str(step))
    messages: list[str] = []
    with pytest.raises(CheckpointError, match="no checkpoint that is whole"):
        Checkpoints(tmp_path).latest(messages.append)
    assert messages[-1].endswith("checkpoint 2 is passed over: its deletion was begun") and len(messages) == 3
    with pytest.raises(CheckpointError, match="checkpoint 2 is damaged: its deletion was begun"):
        Checkpoints(tmp_path).check(2)
    save(tmp_path, {5: None}, config)  # goes on deleting
    assert listed(tmp_path) == ["5"]
    (tmp_path / "6.deleting").touch()  # deleted, but for the mark
    save(tmp_path, {6: None}, config)
    assert listed(tmp_path) == ["6"] and Checkpoints(tmp_path).latest() == 6


def test_a_step_that_is_asked_for_must_be_there_and_whole(three, tmp_path) -> None:
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    flip(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.check(1)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 7; it has 1, 2, 3"):
        checkpoints.check(7)
    with pytest.raises(CheckpointError, match="checkpoint 2 is damaged: .*SHA-256"):
        checkpoints.check(2)


def test_parts_of_the_check_cover_every_file(three, tmp_path) -> None:
    manifest = read_manifest(three / "3")
    assert manifest is not None and set(manifest["files"]) == {
        f.relative_to(three / "3").as_posix() for f in (three / "3").rglob("*") if f.is_file() and f.name != MANIFEST
    }
    shutil.copytree(three / "3", tmp_path, dirs_exist_ok=True)
    flip(tmp_path)
    assert sum(damage(tmp_path, part=i, parts=3) is not None for i in range(3)) == 1


def test_each_process_writes_the_checksums_of_its_share(three, tmp_path) -> None:
    shutil.copytree(three / "3", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest-*"))
    for part in range(3):
        assert read_manifest(tmp_path) is None
        write_manifest(tmp_path, part=part, parts=3)
    add_metrics(tmp_path, {"loss": 0.5})
    together, alone = read_manifest(tmp_path), read_manifest(three / "3")
    assert together is not None and alone is not None
    assert together["files"] == alone["files"] and together["metrics"] == {"loss": 0.5}
    assert damage(tmp_path) is None
    add_metrics(tmp_path / "none", {"loss": 0.5})  # of a process that was killed before it wrote them
    assert not (tmp_path / "none").exists()
