"""Images as requests carry them, and what the vision tower made of them, kept for the next request."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

import numpy as np

from mmrm_jax.data.images import ImageError, load_image, tile_image
from mmrm_jax.eval.scorer import Scorer
from mmrm_jax.serve.kept import Kept

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")


def from_data_url(url: str, name: str) -> bytes:
    """The bytes of `data:image/...;base64,...`. Raises ImageError for any other URL, a path, or broken base64.

    Nothing is fetched and no file is read on a client's word.
    """
    head = _DATA_URL.match(url[:100])
    if head is None:
        raise ImageError(
            f"{name} is {url[:40]!r}; an image must be a data URL, data:image/png;base64,...: nothing is fetched, and "
            "no file of the server is read"
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{name} is not valid base64: {error}") from error


class Pictures:
    """The vision tower's features of images, kept by their bytes.

    Reward training asks about the same image again and again, and the tower is much of what an answer costs.
    """

    def __init__(self, scorer: Scorer, max_pixels: int, capacity: int = 2**30):
        self.scorer, self.max_pixels = scorer, max_pixels
        self.kept = Kept(capacity)

    def of(self, image: bytes, name: str) -> np.ndarray:
        """Features [T, V, I]. Raises ImageError where the bytes are no image, or one of too many pixels."""
        digest = hashlib.sha256(image).digest()
        found = self.kept.get(digest)
        if found is None:
            try:
                tiles = tile_image(load_image(image, self.max_pixels), self.scorer.checkpoint.processor.preprocessing)
            except ImageError as error:
                raise ImageError(f"{name}: {error}") from error
            found = self.scorer.features(tiles)
            self.kept.put(digest, found)
        return found
