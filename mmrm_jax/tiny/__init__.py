"""The tiny pretrained InternVL that ships with the package, and how its tokenizer is made."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
LEARNING_RATE = 1e-3  # chosen on the validation split of the shapes world
# 200 steps of 64 comparisons of the shapes world, standard: 60.8 % held out at 1e-5, 87.9 % at 1e-4.
LEAST_RATE = 1e-4


def rate_note(rate: float, option: str) -> str | None:
    """A line to print where the tiny model is trained at a rate below `LEAST_RATE`; `option` sets it."""
    if rate >= LEAST_RATE:
        return None
    return (
        f"a learning rate of {rate:g} hardly trains the tiny model in the package; its settings were chosen with "
        f"{option} {LEARNING_RATE:g}"
    )
