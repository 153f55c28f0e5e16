"""What a server allows: sizes, times, and how much may wait."""

from __future__ import annotations

import dataclasses

LONGEST = 2**16  # entries of any list in a body, whatever else is allowed


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request, unless it says otherwise.

    Attributes:
        body_mib: Most MiB of its body.
        bodies_mib: Most MiB of the bodies of all requests at once; one that goes beyond gets 429.
        pixels: Most pixels of an image, told from its header before it is decoded.
        images: Most images.
        responses: Most responses, over all of its prompts.
        turns: Most turns before a prompt.
        characters: Most characters of its prompts, responses and turns together.
        queue: Most groups of responses that wait, over all requests; a request for more gets 429, unless none waits.
        seconds: Longest time that reading it may take, and again that decoding, tokenising and scoring it may take.
    """

    body_mib: float = 32.0
    bodies_mib: float = 256.0
    pixels: int = 20_000_000
    images: int = 16
    responses: int = 512
    turns: int = 256
    characters: int = 1_000_000
    queue: int = 256
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"limits.{name} is {value}; it must be above 0")
        for name in ("images", "responses", "turns"):
            if (value := getattr(self, name)) > LONGEST:
                raise ValueError(f"limits.{name} is {value}; it must be at most {LONGEST}")
        if self.bodies_mib < self.body_mib:
            raise ValueError(
                f"limits.bodies_mib is {self.bodies_mib:g}; it must be at least limits.body_mib, {self.body_mib:g}"
            )
