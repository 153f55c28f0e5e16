"""Rows shaped like the real ones of each preference format, and files of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 6, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures_in(folder: Path) -> Path:
    """The folder with the images i.png and j.png."""
    for name in ("i.png", "j.png"):
        (folder / name).write_bytes(picture(ord(name[0])))
    return folder


def write(file: Path, *rows: Any) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=2)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def user(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


def message(role: str, *parts: Any) -> dict:
    """A message of text parts, and of image parts where there is an Ellipsis."""
    content = [{"type": "image"} if part is ... else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


GOOD, BAD = message("assistant", "good"), message("assistant", "bad")
PART = {"prompt": "p", "chosen": "good", "rejected": "bad"}
EMBEDDED = {"bytes": picture(0), "path": "0.png"}
RLHF_V = {
    "ds_name": "RLHF-V",
    "image": EMBEDDED,
    "text": json.dumps({"question": "p", "chosen": "good", "rejected": "bad"}),
    "origin_dataset": "VQA",
    "origin_split": {"model": "m", "type": "qa"},
    "idx": 0,
    "image_path": "RLHF-V/0.jpg",
}
RLAIF_V = {
    "ds_name": "RLAIF-V",
    "image": EMBEDDED,
    "question": "p",
    "chosen": "good",
    "rejected": "bad",
    "origin_dataset": "COCO",
    "origin_split": "{}",
    "idx": "3",
    "image_path": "0.jpg",
}
POVID = {
    "id": "COCO_1",
    "image": "i.png",
    "conversations": [user("<image>\np"), gpt("good")],
    "rejected_conversations": [user("<image>\np"), gpt("bad")],
}
TRL = {
    "images": ["i.png"],
    "prompt": [message("user", ..., "p")],
    "chosen": [GOOD],
    "rejected": [BAD],
}
SWIFT = {
    "messages": [{"role": "user", "content": "<image>p"}, {"role": "assistant", "content": "good"}],
    "rejected_response": "bad",
    "images": ["i.png"],
}
FACTORY = {"conversations": [user("<image>p")], "chosen": gpt("good"), "rejected": gpt("bad"), "images": ["i.png"]}
LLAVA = {
    "id": "7",
    "image": "i.png",
    "conversations": [user("p\n<image>")],
    "output_1": gpt("bad"),
    "output_2": gpt("good"),
    "preference": 2,
}
ALIGN = {"question": "p", "image": "i.png", "response_1": "bad", "response_2": "good", "overall_response": 2}
MM_RLHF = {**PART, "image": "i.png", "is_tie": False}
