"""The frozen tower's features on disk: the same training with them as without, and none that are not whole."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run, write_pairs
from flax import nnx
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tiny_models import MODEL, flat, make_batch, random_group, random_params, relative_errors

from mmrm_jax.config import (
    Augmentation,
    DataConfig,
    Environment,
    LoraConfig,
    MatrixConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from mmrm_jax.data.batching import EncodedGroup
from mmrm_jax.data.features import BLANK, FeatureError, FeatureStore
from mmrm_jax.data.images import blank_tile
from mmrm_jax.data.pipeline import EncodedSource, index_source
from mmrm_jax.data.sources import MemorySource
from mmrm_jax.eval.matrix_data import load_data, open_data
from mmrm_jax.models.internvl import tile_features
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.features import check_frozen_tower, open_store, with_features
from mmrm_jax.train.program import build_program
from mmrm_jax.train.setup import Checkpoint, initial_params, open_checkpoint
from mmrm_jax.train.state import abstract_model
from mmrm_jax.types import Batch, Comparison, Group, Quarantined

TOLERANCE = 1e-5
VIEWS = {"primary": "multimodal", "proxy": "blank"}


# ---- the step


def featured(groups: list[EncodedGroup], params: nnx.State) -> tuple[list[EncodedGroup], np.ndarray]:
    """The groups with features in place of their tiles, and those of the blank tile, each made on its own."""
    tower = nnx.merge(abstract_model(MODEL)[0], params).vision

    @jax.jit
    def of(tiles: jax.Array) -> jax.Array:
        return tile_features(tower, tiles, MODEL, jnp.dtype("float32"))

    made = [dataclasses.replace(g, tiles=np.stack([of(t[None])[0] for t in g.tiles])) for g in groups if len(g.tiles)]
    made += [dataclasses.replace(g, tiles=None) for g in groups if not len(g.tiles)]
    return sorted(made, key=lambda g: g.index), np.asarray(of(blank_tile(MODEL.vision.image_size)))


def trained(batch: Batch, params: nnx.State, config: TrainConfig) -> tuple[dict, dict]:
    """(gradients of a step, metrics and rewards)."""
    program = build_program(MODEL, config, 4)
    state = program.init(params, config)
    one = program.put(jax.tree.map(lambda x: x[0], batch), micro=False)
    rewards = {f"{k} before": v for k, v in program.eval_step(state.params, state.frozen, one).items()}
    state, metrics = program.train_step(state, program.put(batch))
    moments = {f"{b}/{k}": v for b, mu in state.opt_state[1][0].mu.items() for k, v in flat(mu).items()}
    return jax.device_get(moments), jax.device_get(metrics | rewards)


@pytest.mark.parametrize(
    ("proxy", "micro_batches", "frozen", "rank"), [("blank", 2, ("vision",), 0), ("absent", 1, ("vision", "score"), 2)]
)
def test_a_step_with_features_is_the_step_with_pixels(proxy, micro_batches, frozen, rank) -> None:
    """On eight devices, with zero to three tiles a group; the last group is padding."""
    rng = np.random.default_rng(0)
    count = 8 * micro_batches
    groups = [
        random_group(
            MODEL,
            rng,
            i,
            tiles=i % 4,
            responses=2 + i % 2,
            comparisons=[Comparison(0, 1)],
            proxy_tiles=int(proxy == "blank"),
        )
        for i in range(count - 1)
    ]
    params = random_params(MODEL, 1)
    config = TrainConfig(
        proxy_input=proxy,
        batch_size=count,
        micro_batches=micro_batches,
        freeze=frozen,
        optimizer=OptimizerConfig(clip_norm=1e9),
        lora=LoraConfig(rank) if rank else LoraConfig(),
    )
    shape = {"num_groups": count, "micro_batches": micro_batches, "views": {"primary": "multimodal", "proxy": proxy}}
    made, blank = featured(groups, params)
    pixels, features = make_batch(groups, MODEL, **shape), make_batch(made, MODEL, **shape, blank=blank)
    for branch, prefix in features.prefixes.items():
        assert prefix.pixels is None and (prefix.features is None) == (pixels.prefixes[branch].pixels is None)
    (want, known), (got, found) = (trained(batch, params, config) for batch in (pixels, features))
    assert max(relative_errors(got, want).values()) < TOLERANCE
    assert max(np.abs(v).max() for v in want.values()) > 0
    assert max(relative_errors(found, known).values()) < TOLERANCE


# ---- the store


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read(tmp_path: Path, dtype: str) -> None:
    store = FeatureStore.of_settings(tmp_path, {"weights": "a"}, (4, 8), dtype)
    features = np.asarray(np.random.default_rng(0).normal(size=(3, 4, 8)), jnp.dtype(dtype))
    store.write("abc", features)
    found = store.read("abc")
    assert found.dtype == features.dtype and np.array_equal(found, features)
    assert [f.name for f in store.file("abc").parent.iterdir()] == ["abc.safetensors"]
    assert json.loads((store.folder / "settings.json").read_text()) == {"weights": "a", "dtype": dtype}
    assert FeatureStore.of_settings(tmp_path, {"weights": "b"}, (4, 8), dtype).folder != store.folder
    with ThreadPoolExecutor(4) as pool:  # as processes of one number on several machines
        list(pool.map(lambda _: store.write("abc", features), range(40)))
    assert [f.name for f in store.file("abc").parent.iterdir()] == ["abc.safetensors"]


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def changed(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


def without_checksum(file: Path) -> None:
    save_file(load_file(file), file)


def of_another_model(file: Path) -> None:
    save_file({"features": np.zeros((1, 3, 3), np.float32)}, file)


def nameless(file: Path) -> None:
    save_file({"other": np.zeros((1, 4, 8), np.float32)}, file)


DAMAGES = (cut_short, emptied, changed, without_checksum, of_another_model, nameless, Path.unlink)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_never_read(tmp_path: Path, damage) -> None:
    store = FeatureStore.of_settings(tmp_path, {}, (4, 8), "float32")
    store.write("abc", np.ones((2, 4, 8), np.float32))
    damage(store.file("abc"))
    with pytest.raises(FeatureError, match=r"abc\.safetensors"):
        store.read("abc")


# ---- what is made


def picture(seed: int, width: int = 40, height: int = 40) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def group(index: int, image: bytes | Path | None) -> Group:
    responses = ("a red circle", "a blue square")
    return Group(str(index), "what is it ?", responses, (Comparison(0, 1),), image, "e", "data.jsonl", index + 1)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(MODEL_DIR, DataConfig(max_tiles=3))


def config_of(folder: Path, **changes) -> TrainConfig:
    return TrainConfig(data=DataConfig(features=folder), mesh=MeshConfig(), **changes)


def source(checkpoint: Checkpoint, images: list, *, cache: bool = True) -> EncodedSource:
    groups = tuple(group(i, image) for i, image in enumerate(images))
    data, quarantined = index_source(MemorySource(groups), checkpoint.processor, VIEWS, cache=cache)  # type: ignore[arg-type]
    assert not quarantined
    return data


def kept(sets: list[EncodedSource], checkpoint: Checkpoint, config: TrainConfig) -> tuple[list[EncodedSource], str]:
    out = io.StringIO()
    return with_features(sets, checkpoint, config, Console(file=out, width=300)), out.getvalue()


IMAGES = [picture(0), None, picture(1, 80, 40), picture(2, 96, 32), picture(0), picture(3, 32, 70)]


def files(folder: Path) -> set[Path]:
    return {f for f in folder.rglob("*.safetensors") if f.stem != BLANK}


@pytest.mark.parametrize("cache", [True, False])
def test_each_image_is_made_once(tmp_path: Path, checkpoint, cache) -> None:
    """Features are those of the tower that is trained with; another set of the same images makes nothing."""
    data = source(checkpoint, IMAGES, cache=cache)
    config = config_of(tmp_path)
    (made,), said = kept([data], checkpoint, config)
    assert "features of 4 images, 4 of them made now" in said and len(files(tmp_path)) == 4
    model = nnx.merge(abstract_model(checkpoint.config)[0], initial_params(checkpoint, 0)[0])
    counts = []
    for i in range(len(data)):
        pixels, features = data.encode(i), made.encode(i)
        assert isinstance(pixels, EncodedGroup) and isinstance(features, EncodedGroup)
        assert features.shape == pixels.shape == made.shapes[i]
        counts.append(pixels.shape.tiles)
        if pixels.tiles is None:
            assert features.tiles is None
            continue
        want = tile_features(model.vision, jnp.asarray(pixels.tiles), checkpoint.config, jnp.dtype("float32"))
        np.testing.assert_allclose(features.tiles, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
    assert counts == [1, 0, 3, 4, 1, 3]
    blank = tile_features(model.vision, jnp.asarray(blank_tile(32)), checkpoint.config, jnp.dtype("float32"))
    np.testing.assert_allclose(made.features.blank, blank, rtol=0, atol=TOLERANCE * np.abs(blank).max())
    again, said = kept([source(checkpoint, IMAGES[:1]), data], checkpoint, config)
    assert "features of 4 images, 0 of them made now" in said and len(again) == 2


def test_several_images_of_a_group_have_the_features_of_each(tmp_path: Path, checkpoint) -> None:
    both = dataclasses.replace(group(0, IMAGES[2]), more_images=(IMAGES[3],))
    data, _ = index_source(MemorySource((both, group(1, IMAGES[3]))), checkpoint.processor, VIEWS, cache=True)
    (made, alone), said = kept([data, source(checkpoint, IMAGES[2:4])], checkpoint, config_of(tmp_path))
    assert "features of 2 images, 2 of them made now" in said and made.shapes[0].tiles == 3 + 4
    each = [alone.encode(i).tiles for i in range(2)]
    np.testing.assert_array_equal(made.encode(0).tiles, np.concatenate(each))
    np.testing.assert_array_equal(made.encode(1).tiles, each[1])
    made.features.store.file(made.features.names[0][1]).unlink()
    with pytest.raises(FeatureError, match="the same command makes it anew"):
        made.encode(0)


def test_what_is_there_is_used_and_what_is_not_whole_is_made_anew(tmp_path: Path, checkpoint) -> None:
    data, config = source(checkpoint, IMAGES), config_of(tmp_path)
    (made,), _ = kept([data], checkpoint, config)
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in files(tmp_path)}
    lost, damaged, *others = sorted(before)
    lost.unlink()
    changed(damaged)
    cut_short(made.features.store.file(BLANK))
    (found,), said = kept([data], checkpoint, config)
    assert "2 of them made now" in said
    assert said.count("made anew") == 2 and f"made anew: {damaged} has changed" in said and "blank" in said
    assert {f: f.read_bytes() for f in files(tmp_path)} == {f: old for f, (old, _) in before.items()}
    assert all(f.stat().st_mtime_ns == before[f][1] for f in others)
    np.testing.assert_array_equal(found.features.blank, made.features.blank)
    damaged.unlink()  # while a run is going on
    index = made.features.names.index((damaged.stem,))
    with pytest.raises(FeatureError, match="the same command makes it anew"):
        made.encode(index)


def test_what_features_depend_on_is_in_their_place(tmp_path: Path, checkpoint) -> None:
    """Weights of the tower, not of the rest; tiling; dtypes. Image bytes are in the file's name."""
    config = config_of(tmp_path / "features")

    def folder(checkpoint: Checkpoint, config: TrainConfig = config) -> Path:
        return open_store(tmp_path / "features", checkpoint, config).folder

    def with_tensor(part: str) -> Checkpoint:
        shutil.copytree(MODEL_DIR, tmp_path / part)
        tensors = load_file(tmp_path / part / "model.safetensors")
        name = next(n for n in sorted(tensors) if n.startswith(part) and n.endswith("weight"))
        tensors[name] = tensors[name] * np.float32(1.5)
        save_file(tensors, tmp_path / part / "model.safetensors")
        return open_checkpoint(tmp_path / part, DataConfig(max_tiles=3))

    own = folder(checkpoint)
    assert own == folder(open_checkpoint(MODEL_DIR, DataConfig(max_tiles=3)))
    assert own == folder(with_tensor("language_model")) == folder(checkpoint, dataclasses.replace(config, seed=5))
    others = {
        folder(with_tensor("vision_model")),
        folder(open_checkpoint(MODEL_DIR, DataConfig(max_tiles=2))),
        folder(checkpoint, dataclasses.replace(config, compute_dtype="bfloat16")),
        folder(checkpoint, dataclasses.replace(config, frozen_dtype="bfloat16")),
    }
    assert len(others) == 4 and own not in others
    _, said = kept([source(checkpoint, [picture(0)])], checkpoint, config)
    assert "1 of them made now" in said
    _, said = kept([source(checkpoint, [picture(9)])], checkpoint, config)
    assert "1 of them made now" in said


def test_an_image_that_cannot_be_decoded_is_quarantined(tmp_path: Path, checkpoint) -> None:
    broken, gone = tmp_path / "broken.png", tmp_path / "gone.png"
    broken.write_bytes(picture(0)[:200])
    gone.write_bytes(picture(1))
    data = source(checkpoint, [broken, picture(2), gone], cache=False)  # headers alone are read
    gone.unlink()
    (made,), _ = kept([data], checkpoint, config_of(tmp_path / "features"))
    found = [made.encode(i) for i in range(3)]
    assert isinstance(found[0], Quarantined) and "broken.png cannot be decoded" in found[0].reason
    assert isinstance(found[1], EncodedGroup)
    assert isinstance(found[2], Quarantined) and "gone.png cannot be read" in found[2].reason
    assert len(files(tmp_path)) == 1


def test_settings_with_which_nothing_can_be_kept(tmp_path: Path, checkpoint) -> None:
    good = config_of(tmp_path, lora=LoraConfig(4))
    data = dataclasses.replace(good.data, augment=Augmentation(mirror=True))
    for changes, message in (
        ({"freeze": ()}, r"freeze is \(\)"),
        ({"lora": LoraConfig(4, targets=("decoder", "vision.q"))}, "lora.targets names vision.q"),
        ({"data": data}, "data.augment"),
        ({"drop_path_rate": 0.1}, r"drop_path_rate is 0.1 and"),
    ):
        with pytest.raises(ValueError, match=f"data.features needs.*{message}"):
            check_frozen_tower(checkpoint.config, dataclasses.replace(good, **changes))
    vision = dataclasses.replace(checkpoint.config.vision, drop_path_rate=0.1)
    model = dataclasses.replace(checkpoint.config, vision=vision)
    with pytest.raises(ValueError, match="drop_path_rate is 0.1 in the checkpoint"):
        check_frozen_tower(model, good)
    check_frozen_tower(model, dataclasses.replace(good, drop_path_rate=0.0))
    check_frozen_tower(checkpoint.config, good)
    check_frozen_tower(model, dataclasses.replace(good, data=DataConfig()))


# ---- the commands


@pytest.mark.usefixtures("its_own_device")
def test_training_and_evaluation_with_features(tmp_path: Path, capsys) -> None:
    train, test = write_pairs(tmp_path, "train", 16), write_pairs(tmp_path, "test", 5, seed=1)
    options = ["--steps", 2, "--batch-size", 8, "--eval-batch-size", 8, "--proxy-input", "blank"]
    options += ["--optimizer.learning-rate", 1e-2, "--log-every", 1]
    results = {}
    for name, more in (("with", ["--data.features", tmp_path / "features"]), ("without", [])):
        out = tmp_path / name
        status, printed = run(capsys, "train", "--data", train, "--out", out, *options, *more)
        assert status == 0, printed
        assert ("of them made now" in printed) == (name == "with")
        assert run(capsys, "evaluate", "--run", out, "--data", test, "--json", out / "test.json")[0] == 0
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        results[name] = [{k: v for k, v in entry.items() if isinstance(v, float) and k != "seconds"} for entry in log]
        row = json.loads((out / "test.json").read_text())["row"]
        results[name].append({k: row[k] for k in ("accuracy", "mean_reward", "mean_margin", "sfc_mean")})
    for got, want in zip(results["with"], results["without"], strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert len(files(tmp_path / "features")) == 21
    # The folder may be given up or named anew when a run goes on.
    status, printed = run(capsys, "train", "--data", train, "--out", tmp_path / "with", *options)
    assert status == 0 and "finished before, at step 2" in printed, printed


def test_the_sets_of_a_matrix_share_what_is_kept(tmp_path: Path) -> None:
    names = ("one", "two")
    for i, name in enumerate(names):
        write_pairs(tmp_path, name, 6, seed=i)
    config = MatrixConfig(
        root=tmp_path,
        environments=tuple(Environment(name, f"{name}.jsonl", "two.jsonl") for name in names),
        train=TrainConfig(data=DataConfig(features=tmp_path / "features", holdout=0.0)),
    )
    data = load_data(config, open_data(config), open_checkpoint(MODEL_DIR, config.train.data), Console(quiet=True))
    for sets in (data.train, data.test):
        for each in sets.values():
            encoded = each.encode(0)
            assert isinstance(encoded, EncodedGroup) and encoded.tiles is not None
            assert encoded.tiles.dtype == np.float32 and len(encoded.tiles) == each.shapes[0].tiles
    assert len(files(tmp_path / "features")) == 12 and list(data.train) == ["one", "two"]
