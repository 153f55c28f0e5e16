"""Rows of a Parquet file, a few at a time: what a row holds may be the images themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 64  # read at a time


class ParquetError(ValueError):
    """A file that is no Parquet file, or is damaged or cut short; the message says so without the file's name."""


def parquet_rows(path: Path) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Each row of a file, in order; an error in place of a row whose text is not UTF-8.

    Raises ParquetError where the file cannot be read, also after rows that could be, and OSError where it cannot be
    opened.
    """
    with path.open("rb") as file:
        try:
            opened = pq.ParquetFile(file, pre_buffer=False)
            for batch in opened.iter_batches(batch_size=ROWS):
                yield from _rows(batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ParquetError(str(error).partition("\n")[0] or type(error).__name__) from error


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield error
