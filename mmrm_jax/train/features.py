"""What the frozen tower makes of every image of some data sets: made where it is missing, and kept on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track

from mmrm_jax.config import Augmentation, ModelConfig, TrainConfig
from mmrm_jax.data.features import BLANK, FeatureError, FeatureStore, SourceFeatures
from mmrm_jax.data.images import ImageError, blank_tile, image_size, tile_count
from mmrm_jax.data.pipeline import EncodedSource
from mmrm_jax.data.records import DataError
from mmrm_jax.data.sources import image_identities
from mmrm_jax.distributed import barrier, divided, is_main
from mmrm_jax.models.hf.weights import load_params, weights_digest
from mmrm_jax.models.internvl import tile_features
from mmrm_jax.models.vision import VisionTower
from mmrm_jax.sharding import RULES, gather, make_mesh, whole_batch
from mmrm_jax.train.program import as_trained
from mmrm_jax.train.setup import Checkpoint
from mmrm_jax.train.state import place_abstract

TILES = 16  # of a device and step: enough to keep it busy, and little memory without a backward pass

# Of what is kept: to be raised where code changes what the tower computes.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Missing:
    """An image whose features are to be made: its name in the store, and its `count` tiles, read when needed."""

    name: str
    count: int
    read: Callable[[], np.ndarray]


def check_frozen_tower(model: ModelConfig, config: TrainConfig) -> None:
    """Raises ValueError naming the settings with which the tower does not make the same of an image in every step.

    Nothing is checked without `data.features`.
    """
    if config.data.features is None:
        return
    rate = as_trained(model, config).vision.drop_path_rate
    adapted = [t for t in config.lora.targets if config.lora.rank and t.partition(".")[0] == "vision"]
    rules = {
        f"freeze is {config.freeze} and must name vision": "vision" in config.freeze,
        f"lora.targets names {', '.join(adapted)} and must not": not adapted,
        f"data.augment is {config.data.augment} and must be none": config.data.augment == Augmentation(),
        f"drop_path_rate is {rate}{' in the checkpoint' * (config.drop_path_rate is None)} and must be 0": rate == 0,
    }
    if problems := [problem for problem, kept in rules.items() if not kept]:
        raise ValueError("data.features needs a tower that always makes the same of an image: " + "; ".join(problems))


def with_features(
    sets: Sequence[EncodedSource], checkpoint: Checkpoint, config: TrainConfig, console: Console
) -> list[EncodedSource]:
    """The same data with the tower's features in place of tiles, where `data.features` names a folder for them.

    What is there is checked, and what is missing or damaged is made, once an image, by all processes together. Raises
    ValueError as `check_frozen_tower` does.
    """
    check_frozen_tower(checkpoint.config, config)
    if config.data.features is None:
        return list(sets)
    store = open_store(config.data.features, checkpoint, config)
    known: dict[Path, str] = {}
    checked: dict[str, str | None] = {}
    found = [
        divided(functools.partial(_look, data, store, known, checked), len(data), _bar("checking features", console))
        for data in sets
    ]
    side, of_blank = checkpoint.config.vision.image_size, _damage(store, BLANK, checked)
    missing = {} if of_blank is None else {BLANK: Missing(BLANK, 1, lambda: blank_tile(side))}
    for data, looked in zip(sets, found, strict=True):
        for index, images in enumerate(looked):
            for place, each in enumerate(images):
                if each.get("damage") is not None and each["name"] not in missing:
                    read = functools.partial(_read, data, index, place)
                    missing[each["name"]] = Missing(each["name"], each["tiles"], read)
    every = [each for looked in found for images in looked for each in images]
    for line in sorted({of_blank, *(each.get("damage") for each in every)} - {None, ""}):
        console.print(f"features are made anew: {line}", style="yellow")
    barrier("features checked")  # before any file is replaced
    problems = make_features(list(missing.values()), store, checkpoint, config, console) if missing else {}
    barrier("features made")
    names = {each["name"] for each in every}
    made = len(missing.keys() & names) - len(problems)
    console.print(f"the tower's features of {len(names)} images, {made} of them made now, are in {store.folder}")
    blank, unread = store.read(BLANK), {each["name"]: each["problem"] for each in every if "problem" in each}

    def featured(data: EncodedSource, looked: list[list[dict[str, Any]]]) -> EncodedSource:
        names = tuple(tuple(each["name"] for each in images) for images in looked)
        features = SourceFeatures(store, blank, names, problems | unread)
        cache = {index: dataclasses.replace(group, tiles=None) for index, group in data.cache.items()}
        return dataclasses.replace(data, cache=cache, features=features)

    return [featured(data, looked) for data, looked in zip(sets, found, strict=True)]


def open_store(root: Path, checkpoint: Checkpoint, config: TrainConfig) -> FeatureStore:
    """The store for a checkpoint's tower, its preprocessing, and the dtypes and the platform it computes in."""
    model = checkpoint.config
    vision = {k: v for k, v in dataclasses.asdict(model.vision).items() if k not in ("remat", "drop_path_rate")}
    settings = {
        "version": VERSION,
        "weights": weights_digest(checkpoint.path, model, "vision"),
        "vision": vision,
        "preprocessing": dataclasses.asdict(checkpoint.processor.preprocessing),
        "select_layer": model.select_layer,
        "downsample_ratio": model.downsample_ratio,
        "pixel_shuffle": model.pixel_shuffle,
        "frozen_dtype": config.frozen_dtype,
        "platform": jax.default_backend(),
    }
    shape = (model.visual_tokens_per_tile, int(model.vision.width / model.downsample_ratio**2))
    return FeatureStore.of_settings(root, settings, shape, config.compute_dtype)


def _look(
    data: EncodedSource, store: FeatureStore, known: dict[Path, str], checked: dict[str, str | None], index: int
) -> list[dict[str, Any]]:
    """Each image of a group: its "name", "tiles", and "damage" where there are no whole features of it ("" where there
    are none); or "name" and "problem", which keeps the group's images from being read."""
    if not data.shapes[index].tiles:
        return []
    group = data.group(index)
    try:
        names = [identity.removeprefix("image:") for identity in image_identities(group, known)]
        return [
            {"name": name, "tiles": tiles, "damage": _damage(store, name, checked)}
            for name, tiles in zip(names, _counts(data, index), strict=True)
        ]
    except (DataError, ImageError) as error:
        return [{"name": f"{group.file} {group.row}", "problem": str(error)}]


def _counts(data: EncodedSource, index: int) -> list[int]:
    """How many tiles each image of a group has."""
    images = data.group(index).images
    if len(images) == 1:
        return [data.shapes[index].tiles]
    return [tile_count(*image_size(image), data.processor.preprocessing) for image in images]


def _damage(store: FeatureStore, name: str, checked: dict[str, str | None]) -> str | None:
    """What is wrong with the features of an image, "" where there are none; `checked` saves looking twice."""
    if name not in checked:
        checked[name] = None
        try:
            store.read(name)
        except FeatureError as error:
            checked[name] = str(error) if store.file(name).exists() else ""
    return checked[name]


def _read(data: EncodedSource, index: int, place: int) -> np.ndarray:
    return data.processor.tiles(data.group(index).images[place])


def make_features(
    work: Sequence[Missing], store: FeatureStore, checkpoint: Checkpoint, config: TrainConfig, console: Console
) -> dict[str, str]:
    """Run the tower over all tiles, a fixed number at a time, and write an image's features once it is complete.

    Returns why images could not be decoded, by their names. Of several processes each decodes what its devices take;
    the first writes.
    """
    mesh = make_mesh(config.mesh)
    step, tower = _tower(checkpoint, config, mesh)
    owner = np.repeat(np.arange(len(work)), [each.count for each in work])
    first = np.cumsum([0, *(each.count for each in work)])
    ways = whole_batch(1, mesh)
    size = ways * min(TILES, -(-len(owner) // ways))
    side = checkpoint.config.vision.image_size

    @functools.lru_cache(maxsize=2)
    def decoded(image: int) -> np.ndarray | None:
        try:
            return work[image].read()
        except ImageError:
            return None

    problems: dict[str, str] = {}
    held: list[tuple[np.ndarray, bool]] = []
    for start in _bar("features of images", console)(range(0, len(owner), size)):
        owners = owner[start : start + size]
        out = gather(_step_on(mesh, step, tower, size, side, owners, start - first[owners], decoded), mesh)
        for image, features, readable in zip(owners, *out, strict=False):  # the last step's tiles may be fewer
            held.append((features, bool(readable)))
            if len(held) < work[image].count:
                continue
            each, whole = work[image], all(good for _, good in held)
            if not whole:
                problems[each.name] = _problem(each)
            elif is_main():
                store.write(each.name, np.stack([features for features, _ in held]))
            held = []
    return problems


def _step_on(
    mesh: Mesh,
    step: Callable,
    tower: nnx.State,
    size: int,
    side: int,
    owners: np.ndarray,
    offsets: np.ndarray,
    decoded: Callable[[int], np.ndarray | None],
) -> tuple[jax.Array, jax.Array]:
    """(features, whether they are of an image that could be decoded) of `size` tiles, each device decoding its own.

    Tile i is that of image `owners[i]` at place `offsets[i]` + i; those beyond are black.
    """
    split = NamedSharding(mesh, P(RULES["batch"]))

    @functools.cache
    def part(begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        tiles, readable = np.zeros((end - begin, side, side, 3), np.uint8), np.zeros(end - begin, bool)
        for i in range(begin, min(end, len(owners))):
            found = decoded(int(owners[i]))
            if found is not None:
                tiles[i - begin], readable[i - begin] = found[offsets[i] + i], True
        return tiles, readable

    def placed(which: int, shape: tuple[int, ...]) -> jax.Array:
        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            begin, end, _ = index[0].indices(size)
            return part(begin, end)[which]

        return jax.make_array_from_callback(shape, split, read)

    tiles, readable = placed(0, (size, side, side, 3)), placed(1, (size,))
    with jax.set_mesh(mesh):
        return step(tower, tiles), readable


def _problem(image: Missing) -> str:
    try:
        image.read()
    except ImageError as error:
        return str(error)
    return "the image could not be decoded when its features were to be made"


def _tower(checkpoint: Checkpoint, config: TrainConfig, mesh: Mesh) -> tuple[Callable, nnx.State]:
    """(`step(parameters, tiles [B, h, w, 3]) -> features [B, V, I]`, compiled; the tower's parameters on the mesh)."""
    model, dtype = checkpoint.config, jnp.dtype(config.compute_dtype)
    with nnx.use_eager_sharding(False):
        graphdef, like = nnx.split(nnx.eval_shape(lambda: VisionTower(model.vision, nnx.Rngs(0))))
    like = place_abstract(nnx.State({"vision": like}), mesh)
    loaded = load_params(checkpoint.path, model, like)[0]["vision"]
    params = jax.tree.map(lambda x: x.astype(config.frozen_dtype), loaded)

    @jax.jit
    def step(params: nnx.State, tiles: jax.Array) -> jax.Array:
        return tile_features(nnx.merge(graphdef, params), tiles, model, dtype)

    return step, params


def _bar(name: str, console: Console) -> Callable[[range], Any]:
    return functools.partial(track, description=name, console=console, transient=True, disable=not console.is_terminal)
