"""Random changes of training images that leave what they show, so that few images are not learnt by heart."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageEnhance

from mmrm_jax.config import Augmentation


def augment(image: Image.Image, how: Augmentation, rng: np.random.Generator) -> Image.Image:
    """A random part of the image at the image's own size, so that it is cut into as many tiles; perhaps mirrored.

    Every call draws the same number of values from `rng`, whatever the settings.
    """
    share, x, y, mirrored, brightness = rng.uniform(size=5)
    side = math.sqrt(how.crop + (1 - how.crop) * share)
    width, height = image.width * side, image.height * side
    left, top = x * (image.width - width), y * (image.height - height)
    if side < 1:
        image = image.resize(image.size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if how.mirror and mirrored < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if how.brightness:
        image = ImageEnhance.Brightness(image).enhance(1 + how.brightness * (2 * brightness - 1))
    return image
