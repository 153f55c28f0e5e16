"""What a frozen tower makes of images, kept on disk: one safetensors file an image, made once and checked when read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mmrm_jax.data.folder import why, write_object
from mmrm_jax.data.images import ImageError

BLANK = "blank"  # what the features of the white tile go by

_TENSOR = "features"


class FeatureError(ValueError):
    """Features that are missing or damaged."""


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """A folder of features [T, V, I] in one dtype; `shape` is (V, I). Images go by the SHA-256 of their bytes.

    A file is whole from the moment it is there: a run that is killed leaves what it has made, and nothing else.
    """

    folder: Path
    shape: tuple[int, int]
    dtype: str

    @classmethod
    def of_settings(cls, root: Path, settings: dict[str, Any], shape: tuple[int, int], dtype: str) -> FeatureStore:
        """The folder below `root` for all that features depend on beside the image; it says so in `settings.json`."""
        text = json.dumps(settings | {"dtype": dtype}, sort_keys=True)
        folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        write_object(folder / "settings.json", json.loads(text))
        return cls(folder, shape, dtype)

    def file(self, name: str) -> Path:
        """Where the features of an image are, or will be."""
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, name: str) -> Float[np.ndarray, "T V I"]:
        """The features of an image; raises FeatureError where there are none, or not those that were written."""
        file = self.file(name)
        try:
            with safe_open(file, framework="numpy") as f:
                features, metadata = f.get_tensor(_TENSOR), f.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise FeatureError(f"{file} cannot be read: {why(error)}") from error
        if features.shape[1:] != self.shape or features.dtype.name != self.dtype:
            raise FeatureError(f"{file} holds {features.dtype.name}{list(features.shape)}, not features of this model")
        if _checksum(features) != metadata.get("sha256"):
            raise FeatureError(f"{file} has changed: its SHA-256 is another")
        return features

    def write(self, name: str, features: Float[np.ndarray, "T V I"]) -> None:
        """Keep the features of an image, in place of any that are there."""
        file = self.file(name)
        file.parent.mkdir(exist_ok=True)
        part = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
        part.write_bytes(save({_TENSOR: features}, {"sha256": _checksum(features)}))
        part.replace(file)


def _checksum(features: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(features).view(np.uint8).data).hexdigest()


@dataclasses.dataclass(frozen=True)
class SourceFeatures:
    """The features of a source's groups: `names[i]` are those of group i's images in the store, none without an image.

    `problems` says why an image has none: it could not be decoded. `blank` [1, V, I] is those of the white tile.
    """

    store: FeatureStore
    blank: np.ndarray = dataclasses.field(repr=False)  # Grain writes out the repr of what it maps
    names: tuple[tuple[str, ...], ...] = dataclasses.field(repr=False)
    problems: Mapping[str, str] = dataclasses.field(repr=False)

    def of(self, index: int) -> list[Float[np.ndarray, "T V I"]]:
        """The features of each image of a group.

        Raises ImageError where an image could not be decoded, FeatureError where its features have been lost.
        """
        return [self._of(name) for name in self.names[index]]

    def _of(self, name: str) -> Float[np.ndarray, "T V I"]:
        if name in self.problems:
            raise ImageError(self.problems[name])
        try:
            return self.store.read(name)
        except FeatureError as error:
            raise FeatureError(f"{error}; it was whole when this run began: the same command makes it anew") from error
