"""What a server allows: sizes, times, and how much may wait."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one request, unless it says otherwise.

    Attributes:
        body_mib: Most MiB of its body.
        pixels: Most pixels of an image, told from its header before it is decoded.
        images: Most images.
        responses: Most responses, over all of its prompts.
        characters: Most characters of its prompts and responses together.
        queue: Most groups of responses that wait for the model, over all requests; a request for more gets 429.
        seconds: Longest time that reading it may take, and again that scoring it may take.
    """

    body_mib: float = 32.0
    pixels: int = 20_000_000
    images: int = 16
    responses: int = 512
    characters: int = 1_000_000
    queue: int = 256
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"limits.{name} is {value}; it must be above 0")
