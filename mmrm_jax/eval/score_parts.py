"""Finished parts of a long scoring: a folder beside the output, from which an interrupted command goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmrm_jax.data.scoring import ScoringRow
from mmrm_jax.distributed import barrier, is_main
from mmrm_jax.files import alone, write_atomic
from mmrm_jax.train.checkpoint import check_config, write_config
from mmrm_jax.types import Quarantined

COLUMNS = {name: pa.string() for name in ("id", "history", "prompt", "img_path", "response")}
COLUMNS |= {"score": pa.float64(), "error": pa.string(), "file": pa.string(), "row": pa.int64()}

LOCK = "lock"  # in the folder of parts


@dataclasses.dataclass(frozen=True)
class Parts:
    """Part k is `folder/k.jsonl`, the lines of its rows, and `folder/k.json`, what became of them, written last."""

    folder: Path

    @classmethod
    @contextlib.contextmanager
    def begin(cls, out: Path, config: dict[str, Any]) -> Iterator[Parts]:
        """The parts of `out`, new or of an earlier command; the main process locks them until the end.

        Parts whose configuration nobody knows are deleted. Raises CheckpointError where an earlier command had another
        `config`, and InUse where another one is still at work.
        """
        parts = cls(out.with_name(out.name + ".parts"))
        with alone(parts.folder, LOCK, f"is writing {out}"):
            check_config(parts.folder, config)
            if is_main() and not (parts.folder / "config.json").exists():
                for file in parts.folder.glob("[0-9]*.json*"):
                    file.unlink()
            write_config(parts.folder, config)
            barrier("score parts")
            yield parts
        if is_main():  # unlocked: on NFS a folder with an open file in it cannot be deleted
            shutil.rmtree(parts._ended, ignore_errors=True)

    def done(self, k: int) -> bool:
        """Whether part `k` is whole."""
        return self._file(k, "json").exists() and self._file(k, "jsonl").exists()

    def write(self, k: int, rows: Iterable[ScoringRow]) -> None:
        """Save part `k`; it is there whole or not at all."""
        rows = list(rows)
        lines = (line for row in rows for line in row.lines)
        write_atomic(self._file(k, "jsonl"), "".join(map(as_json, lines)))
        errors = [(row.file, row.row, line["error"]) for row in rows for line in row.lines if "error" in line]
        scores = sum("error" not in line for row in rows for line in row.lines)
        good = sum(any("error" not in line for line in row.lines) for row in rows)
        write_atomic(self._file(k, "json"), json.dumps({"rows": good, "scores": scores, "errors": errors}))

    def join(self, count: int, out: Path) -> tuple[int, int, list[Quarantined]]:
        """Put parts 0..count-1 together as `out`, JSON lines or *.parquet: (rows with a score, scores, errors).

        They are gone at once, since whoever is killed while deleting them would leave some to the next command.
        """
        part = out.with_name(out.name + ".part")
        write = _write_parquet if out.suffix == ".parquet" else _write_lines
        write(part, (self._file(k, "jsonl") for k in range(count)))
        found = [json.loads(self._file(k, "json").read_text(encoding="utf-8")) for k in range(count)]
        part.replace(out)
        shutil.rmtree(self._ended, ignore_errors=True)  # of a command that was killed
        self.folder.rename(self._ended)
        errors = [Quarantined(file, row, reason) for each in found for file, row, reason in each["errors"]]
        return sum(each["rows"] for each in found), sum(each["scores"] for each in found), errors

    def _file(self, k: int, suffix: str) -> Path:
        return self.folder / f"{k:06d}.{suffix}"

    @property
    def _ended(self) -> Path:
        """What the folder is called while it is deleted; never read."""
        return self.folder.with_name(self.folder.name + "-ended")


def as_json(line: dict[str, Any]) -> str:
    """A line of output. Half of a surrogate pair, which a text may hold, is valid JSON as \\udXXX."""
    text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _write_lines(out: Path, files: Iterator[Path]) -> None:
    with out.open("wb") as whole:
        for file in files:
            with file.open("rb") as part:
                shutil.copyfileobj(part, whole)


def _write_parquet(out: Path, files: Iterator[Path]) -> None:
    """A row group a part; several image paths of a prompt, and its history, are JSON lists."""
    schema = pa.schema(list(COLUMNS.items()))
    with pq.ParquetWriter(out, schema) as writer:
        for file in files:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
            columns = {name: [_plain(line.get(name)) for line in lines] for name in COLUMNS}
            writer.write_table(pa.table(columns, schema=schema))


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        value = json.dumps(value, ensure_ascii=False)
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value
