"""The tiny pretrained InternVL that ships with the package, and how its tokenizer is made."""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
