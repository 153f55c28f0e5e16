"""Images a second through decoding, tiling and batching.

    python benchmarks/data_loading.py --size big --json loading.json
    python benchmarks/data_loading.py --size big --root DIR          # JPEGs of your own

mmrm_jax reads preference rows through its Grain pipeline to padded batches. Torch reads the same rows with a
DataLoader: Pillow, transformers' GotOcr2ImageProcessorPil cut into up to six tiles of 448 pixels and a thumbnail,
transformers' tokenizer, and a collate function that pads. Both use the packaged model's tokenizer. Every measurement is
a process of its own, in turn; before them, tiles are compared byte for byte.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from common import CONSOLE, Options, run_alone, write
from PIL import Image
from rich.table import Table

SIZES = ((1024, 768), (640, 480), (1280, 720), (500, 500), (800, 600))
BATCH = 8
ANSWERS = (
    "A wooden table with two cups of coffee on it, next to a window.",
    "A table and a dog under it, in a garden.",
)


@dataclasses.dataclass(frozen=True)
class LoadingOptions(Options):
    """Attributes:
    root: Folder of JPEGs to read, in place of made ones.
    images: How many are read in each measurement; each is one row.
    workers: Worker processes of either side, one measurement for each number.
    """

    root: Path | None = None
    images: int | None = None
    workers: tuple[int, ...] = (0, 1, 2)


def make_images(folder: Path, count: int) -> list[Path]:
    """Smooth fields with grain, of about the bytes a photo of that size has."""
    rng, files = np.random.default_rng(0), []
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        coarse = Image.fromarray(rng.integers(256, size=(height // 32, width // 32, 3), dtype=np.uint8))
        field = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        noisy = np.clip(field + rng.normal(0, 8, field.shape), 0, 255).astype(np.uint8)
        files.append(folder / f"{i}.jpg")
        Image.fromarray(noisy).save(files[-1], quality=85)
    return files


def write_rows(images: list[Path], file: Path) -> None:
    row = {"prompt": "What is in the picture?", "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
    lines = [json.dumps(row | {"id": str(i), "img_path": str(image)}) for i, image in enumerate(images)]
    file.write_text("\n".join(lines) + "\n")


def our_processor() -> Any:
    """The packaged model's tokenizer with the tiling of the published InternVL2 models."""
    from mmrm_jax.data.images import Preprocessing
    from mmrm_jax.data.processor import Processor
    from mmrm_jax.data.text import ChatTokenizer
    from mmrm_jax.tiny import MODEL_DIR

    return Processor(ChatTokenizer.from_pretrained(MODEL_DIR, 256), Preprocessing(), 4096)


def our_batches(rows: Path, workers: int) -> Iterator[int]:
    """Images of each batch, as the input pipeline of a training run yields it."""
    from mmrm_jax.data.pipeline import BatchPlan, MakeBatch, batches, buckets_for, index_source
    from mmrm_jax.data.sources import open_source

    source, _ = open_source(rows)
    data, _ = index_source(source, our_processor(), {"primary": "multimodal", "proxy": "absent"}, cache=False)
    plan = BatchPlan([0] * len(data), BATCH, 0, len(data) // BATCH)
    for batch in batches(plan, MakeBatch(data, buckets_for([data], 1), BATCH), workers=workers):
        yield int((batch.group_index >= 0).sum())


class Rows:
    """A data set for torch's DataLoader: one row is its image's tiles and both conversations' ids."""

    def __init__(self, rows: Path):
        from transformers import AutoTokenizer
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        from mmrm_jax.tiny import MODEL_DIR

        self.rows = [json.loads(line) for line in rows.read_text().splitlines()]
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        size = {"height": 448, "width": 448}
        self.images = GotOcr2ImageProcessorPil(size=size, image_mean=mean, image_std=std, max_patches=6)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, list[list[int]]]:
        row = self.rows[index]
        with Image.open(row["img_path"]) as image:
            made = self.images(image.convert("RGB"), crop_to_patches=True, return_tensors="pt")
        pixels = made["pixel_values"]
        slots = "<img>" + "<IMG_CONTEXT>" * (256 * len(pixels)) + "</img>\n"
        start = f"<|im_start|>user\n{slots}{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        texts = [f"{start}{row[side]}<|im_end|>" for side in ("chosen", "rejected")]
        return pixels, self.tokenizer(texts).input_ids


def pad(rows: list[tuple[Any, list[list[int]]]]) -> tuple[Any, Any]:
    """(pixels of all images, ids padded to the longest)."""
    import torch

    ids = [torch.tensor(x) for _, both in rows for x in both]
    return torch.cat([pixels for pixels, _ in rows]), torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)


def torch_batches(rows: Path, workers: int) -> Iterator[int]:
    from torch.utils.data import DataLoader

    loader = DataLoader(Rows(rows), BATCH, shuffle=True, num_workers=workers, collate_fn=pad)  # type: ignore[arg-type]
    for _, ids in loader:
        yield len(ids) // 2


def measure(side: Literal["ours", "torch"], rows: Path, workers: int) -> dict[str, float]:
    """Images a second after the first batch of each worker, and seconds until the first batch."""
    start = time.perf_counter()
    stream = iter((our_batches if side == "ours" else torch_batches)(rows, workers))
    next(stream)
    first = time.perf_counter()
    sum(itertools.islice(stream, 2 * workers))  # what was made while the workers started
    then = time.perf_counter()
    images = sum(stream)
    return {"first_batch_s": first - start, "images_per_s": images / (time.perf_counter() - then)}


def require_same_tiles(rows: Path) -> None:
    """Ends the benchmark where the two sides' tiles differ; the made images are all wide or square."""
    from mmrm_jax.data.images import load_image

    theirs, ours = Rows(rows), our_processor()
    for i, row in enumerate(theirs.rows[: len(SIZES)]):
        image = load_image(Path(row["img_path"]))
        if image.height > image.width:
            continue  # Pillow 13 resizes these in another order than InternVL was trained with
        pixels = theirs[i][0].permute(0, 2, 3, 1).numpy()
        tiles = np.rint((pixels * np.float32([0.229, 0.224, 0.225]) + np.float32([0.485, 0.456, 0.406])) * 255)
        if not np.array_equal(tiles, ours.tiles(Path(row["img_path"]))):
            raise SystemExit(f"nothing is timed: the tiles of {row['img_path']} differ")


def main() -> None:
    """Both sides for every number of workers, as a table and as JSON."""
    options = tyro.cli(LoadingOptions, description=__doc__)
    if options.only:
        assert options.folder is not None, "--only needs --folder"
        write(options, measure(options.only, options.folder / "rows.jsonl", options.workers[0]))
        return
    count = options.images or {"small": 10 * BATCH, "big": 20 * BATCH}[options.size]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = sorted(options.root.rglob("*.jpg"))[:count] if options.root else make_images(folder, count)
        write_rows([file.resolve() for file in found], folder / "rows.jsonl")
        require_same_tiles(folder / "rows.jsonl")
        for workers in options.workers:
            runs: dict[str, list[dict[str, float]]] = {"ours": [], "torch": []}
            given = ["--folder", str(folder), "--workers", str(workers), "--only"]
            for _ in range(options.repeats):
                for side, kept in runs.items():
                    kept.append(run_alone(__file__, [*given, side]))
            results[str(workers)] = {
                side: {key: float(np.median([r[key] for r in kept])) for key in ("images_per_s", "first_batch_s")}
                | {"runs": [r["images_per_s"] for r in kept]}
                for side, kept in runs.items()
            }
    columns = ("workers", "ours, images/s", "torch, images/s", "faster", "ours, s to first batch", "torch, s")
    table = Table(*columns, title=f"Decoding, tiling, batching: {len(found)} JPEGs in batches of {BATCH}")
    for workers, r in results.items():
        rates = [r[side]["images_per_s"] for side in ("ours", "torch")]
        firsts = [f"{r[side]['first_batch_s']:.1f}" for side in ("ours", "torch")]
        table.add_row(workers, *(f"{rate:.1f}" for rate in rates), f"{rates[0] / rates[1]:.2f}x", *firsts)
    CONSOLE.print(table)
    write(options, {"results": results})


if __name__ == "__main__":
    main()
