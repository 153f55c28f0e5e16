"""The values that travel between layers: groups on the host, batches on the device.

A *group* is one image and prompt with N responses; *comparisons* are index pairs into them. Everything above
the data layer speaks groups: a preference pair is N = 2 with one comparison, VLFeedback is N = 4 with up to six.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, UInt8


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One preference among a group's responses: `winner` beats `loser` (indices into `Group.responses`).

    `margin` is a target margin m for the Bradley-Terry loss, softplus(-(d - m)); 0 is the ordinary loss.
    With `tie` the two were judged equal and the order carries no meaning.
    """

    winner: int
    loser: int
    margin: float = 0.0
    tie: bool = False


@dataclasses.dataclass(frozen=True)
class Group:
    """One validated record: an image and prompt with N responses and their comparisons.

    `image` is a file path, the encoded bytes themselves, or None for a text-only record; `more_images` are those that
    a prompt has beside it, in order. `file` and `row` (1-based) say where the record came from, for error messages;
    `image_name` is the path as the record gives it, `joined` has (file, row, id) of each record where several were made
    one group; `caption` says in words what the images show. `history` are the turns before the prompt, of the user and
    the assistant in turn.
    """

    id: str
    prompt: str
    responses: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    image: Path | bytes | None
    environment: str
    file: str
    row: int
    image_name: str | None = dataclasses.field(default=None, compare=False)
    joined: tuple[tuple[str, int, str], ...] = ()
    more_images: tuple[Path | bytes, ...] = ()
    caption: str | None = None
    history: tuple[str, ...] = ()

    @property
    def turns(self) -> tuple[str, ...]:
        """What the responses answer: the prompt, after the turns before it."""
        return (*self.history, self.prompt)

    @property
    def asked(self) -> str:
        """The same as one text, for people."""
        if not self.history:
            return self.prompt
        speakers = itertools.cycle(("User", "Assistant"))
        return "\n".join(f"{who}: {text}" for who, text in zip(speakers, self.turns, strict=False))

    @property
    def images(self) -> tuple[Path | bytes, ...]:
        """All images of the prompt, in order."""
        return () if self.image is None else (self.image, *self.more_images)

    def encoded_images(self) -> tuple[bytes, ...]:
        """Their encoded bytes; raises OSError where a file cannot be read."""
        return tuple(image.read_bytes() if isinstance(image, Path) else image for image in self.images)


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """A row that could not be used, and why; never silently dropped, always reported."""

    file: str
    row: int
    reason: str
    id: str | None = None


def _pytree(cls: type) -> type:
    """Make a class a frozen dataclass whose fields are all pytree children."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = [f.name for f in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=fields, meta_fields=[])


@_pytree
class Prefix:
    """What every response of a group shares, as one branch sees it: image, prompt, chat template.

    `visual_index[g, p]` is -1 at a text token; elsewhere the index, into the group's T*V visual tokens, of the
    feature that replaces the token's embedding. An image is given as `pixels`, or as `features`: what
    `models.internvl.tile_features` made of its T tiles before. Both are None for a branch without an image, and have a
    leading axis of 1 where all groups share one (blank) image.
    """

    tokens: Int[Array, "*M G P"]
    lengths: Int[Array, "*M G"]
    visual_index: Int[Array, "*M G P"]
    pixels: UInt8[Array, "*M G_or_1 T height width 3"] | None
    features: Float[Array, "*M G_or_1 T V I"] | None = None


@_pytree
class Responses:
    """The N responses of every group, packed one after another into K rows of L tokens.

    `positions` counts tokens from the beginning of their own response; it is 0 at padding. `last[g, n]` is where
    response n ends: the index of its last token among the group's K*L, or -1 where the group has no such response.
    `opening[g]` is how many tokens all of them begin with, which are in the group's prefix and not here.
    """

    tokens: Int[Array, "*M G K L"]
    positions: Int[Array, "*M G K L"]
    last: Int[Array, "*M G N"]
    opening: Int[Array, "*M G"]


# Names that a comparison's environment, and its place among all comparisons of its source, have in `Comparisons.given`.
ENVIRONMENT = "environment"
NUMBER = "number"


@_pytree
class Comparisons:
    """Preferences of a batch: `index[c]` = (winner, loser) into the flattened G*N responses.

    Padding rows have `mask` False and point at response 0. `given` has numbers for each that an objective asks for:
    what a run before has found, by its branch, its environment, or its number.
    """

    index: Int[Array, "*M C 2"]
    margin: Float[Array, "*M C"]
    tie: Bool[Array, "*M C"]
    mask: Bool[Array, "*M C"]
    given: dict[str, Float[Array, "*M C"]] = dataclasses.field(default_factory=dict)


@_pytree
class Batch:
    """A padded batch of groups with static shapes. A leading axis M, where present, is micro-batches.

    `prefixes` is keyed by branch ("primary", "proxy", "image"); all branches share the response tokens.
    `group_index` is the group's position in its source, -1 for a padding group.
    """

    prefixes: dict[str, Prefix]
    responses: Responses
    comparisons: Comparisons
    group_index: Int[Array, "*M G"]


PyTree = Any
