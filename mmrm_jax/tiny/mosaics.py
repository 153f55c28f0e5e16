"""Pictures of many shades for pretraining: patches of colour under uneven light, with questions about them.

The shapes world knows six colours on grey. A tower that has seen nothing else tells photos apart badly: these pictures
teach it finer colours, their shares and their places. A picture is a pure function of its seed and index.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from mmrm_jax.data.shapes import IMAGE_SIZE, Caption

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 30, 35),
    "dark red": (120, 20, 25),
    "pink": (240, 150, 175),
    "orange": (245, 135, 20),
    "light orange": (250, 190, 120),
    "brown": (120, 75, 40),
    "dark brown": (65, 40, 25),
    "beige": (225, 205, 165),
    "yellow": (245, 220, 40),
    "light yellow": (250, 240, 160),
    "olive": (120, 125, 40),
    "lime": (170, 215, 50),
    "green": (45, 155, 55),
    "dark green": (20, 80, 35),
    "light green": (160, 215, 150),
    "teal": (25, 135, 130),
    "light blue": (145, 195, 235),
    "blue": (35, 85, 215),
    "dark blue": (20, 35, 100),
    "purple": (115, 45, 150),
    "lilac": (190, 160, 220),
    "white": (245, 245, 242),
    "light grey": (190, 190, 190),
    "grey": (125, 125, 125),
    "black": (22, 22, 24),
}
NAMES = tuple(COLOURS)
PLACES = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1), "middle": (0.5, 0.5)}
_STREAM = 2000  # no stream of the shapes world has this number
_SHARE = 0.04  # of the picture, below which a colour is not spoken of


def make_mosaic(seed: int, index: int) -> Caption:
    """Picture `index` of a stream with one question: which colours, whether one is there, or which is at a place."""
    rng = np.random.default_rng([seed, _STREAM, 0, index])
    labels = _labels(rng)
    pixels = _shaded(labels, rng)
    prompt, answer = (_colours, _presence, _place)[int(rng.integers(3))](labels, rng)
    return Caption(pixels=pixels, prompt=prompt, answer=answer)


def make_mosaic_check(seed: int, index: int) -> Caption:
    """Picture `index` of another stream with the question whether a colour is there: Yes or No."""
    rng = np.random.default_rng([seed, _STREAM, 1, index])
    labels = _labels(rng)
    pixels = _shaded(labels, rng)
    prompt, answer = _presence(labels, rng)
    return Caption(pixels=pixels, prompt=prompt, answer=answer)


def _labels(rng: np.random.Generator) -> np.ndarray:
    """The number of each pixel's colour in `NAMES`, int [S, S]: patches over a background."""
    canvas = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), int(rng.integers(len(NAMES))))
    draw = ImageDraw.Draw(canvas)
    shades = rng.choice(len(NAMES), size=int(rng.integers(1, 5)), replace=False)
    for _ in range(int(rng.integers(2, 9))):
        centre, half = rng.uniform(0, IMAGE_SIZE, 2), rng.uniform(2, 12, 2)
        box = [*(centre - half), *(centre + half)]
        fill = int(rng.choice(shades))
        (draw.ellipse if rng.random() < 0.6 else draw.rectangle)(box, fill=fill)
    return np.asarray(canvas).astype(np.int64)


def _shaded(labels: np.ndarray, rng: np.random.Generator) -> UInt8[np.ndarray, "32 32 3"]:
    """Each colour a little off its name's, under light that falls off to one side, with grain."""
    palette = np.asarray(list(COLOURS.values()), np.float64)
    palette = palette + rng.normal(0, 8, palette.shape)
    y, x = np.mgrid[-1 : 1 : IMAGE_SIZE * 1j, -1 : 1 : IMAGE_SIZE * 1j]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.18)
    light = rng.uniform(0.88, 1.08) + strength * (np.cos(angle) * x + np.sin(angle) * y)
    picture = palette[labels] * light[..., None] + rng.normal(0, rng.uniform(1, 9), (*labels.shape, 3))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _shares(labels: np.ndarray) -> Float[np.ndarray, " colours"]:
    return np.bincount(labels.ravel(), minlength=len(NAMES)) / labels.size


def _colours(labels: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """The three colours with most of the picture, in this order."""
    shares = _shares(labels)
    found = [NAMES[i] for i in np.argsort(-shares, kind="stable")[:3] if shares[i] >= _SHARE]
    prompt = _pick(rng, ("Which colours are in the picture?", "What colours do you see, the largest first?"))
    return prompt, ", ".join(found).capitalize() + "."


def _presence(labels: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """Whether a colour is there: as often one that is as one that is not."""
    shares, there = _shares(labels), bool(rng.random() < 0.5)
    chosen = rng.choice(np.flatnonzero(shares >= _SHARE if there else shares == 0))
    return f"Is there any {NAMES[int(chosen)]} in the picture?", "Yes." if there else "No."


def _place(labels: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """The commonest colour of a quarter of the picture, or of its middle."""
    place = _pick(rng, tuple(PLACES))
    row, column = (round(c * IMAGE_SIZE / 2) for c in PLACES[place])
    part = labels[row : row + IMAGE_SIZE // 2, column : column + IMAGE_SIZE // 2]
    return f"Which colour is most of the {place}?", NAMES[int(np.argmax(_shares(part)))].capitalize() + "."


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]
