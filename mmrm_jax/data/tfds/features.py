"""The one TFDS feature schema for groups, and the way there and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmrm_jax.types import Comparison, Group


def group_features() -> tfds.features.FeaturesDict:
    """The schema every builder of this package writes: one example is one group.

    `image` holds the encoded file (PNG, JPEG, ...) byte for byte as it came, empty for a text-only group, and
    `more_images` those that a prompt has beside it. They are byte strings and not `Image` features, which would decode
    at every read and re-encode what is not a file.
    """
    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "prompt": text(),
            "history": tfds.features.Sequence(text()),
            "responses": tfds.features.Sequence(text()),
            "comparisons": {
                "winner": tfds.features.Sequence(np.int32),
                "loser": tfds.features.Sequence(np.int32),
                "margin": tfds.features.Sequence(np.float32),
                "tie": tfds.features.Sequence(np.bool_),
            },
            "image": tfds.features.Scalar(np.object_),
            "more_images": tfds.features.Sequence(tfds.features.Scalar(np.object_)),
            "environment": text(),
            "caption": text(),
            "file": text(),
            "row": np.int32,
        }
    )


def encode_group(group: Group) -> dict[str, Any]:
    """The example of a group. An image given as a path is read here; raises OSError where it cannot be."""
    images = list(group.encoded_images())
    return {
        "id": group.id,
        "prompt": group.prompt,
        "history": list(group.history),
        "responses": list(group.responses),
        "comparisons": {
            "winner": [c.winner for c in group.comparisons],
            "loser": [c.loser for c in group.comparisons],
            "margin": [c.margin for c in group.comparisons],
            "tie": [c.tie for c in group.comparisons],
        },
        "image": images[0] if images else b"",
        "more_images": images[1:],
        "environment": group.environment,
        "caption": group.caption or "",
        "file": group.file,
        "row": group.row,
    }


def decode_group(example: Mapping[str, Any]) -> Group:
    """The group of an example as `tfds.data_source` returns it; `image` is bytes, or None where there is none."""
    comparisons = example["comparisons"]
    columns = [comparisons[name] for name in ("winner", "loser", "margin", "tie")]
    return Group(
        id=_text(example["id"]),
        prompt=_text(example["prompt"]),
        responses=tuple(_text(response) for response in example["responses"]),
        comparisons=tuple(Comparison(int(w), int(lo), float(m), bool(t)) for w, lo, m, t in zip(*columns, strict=True)),
        image=bytes(example["image"]) or None,
        environment=_text(example["environment"]),
        file=_text(example["file"]),
        row=int(example["row"]),
        # Older data sets have none of these.
        more_images=tuple(bytes(image) for image in example.get("more_images", ())),
        caption=_text(example.get("caption", "")) or None,
        history=tuple(_text(text) for text in example.get("history", ())),
    )


def _text(value: Any) -> str:
    """TFDS hands text back as UTF-8 bytes."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
