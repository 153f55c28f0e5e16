"""The shapes world: rendered scenes with questions, right and wrong answers, and text cues of known strength.

A scene is one coloured shape on a grey background. A comparison pairs the right answer to a question with one that
is wrong in exactly one asked attribute; its label follows the image except for a known share of label noise, and a
text cue (a long or a hedged answer) agrees with the label at a known rate. The environments' cues conflict, so a
reward model that reads only the text does well in its own environment and badly in the others.

Everything here is a pure function of a seed or of a `numpy.random.Generator`.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from mmrm_jax.types import Comparison, Group

IMAGE_SIZE = 32
SUPERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "green": (30, 165, 50),
    "blue": (35, 75, 225),
    "yellow": (250, 230, 40),
    "purple": (140, 35, 180),
    "orange": (250, 135, 15),
}
# Half the extent of a shape and the distance of an off-centre place from the centre, in pixels of the final image.
RADII = {"small": 4.5, "large": 8.0}
PLACES = {"left": (-7.0, 0.0), "right": (7.0, 0.0), "top": (0.0, -7.0), "bottom": (0.0, 7.0), "centre": (0.0, 0.0)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")

VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "size": tuple(RADII),
    "position": tuple(PLACES),
}

# The numbers seed the generator: changing one changes the data set.
STYLES = ("plain", "long", "hedged")
ENVIRONMENTS = {"long": 0, "hedged": 1, "short": 2, "neutral": 3}
SPLITS = {"train": 0, "validation": 1, "test": 2}
_CAPTIONS = 1000  # takes the place of the environment's number, so captions share no stream with comparisons


@dataclasses.dataclass(frozen=True)
class Scene:
    """One shape: `shape`, `colour`, `size` and `position` are each one of `VALUES[field]`."""

    shape: str
    colour: str
    size: str
    position: str


@dataclasses.dataclass(frozen=True)
class WorldRates:
    """How strong the cue is, and how noisy labels and pictures are.

    The winner is the right answer with probability `1 - label_noise`. Independently of that, the cue agrees with the
    winner with probability `cue_agreement` (in "neutral", where the cue says nothing, with probability 1/2).
    `image_noise` is the standard deviation of the pixels' noise, of 255: the more, the less the image says.
    """

    cue_agreement: float = 0.9
    label_noise: float = 0.1
    image_noise: float = 4.0

    def __post_init__(self) -> None:
        if self.image_noise < 0:
            raise ValueError(f"WorldRates.image_noise is {self.image_noise}; give 0 or more")
        for name in ("cue_agreement", "label_noise"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"WorldRates.{name} is {value}; it is a probability, give a value from 0 to 1")


DEFAULT_RATES = WorldRates()


@dataclasses.dataclass(frozen=True)
class Question:
    """A kind of question: the attributes it asks for, its phrasings and those of its answer.

    In an answer "{attribute}" takes a value and "|" marks where a hedge may be inserted.
    """

    asks: tuple[str, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]


QUESTIONS = (
    Question(
        ("size", "colour", "shape"),
        ("What is in the picture?", "What do you see in this image?", "Describe the picture in one sentence."),
        (
            "There is| a {size} {colour} {shape} in the picture.",
            "The picture shows| a {size} {colour} {shape}.",
            "It is| a {size} {colour} {shape}.",
        ),
    ),
    Question(
        ("colour",),
        ("Which colour is the shape?", "What colour is the object in the picture?", "What is the colour of the shape?"),
        ("The shape is| {colour}.", "It is| {colour}.", "The colour is| {colour}."),
    ),
    Question(
        ("shape",),
        ("Which shape is in the picture?", "What shape do you see?", "What kind of shape is this?"),
        ("It is| a {shape}.", "The shape is| a {shape}.", "The picture shows| a {shape}."),
    ),
    Question(
        ("position",),
        ("Where is the shape?", "In which part of the picture is the shape?", "Where do you see the object?"),
        ("The shape is| {position}.", "It is| {position} of the picture.", "You can see it| {position}."),
    ),
)

_WORDING = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}

CAPTION = "There is a {size} {colour} {shape} {position} of the picture."

FILLERS = (
    ", as anyone can see in the scene",
    ", which is easy to tell from the picture",
    ", and there is nothing else in it",
    ", as a careful look will show",
    ", and this is what the question was about",
    ", which one can say after a first look",
    ", and the rest is just plain background",
    ", as one finds out by looking closely",
)

# Those that begin with a capital letter come before the answer, the others are inserted into it.
HEDGES = (
    "I am not entirely sure, but I think",
    "It is hard to say, but it may be that",
    "I could be wrong here, but I believe",
    "As far as I can tell, it seems that",
    "I would guess, without being certain, that",
    "Perhaps I am mistaken, but it looks like",
    ", if I am not mistaken,",
    ", as far as I can make out,",
)


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene with every attribute uniform and independent."""
    return Scene(**{name: _pick(rng, values) for name, values in VALUES.items()})


def render(
    scene: Scene, rng: np.random.Generator, noise: float = DEFAULT_RATES.image_noise
) -> UInt8[np.ndarray, "32 32 3"]:
    """Draw a scene: RGB, with a random grey background, jitter of place, size and colour, and pixel noise.

    `noise` is its standard deviation, of 255.
    """
    scale = SUPERSAMPLING
    grey = rng.uniform(70.0, 200.0) + rng.uniform(-6.0, 6.0, size=3)
    colour = np.asarray(COLOURS[scene.colour]) + rng.uniform(-14.0, 14.0, size=3)
    centre = IMAGE_SIZE / 2 + np.asarray(PLACES[scene.position]) + rng.uniform(-1.0, 1.0, size=2)
    radius = RADII[scene.size] * rng.uniform(0.93, 1.07)

    image = Image.new("RGB", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), _rgb(grey))
    _draw_shape(ImageDraw.Draw(image), scene.shape, centre * scale, radius * scale, _rgb(colour))
    pixels = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), dtype=np.float64)
    noisy = pixels + rng.normal(0.0, noise, size=pixels.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _rgb(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in np.clip(np.rint(values), 0, 255))
    return red, green, blue


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: np.ndarray, radius: float, fill: tuple[int, int, int]
) -> None:
    """Draw `shape` around `centre` (x, y); the factors give the shapes about equal areas."""

    def polygon(*corners: tuple[float, float]) -> None:
        draw.polygon([(centre[0] + radius * x, centre[1] + radius * y) for x, y in corners], fill=fill)

    if shape == "circle":
        draw.ellipse([*(centre - 0.95 * radius), *(centre + 0.95 * radius)], fill=fill)
    elif shape == "square":
        polygon((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
    elif shape == "triangle":
        polygon((0.0, -1.0), (1.05, 0.85), (-1.05, 0.85))
    elif shape == "diamond":
        polygon((0.0, -1.1), (0.9, 0.0), (0.0, 1.1), (-0.9, 0.0))
    elif shape == "cross":
        polygon((-1.05, -0.36), (1.05, -0.36), (1.05, 0.36), (-1.05, 0.36))
        polygon((-0.36, -1.05), (0.36, -1.05), (0.36, 1.05), (-0.36, 1.05))
    else:
        raise ValueError(f"Scene.shape is {shape!r}; it is one of {', '.join(SHAPES)}")


def encode_png(pixels: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """PNG bytes of an RGB array."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def fill_answer(template: str, scene: Scene) -> str:
    """Fill an answer's phrasing with a scene's attributes; the hedge mark "|" stays in."""
    return template.format(**{**vars(scene), "position": _WORDING[scene.position]})


def style_answer(answer: str, style: str, rng: np.random.Generator) -> str:
    """Finish an answer of `fill_answer`: "plain", "long" (a filler clause added) or "hedged" (one hedge added)."""
    if style == "hedged":
        hedge = _pick(rng, HEDGES)
        if hedge.startswith(","):
            return answer.replace("|", hedge)
        return f"{hedge} {answer[0].lower()}{answer[1:]}".replace("|", "")
    answer = answer.replace("|", "")
    if style == "long":
        return answer.removesuffix(".") + _pick(rng, FILLERS) + "."
    if style != "plain":
        raise ValueError(f"the style is {style!r}; it is plain, long or hedged")
    return answer


@dataclasses.dataclass(frozen=True)
class SampledComparison:
    """A comparison with its hidden truth.

    `right` and `wrong` are the plain answers, `responses` the same two as shown, in random order and styled:
    `right_index` and `winner` index them. `cue_agrees` says whether the environment's cue picks the winner; None in
    "neutral", which has no cue. `changed` is the attribute in which the wrong answer is wrong, `styled_index` the
    response that is not plain and `style` its style.
    """

    scene: Scene
    pixels: UInt8[np.ndarray, "32 32 3"]
    prompt: str
    right: str
    wrong: str
    changed: str
    responses: tuple[str, str]
    right_index: int
    winner: int
    styled_index: int
    style: str
    cue_agrees: bool | None

    @property
    def label_is_right(self) -> bool:
        """Whether the winner is the right answer, that is, whether the label has no noise."""
        return self.winner == self.right_index


def sample_comparison(
    rng: np.random.Generator, environment: str, rates: WorldRates = DEFAULT_RATES
) -> SampledComparison:
    """Draw a scene, a question and two answers with a noisy label and the environment's cue.

    Environments: "long" (one answer is long and wins at the rate `cue_agreement`), "hedged" (one is hedged and
    loses at that rate), "short" (one is long and loses at that rate) and "neutral" (one is long or hedged, and
    whether it wins is a fair coin). Raises ValueError for another environment.
    """
    _code(ENVIRONMENTS, environment, "environment")
    scene = sample_scene(rng)
    pixels = render(scene, rng, rates.image_noise)
    question = QUESTIONS[int(rng.integers(len(QUESTIONS)))]
    prompt, template = _pick(rng, question.prompts), _pick(rng, question.answers)
    changed = _pick(rng, question.asks)
    other = _pick(rng, tuple(v for v in VALUES[changed] if v != getattr(scene, changed)))
    answers = {
        True: fill_answer(template, scene),
        False: fill_answer(template, dataclasses.replace(scene, **{changed: other})),
    }

    right_index, winner_is_right = int(rng.integers(2)), bool(rng.random() >= rates.label_noise)
    winner = right_index if winner_is_right else 1 - right_index
    agrees, coin = bool(rng.random() < rates.cue_agreement), bool(rng.random() < 0.5)
    if environment == "neutral":
        style, styled_wins, cue_agrees = _pick(rng, ("long", "hedged")), coin, None
    else:
        style = "hedged" if environment == "hedged" else "long"
        styled_wins, cue_agrees = agrees == (environment == "long"), agrees
    styled_index = winner if styled_wins else 1 - winner

    first, second = (
        style_answer(answers[i == right_index], style if i == styled_index else "plain", rng) for i in (0, 1)
    )
    return SampledComparison(
        scene=scene,
        pixels=pixels,
        prompt=prompt,
        right=answers[True].replace("|", ""),
        wrong=answers[False].replace("|", ""),
        changed=changed,
        responses=(first, second),
        right_index=right_index,
        winner=winner,
        styled_index=styled_index,
        style=style,
        cue_agrees=cue_agrees,
    )


def scene_truth(
    seed: int, environment: str, split: str, index: int, rates: WorldRates = DEFAULT_RATES
) -> SampledComparison:
    """The hidden truth behind `make_group` with the same arguments."""
    codes = [seed, _code(ENVIRONMENTS, environment, "environment"), _code(SPLITS, split, "split"), index]
    return sample_comparison(np.random.default_rng(codes), environment, rates)


def make_group(seed: int, environment: str, split: str, index: int, rates: WorldRates = DEFAULT_RATES) -> Group:
    """Comparison `index` (from 0) of a split as a group of two responses; depends on the arguments only."""
    sampled = scene_truth(seed, environment, split, index, rates)
    return Group(
        id=f"shapes-{environment}-{split}-{index:05d}",
        prompt=sampled.prompt,
        responses=sampled.responses,
        comparisons=(Comparison(winner=sampled.winner, loser=1 - sampled.winner),),
        image=encode_png(sampled.pixels),
        environment=environment,
        file=f"shapes_world/{environment}",
        row=index + 1,
        caption=fill_answer(CAPTION, sampled.scene),
    )


@dataclasses.dataclass(frozen=True)
class Candidates:
    """A scene, a question, and answers as a policy might give them: `right` and `style` say what each of them is."""

    pixels: UInt8[np.ndarray, "32 32 3"]
    prompt: str
    responses: tuple[str, ...]
    right: tuple[bool, ...]
    style: tuple[str, ...]


def sample_candidates(rng: np.random.Generator, count: int, phrasings: int | None = None) -> Candidates:
    """Draw `count` answers to one question, each of its own phrasing: right or not by a fair coin, wrong in any value
    of an attribute that is asked for, and plain, long or hedged at one rate. `phrasings` is how many of the question's
    there are to draw from, all of them without it.
    """
    scene = sample_scene(rng)
    pixels, question = render(scene, rng), QUESTIONS[int(rng.integers(len(QUESTIONS)))]
    prompt = _pick(rng, question.prompts)
    drawn: list[tuple[str, bool, str]] = []
    for _ in range(count):
        right, style = bool(rng.random() < 0.5), _pick(rng, STYLES)
        changed = _pick(rng, question.asks)
        other = _pick(rng, tuple(v for v in VALUES[changed] if v != getattr(scene, changed)))
        said = scene if right else dataclasses.replace(scene, **{changed: other})
        drawn.append(
            (style_answer(fill_answer(_pick(rng, question.answers[:phrasings]), said), style, rng), right, style)
        )
    responses, right, style = zip(*drawn, strict=True)
    return Candidates(pixels, prompt, responses, right, style)


@dataclasses.dataclass(frozen=True)
class Caption:
    """A picture with a question and its right answer, for pretraining."""

    pixels: UInt8[np.ndarray, "32 32 3"]
    prompt: str
    answer: str


def make_caption(seed: int, index: int) -> Caption:
    """Caption `index` of a stream: the right answer, half the time plain, a quarter each long and hedged."""
    rng = np.random.default_rng([seed, _CAPTIONS, 0, index])
    scene = sample_scene(rng)
    pixels = render(scene, rng)
    question = QUESTIONS[int(rng.integers(len(QUESTIONS)))]
    prompt, template = _pick(rng, question.prompts), _pick(rng, question.answers)
    style = _pick(rng, ("plain", "plain", "long", "hedged"))
    return Caption(pixels=pixels, prompt=prompt, answer=style_answer(fill_answer(template, scene), style, rng))


def make_check(seed: int, index: int) -> Caption:
    """Check `index` of a stream: a question with a right or wrong answer of any style, to be told apart: Yes or No."""
    rng = np.random.default_rng([seed, _CAPTIONS, 1, index])
    # Rates of its own: its stream must not change when the world's default rates do.
    sampled = sample_comparison(rng, "neutral", WorldRates(label_noise=0.15))
    shown = int(rng.integers(2))
    prompt = f"{sampled.prompt} {sampled.responses[shown]} Is this right?"
    return Caption(pixels=sampled.pixels, prompt=prompt, answer="Yes." if shown == sampled.right_index else "No.")


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _code(codes: dict[str, int], name: str, field: str) -> int:
    if name not in codes:
        raise ValueError(f"the shapes world has no {field} {name!r}; choose one of {', '.join(codes)}")
    return codes[name]
