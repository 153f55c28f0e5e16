"""A reward model in a few lines of Python, and the one way that responses are scored: from files and from code.

    rm = mmrm_jax.load("reward-model")
    rm.score("photo.jpg", "What is this?", ["A pear.", "A blue bus."])      # -> array([ 1.9, -0.4], dtype=float32)

Requests are padded to the shapes of a ladder (`mmrm_jax.data.ladder`), so that however many there are, the model is
compiled for a few; image and prompt run through it once, however many responses there are to them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Float, UInt8
from PIL import Image

from mmrm_jax.config import BranchInput, MeshConfig, ModelConfig
from mmrm_jax.data.batching import EncodedGroup, collate
from mmrm_jax.data.buckets import BatchShape
from mmrm_jax.data.folder import read_object
from mmrm_jax.data.formats.fields import Field, check_asked, check_response
from mmrm_jax.data.images import DECODE_ERRORS, MAX_PIXELS, ImageError, as_rgb, tile_image
from mmrm_jax.data.ladder import Ladder, step_up
from mmrm_jax.models.hf.names import PROXY_PREFIX
from mmrm_jax.models.hf.tensors import open_tensors
from mmrm_jax.models.hf.weights import load_params
from mmrm_jax.models.internvl import tile_features
from mmrm_jax.models.rope import fixed
from mmrm_jax.sharding import make_mesh, partition_spec, put_batch, whole_batch
from mmrm_jax.train.setup import Checkpoint, initial_params, open_checkpoint
from mmrm_jax.train.state import abstract_model, place_abstract
from mmrm_jax.types import Batch, Group, Prefix, Responses

Branch = Literal["primary", "proxy"]
Dtype = Literal["float32", "bfloat16"]

Picture: TypeAlias = Image.Image | Path | str | bytes  # decoded, a path, or the bytes of a file
Pictures: TypeAlias = Picture | Sequence[Picture] | None
Request: TypeAlias = tuple[Pictures, str, Sequence[str]] | tuple[Pictures, str, Sequence[str], Sequence[str]]
Rewards: TypeAlias = Float[np.ndarray, " N"]
Read: TypeAlias = Float[np.ndarray, "2 layers P J E"]  # keys and values of a prefix

VIEWS: dict[str, BranchInput] = {"primary": "multimodal"}  # what the model that scores sees
PROXY_INPUT = "proxy_input"  # in config.json: what the proxy beside a model was trained to see


def load(
    path: str | Path,
    *,
    proxy: bool = False,
    dtype: Dtype = "float32",
    batch_size: int = 16,
    draw_score: int | None = None,
) -> Scorer:
    """The reward model of a checkpoint folder, on all devices of this machine.

    `dtype` is of activations and matrix products; the head and the rewards are float32. `batch_size` is how many images
    and prompts a step takes at most. With `proxy` the text-only proxy that `mmrm export --proxy` wrote is loaded, too.
    A checkpoint without a score head gets one that is drawn from the seed `draw_score`. Raises ValueError where the
    folder is no reward model, cannot be read, or has no proxy.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    scorer, _ = open_scorer(Path(path), make_mesh(MeshConfig()), dtype, batch_size, draw_score)
    return with_proxy(scorer) if proxy else scorer


class Scorer:
    """A reward model and what turns images and texts into its input. Several threads may call its methods."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        params: Mapping[str, nnx.State],
        mesh: Mesh,
        *,
        views: dict[str, BranchInput],
        dtype: Dtype,
        batch_size: int,
    ):
        images = checkpoint.processor.preprocessing
        self.checkpoint, self.params, self.mesh, self.views = checkpoint, params, mesh, views
        self.dtype: Dtype = dtype
        self.batch_size = whole_batch(batch_size, mesh)
        most = images.max_tiles + (images.use_thumbnail and images.max_tiles > 1) if images.dynamic else 1
        self.ladder = Ladder(checkpoint.processor.max_length, most, images.image_size)
        self._steps = {branch: make_score_step(checkpoint.config, dtype, branch) for branch in views}
        self._tower = make_tower_step(checkpoint.config, dtype)
        self._read = make_read_step(checkpoint.config, dtype)
        self._answer = make_answer_step(checkpoint.config)

    def score(self, image: Pictures, prompt: str, responses: Sequence[str], history: Sequence[str] = ()) -> Rewards:
        """The rewards of responses to one prompt and its image, or several images, or none: float32, [N].

        `history` are the turns before the prompt, of the user and the assistant in turn. Raises ImageError, RowError or
        TextError (all ValueErrors) where something cannot be scored, and says what.
        """
        return self._rewards_of([self._encoded(image, prompt, responses, history)], "primary")[0]

    def score_many(self, requests: Iterable[Request], branch: Branch = "primary") -> list[Rewards]:
        """The rewards of each (image, prompt, responses), in order; `branch` "proxy" gives those of the proxy.

        A history may be the fourth, as `score` takes it.

        Requests of one shape run together. Raises ValueError naming the request that cannot be scored, and why.
        """
        if branch not in self.views:
            raise ValueError("the proxy is not loaded: mmrm_jax.load(path, proxy=True)")
        asked: list[list[EncodedGroup]] = []
        for i, request in enumerate(requests):
            try:
                image, prompt, responses = request[:3]
                history = request[3] if len(request) == 4 else ()
                asked.append(self._encoded(image, prompt, responses, history, proxy=branch == "proxy"))
            except ValueError as error:
                raise ValueError(f"request {i}: {error}") from error
        return self._rewards_of(asked, branch)

    def tiles(self, image: Picture) -> UInt8[np.ndarray, "T S S 3"]:
        """The tiles of one image; raises ImageError where it cannot be read."""
        if isinstance(image, Image.Image):
            return tile_image(_rgb(image), self.checkpoint.processor.preprocessing)
        return self.checkpoint.processor.tiles(Path(image) if isinstance(image, str) else image)

    def features(self, tiles: UInt8[np.ndarray, "T S S 3"]) -> Float[np.ndarray, "T V I"]:
        """What the vision tower makes of an image's tiles: `encode` takes them in their place, and the tower does not
        run again for the same image."""
        padded = np.zeros((step_up(len(tiles)), *tiles.shape[1:]), tiles.dtype)
        padded[: len(tiles)] = tiles
        with jax.set_mesh(self.mesh):
            return np.asarray(self._tower(self.params["primary"], padded))[: len(tiles)].copy()  # without the padding

    def encode(
        self,
        tiles: Sequence[np.ndarray],
        prompt: str,
        responses: Sequence[str],
        history: Sequence[str] = (),
        *,
        proxy: bool = False,
        alone: bool = False,
    ) -> list[EncodedGroup]:
        """A request as groups of up to `ladder.responses` responses each; `tiles` are those of each of its images,
        or what `features` made of them.

        What a group's responses begin with alike counts as its prefix; with `alone` the prefix is the same whatever the
        responses are, so that what `read` makes of it serves others. Raises RowError or TextError where a text cannot
        be scored.
        """
        if isinstance(responses, str) or isinstance(history, str):
            name = "responses" if isinstance(responses, str) else "history"
            raise TypeError(f"{name} is one text; it must be a list of them")
        if not responses:
            raise ValueError("no responses: there is nothing to score")
        checked = [check_response(Field(f"responses[{i}]", text)) for i, text in enumerate(responses)]
        said = [Field(f"history[{i}]", text) for i, text in enumerate(history)]
        check_asked([*said, Field("prompt", prompt)], len(tiles))
        views: dict[str, BranchInput] = {b: view for b, view in self.views.items() if proxy or b == "primary"}
        most, processor = self.ladder.responses, self.checkpoint.processor
        beside = ("",) if alone else ()  # no response: all that it shares with another one is what comes before
        parts = ((*checked[i : i + most], *beside) for i in range(0, len(checked), most))
        groups = (Group("", prompt, part, (), None, "", "", 0, history=tuple(history)) for part in parts)
        found = (processor.encode(group, 0, views, features=tiles) for group in groups)
        return [dataclasses.replace(g, responses=g.responses[: len(g.responses) - len(beside)]) for g in found]

    def batches(self, groups: Sequence[EncodedGroup]) -> list[list[int]]:
        """Which groups run together: those of one shape, `batch_size` of them at most."""
        alike: dict[tuple, list[int]] = {}
        for i, group in enumerate(groups):
            alike.setdefault(self.ladder.shape(group.shape).key, []).append(i)
        size = self.batch_size
        return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]

    def shape(self, groups: Sequence[EncodedGroup]) -> BatchShape:
        """The shape that groups run in together, whose own shapes differ by the length of rows of responses alone."""
        shapes = [self.ladder.shape(group.shape) for group in groups]
        return max(shapes, key=lambda shape: shape.rows)

    def rewards(self, groups: Sequence[EncodedGroup], branch: Branch = "primary") -> list[Rewards]:
        """The rewards of one batch of groups that `shape` covers, at most `batch_size` of them."""
        found = self.run(self._batch(groups, self.shape(groups), branch), branch)
        return [row[: len(group.responses)] for row, group in zip(found, groups, strict=False)]

    @property
    def reads_alone(self) -> bool:
        """Whether a prefix is read alike whatever the responses; not where RoPE looks at their lengths."""
        return fixed(self.checkpoint.config.decoder, self.checkpoint.processor.max_length)

    @property
    def read_bytes(self) -> int:
        """Bytes that `read` gives for each token of a prefix."""
        c = self.checkpoint.config.decoder
        return 2 * c.num_layers * c.num_kv_heads * c.head_width * jnp.dtype(self.dtype).itemsize

    def read(self, groups: Sequence[EncodedGroup], branch: Branch = "primary") -> list[Read]:
        """What responses see of each group's prefix, of groups as `rewards` takes them."""
        batch = self._batch(groups, self.shape(groups), branch)
        with jax.set_mesh(self.mesh):
            placed = self._placed(batch).prefixes[branch]
            found = np.asarray(self._read(self.params[branch], placed))
        return [row[:, :, : len(g.prefixes[branch].tokens)].copy() for row, g in zip(found, groups, strict=False)]

    def answer(self, read: Sequence[Read], groups: Sequence[EncodedGroup], branch: Branch = "primary") -> list[Rewards]:
        """`rewards` of groups whose prefixes `read` read before."""
        shape = dataclasses.replace(self.shape(groups), tiles=0)
        batch = self._batch([dataclasses.replace(group, tiles=None) for group in groups], shape, branch)
        layers, _, *heads = read[0].shape[1:]
        whole = np.zeros((len(batch.group_index), 2, layers, shape.prefixes[branch], *heads), read[0].dtype)
        for row, found in zip(whole, read, strict=False):
            row[:, :, : found.shape[2]] = found
        lengths = batch.prefixes[branch].lengths
        with jax.set_mesh(self.mesh):
            placed = self._placed(dataclasses.replace(batch, prefixes={}))
            by_group = NamedSharding(self.mesh, partition_spec(("batch",)))
            before = jax.device_put(whole, by_group), jax.device_put(lengths, by_group)
            rewards = np.asarray(self._answer(self.params[branch], *before, placed.responses))
        return [row[: len(group.responses)] for row, group in zip(rewards, groups, strict=False)]

    def _placed(self, batch: Batch) -> Batch:
        shared = {name for name, view in self.views.items() if view == "blank"}
        return put_batch(batch, self.mesh, micro=False, shared=shared)

    def run(self, batch: Batch, branch: Branch = "primary") -> Float[np.ndarray, "G N"]:
        """The rewards of a batch that the host holds, float32; those of padding have no meaning."""
        with jax.set_mesh(self.mesh):
            return np.asarray(self._steps[branch](self.params[branch], self._placed(batch)))

    def _encoded(
        self,
        image: Pictures,
        prompt: str,
        responses: Sequence[str],
        history: Sequence[str] = (),
        *,
        proxy: bool = False,
    ) -> list[EncodedGroup]:
        return self.encode([self.tiles(each) for each in _several(image)], prompt, responses, history, proxy=proxy)

    def _rewards_of(self, asked: Sequence[Sequence[EncodedGroup]], branch: Branch) -> list[Rewards]:
        """The rewards of requests that have been encoded, in order."""
        groups = [group for parts in asked for group in parts]
        rewards: dict[int, Rewards] = {}
        for batch in self.batches(groups):
            rewards |= zip(batch, self.rewards([groups[i] for i in batch], branch), strict=True)
        ordered = (rewards[i] for i in range(len(groups)))
        return [np.concatenate([next(ordered) for _ in parts]) for parts in asked]

    def _batch(self, groups: Sequence[EncodedGroup], shape: BatchShape, branch: Branch) -> Batch:
        """A padded batch of what one branch sees of these groups."""
        size = min(whole_batch(step_up(len(groups)), self.mesh), self.batch_size)
        shape = dataclasses.replace(shape, prefixes={branch: shape.prefixes[branch]})
        view = self.views[branch]
        # Padding has the form of tiles: pixels, or features. The blank tile of a text-only input is always pixels.
        tiles = next((group.tiles for group in groups if group.tiles is not None), None)
        like = None if view == "blank" or tiles is None else np.zeros_like(tiles[:1])
        batch = collate(
            groups, self.ladder.buckets(shape), num_groups=size, micro_batches=1, views={branch: view}, blank=like
        )
        return jax.tree.map(lambda x: x[0], batch)


def make_score_step(
    model: ModelConfig, dtype: Dtype, branch: str = "primary"
) -> Callable[[nnx.State, Batch], jax.Array]:
    """`step(params, batch) -> rewards [G, N]`, float32, compiled; a padding response's reward has no meaning."""
    graphdef, _ = abstract_model(model)

    @jax.jit
    def step(params: nnx.State, batch: Batch) -> jax.Array:
        prefix = batch.prefixes[branch]
        return nnx.merge(graphdef, params).rewards(prefix, batch.responses, jnp.dtype(dtype))

    return step


def make_tower_step(model: ModelConfig, dtype: Dtype) -> Callable[[nnx.State, np.ndarray], jax.Array]:
    """`step(params, tiles [T, S, S, 3]) -> features [T, V, I]`, compiled."""
    graphdef, _ = abstract_model(model)

    @jax.jit
    def step(params: nnx.State, tiles: jax.Array) -> jax.Array:
        return tile_features(nnx.merge(graphdef, params).vision, tiles, model, jnp.dtype(dtype))

    return step


def make_read_step(model: ModelConfig, dtype: Dtype) -> Callable[[nnx.State, Prefix], jax.Array]:
    """`step(params, prefix) -> [G, 2, layers, P, J, E]`, keys and values in `dtype`, compiled."""
    graphdef, _ = abstract_model(model)

    @jax.jit
    def step(params: nnx.State, prefix: Prefix) -> jax.Array:
        return nnx.merge(graphdef, params).read_prefix(prefix, jnp.dtype(dtype))

    return step


def make_answer_step(model: ModelConfig) -> Callable[[nnx.State, jax.Array, jax.Array, Responses], jax.Array]:
    """`step(params, read, prefix_lengths, responses) -> rewards [G, N]`, float32, compiled."""
    graphdef, _ = abstract_model(model)

    @jax.jit
    def step(params: nnx.State, read: jax.Array, lengths: jax.Array, responses: Responses) -> jax.Array:
        return nnx.merge(graphdef, params).rewards_after(read, lengths, responses)

    return step


def open_scorer(
    path: Path, mesh: Mesh, dtype: Dtype, batch_size: int, draw_score: int | None
) -> tuple[Scorer, list[str]]:
    """A checkpoint folder's scorer, and what of the model the folder lacked and `draw_score` was the seed of.

    Raises ValueError where it lacks something and there is no seed, or cannot be read.
    """
    checkpoint = open_checkpoint(path)
    params, drawn = initial_params(checkpoint, draw_score or 0, mesh)
    if drawn and draw_score is None:
        raise ValueError(
            f"{path} has no score.weight, so it is no reward model yet: train it (mmrm train, mmrm export), or give "
            "--draw-score SEED (in Python, draw_score=SEED) to score with a random head"
        )
    views: dict[str, BranchInput] = {"primary": "multimodal"}
    return Scorer(checkpoint, {"primary": params}, mesh, views=views, dtype=dtype, batch_size=batch_size), drawn


def holds_proxy(folder: Path) -> bool:
    """Whether a checkpoint folder has the weights of a proxy beside the model's."""
    return any(name.startswith(PROXY_PREFIX) for name in open_tensors(folder))


def with_proxy(scorer: Scorer) -> Scorer:
    """The same model with the proxy of its folder beside it.

    What the proxy sees in place of the image is in `config.json` as `proxy_input`; a folder that does not say so is
    taken for one of the paper's, whose proxy sees a white tile. Raises ValueError where there is no proxy.
    """
    checkpoint = scorer.checkpoint
    if not holds_proxy(checkpoint.path):
        raise ValueError(f"{checkpoint.path} holds no proxy: mmrm export --proxy writes it, of a shortcut_aware run")
    sees = read_object(checkpoint.path / "config.json").get(PROXY_INPUT, "blank")
    if sees not in ("absent", "blank"):
        raise ValueError(f"{checkpoint.path / 'config.json'}: {PROXY_INPUT} is {sees!r}; it must be absent or blank")
    like = place_abstract(abstract_model(checkpoint.config)[1], scorer.mesh)
    params, _ = load_params(checkpoint.path, checkpoint.config, like, branch="proxy")
    return Scorer(
        checkpoint,
        {**scorer.params, "proxy": params},
        scorer.mesh,
        views={**scorer.views, "proxy": sees},
        dtype=scorer.dtype,
        batch_size=scorer.batch_size,
    )


def _several(image: Pictures) -> Sequence[Picture]:
    if image is None:
        return ()
    several = [image] if isinstance(image, Image.Image | Path | str | bytes) else list(image)
    for each in several:
        if not isinstance(each, Image.Image | Path | str | bytes):
            raise ImageError(
                f"an image is a {type(each).__name__}; it must be a path, the bytes of a file, or a Pillow image "
                "(Image.fromarray makes one of an array)"
            )
        if isinstance(each, str) and each.startswith(("http:", "https:", "data:")):
            raise ImageError(f"an image is given as {each:.80}; nothing is fetched: give its bytes, or a file's path")
    return several


def _rgb(image: Image.Image) -> Image.Image:
    """As `load_image` has it: RGB, transparency dropped; a file that Pillow has opened is decoded here."""
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"the image of {image.width} x {image.height} pixels is over the limit of {MAX_PIXELS:,}")
    try:
        return as_rgb(image, "the image")
    except DECODE_ERRORS as error:
        raise ImageError(f"the image cannot be decoded: {error}") from error
