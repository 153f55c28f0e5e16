"""Raw preference files to validated groups.

A file is JSONL, a JSON list or Parquet; its format is what its rows say, or is named after it, as in `FILE@povid`. Rows
are read by `data.formats`. What cannot be used is returned as `Quarantined` entries; nothing is dropped without
one.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmrm_jax.data.folder import why
from mmrm_jax.data.formats import Format, find_format, parse_row
from mmrm_jax.data.formats.fields import Origin, RowError, identity
from mmrm_jax.files import write_atomic
from mmrm_jax.types import Group, Quarantined


class DataError(ValueError):
    """A data file or data set that cannot be used at all; `quarantined` says why, row by row, where that is known."""

    def __init__(self, message: str, quarantined: Sequence[Quarantined] = ()):
        super().__init__(message)
        self.quarantined = tuple(quarantined)


def read_groups(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    environment: str | None = None,
) -> tuple[list[Group], list[Quarantined]]:
    """Read a preference file of any known format; what could not be used is returned beside the groups.

    Takes what `each_group` takes. Raises DataError where the file cannot be read or no row of it can be used.
    """
    groups: list[Group] = []
    quarantined: list[Quarantined] = []
    for each in each_group(path, image_root=image_root, environment=environment):
        if isinstance(each, Group):
            groups.append(each)
        else:
            quarantined.append(each)
    if not groups:
        raise nothing_usable(split_format(path)[0], quarantined)
    return groups, quarantined


def each_group(
    path: str | Path, *, image_root: str | Path | None = None, environment: str | None = None
) -> Iterator[Group | Quarantined]:
    """The groups of a preference file in order, and what of it cannot be used, as it is read.

    The format is recognised row by row, or is named as FILE@FORMAT. Image paths are relative to `image_root`, by
    default the file's folder; they are checked to exist, and not opened. `environment` defaults to the file's stem.
    Raises DataError where the file cannot be read.
    """
    path, form = split_format(path)
    root = path.parent if image_root is None else Path(image_root)
    for number, row in read_rows(path):
        origin = Origin(path, number, root, path.stem if environment is None else environment)
        name = identity(row, origin) if isinstance(row, dict) else None
        try:
            parsed = parse_row(row, origin, form)
        except RowError as error:
            yield Quarantined(str(path), number, str(error), name)
            continue
        yield from (Quarantined(str(path), number, reason, name) for reason in parsed.dropped)
        yield parsed.group


def split_name(text: str) -> tuple[str, str]:
    """(name, data) of NAME=DATA; no name, "", where it is left out, or where the whole is a file."""
    name, equals, data = text.partition("=")
    return (name, data) if equals and "/" not in name and not Path(text).exists() else ("", text)


def split_format(path: str | Path) -> tuple[Path, Format | None]:
    """(file, format) of FILE@FORMAT; no format for a file alone. Raises DataError for a format that is not known."""
    path = Path(path)
    name, at, key = path.name.rpartition("@")
    if not at or path.exists():
        return path, None
    file = path.with_name(name) if name else path
    try:
        return file, find_format(key)
    except ValueError as error:
        raise DataError(f"{path} does not exist; if {file} is meant, {error}") from error


def nothing_usable(path: Path, quarantined: Sequence[Quarantined]) -> DataError:
    """The error for a file without a single usable row; it lists the reasons."""
    if not quarantined:
        return DataError(f"{path} holds no rows")
    reasons = f"{summarise_quarantine(quarantined)}\n{_described(quarantined[0])}"
    return DataError(f"{path} holds no usable row.\n{reasons}", quarantined)


def write_quarantine(path: str | Path, entries: Iterable[Quarantined]) -> None:
    """Write the entries as JSONL, one `{"file", "row", "id", "reason"}` a line."""
    fields = ("file", "row", "id", "reason")
    lines = [json.dumps({field: getattr(entry, field) for field in fields}) + "\n" for entry in entries]
    write_atomic(Path(path), "".join(lines))


def read_quarantine(path: str | Path) -> list[Quarantined]:
    """The entries of a quarantine file, each once; none where there is no such file.

    A line that was cut short, by a full disk or a kill, is an entry that says so.
    """
    path = Path(path)
    if not path.exists():
        return []

    def entry(number: int, line: str) -> Quarantined:
        try:
            return Quarantined(**json.loads(line))
        except (ValueError, TypeError):
            return Quarantined(str(path), number, f"line cut short: {line:.200}", None)

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return list(dict.fromkeys(entry(number, line) for number, line in enumerate(lines, 1) if line))


def summarise_quarantine(entries: Sequence[Quarantined], what: str = "quarantined") -> str:
    """A short summary for people: how many entries of each kind, the most frequent first, with one example each."""
    if not entries:
        return "nothing quarantined"
    kinds = collections.Counter(quarantine_kind(entry) for entry in entries)
    first = {quarantine_kind(entry): entry for entry in reversed(entries)}
    lines = [
        f"  {count} x {kind} (first: {first[kind].file} row {first[kind].row})" for kind, count in kinds.most_common()
    ]
    return "\n".join([f"{len(entries)} {what}:", *lines])


def quarantine_kind(entry: Quarantined) -> str:
    """The kind of problem: the part of the reason before the colon."""
    return entry.reason.split(":", 1)[0]


def _described(entry: Quarantined) -> str:
    return f"{entry.file} row {entry.row}: {entry.reason}"


def raise_first(entries: Sequence[Quarantined]) -> None:
    """Strict mode: raise DataError for the first entry, if there is one."""
    if entries:
        raise DataError(_described(entries[0]))


# ---- files to rows


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(1-based row, parsed JSON value) of each row; a RowError in place of the value where a line is broken.

    Raises DataError where the file cannot be read.
    """
    if path.suffix == ".parquet":
        yield from enumerate(_read_parquet(path), start=1)
        return
    text = _read_text(path)
    lines = text.split("\n")  # not splitlines(): U+2028 and its like are ordinary characters inside a JSON string
    wrong = next((number for number, line in enumerate(lines, start=1) if _wrong_bytes(line)), None)
    if wrong is not None and (wrong == 1 or text.lstrip().startswith("[")):
        raise DataError(
            f"{path} is not UTF-8 text: line {wrong} has a wrong byte; a preference file is JSONL, a "
            "JSON list, or Parquet named *.parquet"
        )
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not a valid JSON list: {error}") from error
        return
    if path.suffix in (".csv", ".tsv") or (path.suffix == ".json" and len(lines) > 1 and _is_one(text, dict)):
        what = "one JSON object" if path.suffix == ".json" else path.suffix[1:].upper()
        raise DataError(f"{path} is {what}; a preference file is JSONL, a JSON list, or Parquet named *.parquet")
    if text.lstrip().startswith("[") and _is_one(text, list):
        raise DataError(
            f"{path} is one JSON list of rows, which is read from files named *.json: rename it to {path.stem}.json, "
            "or write one object a line"
        )
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _parse_line(line)


def _read_parquet(path: Path) -> Iterator[Any]:
    from mmrm_jax.data.parquet import ParquetError, parquet_rows

    try:
        for row in parquet_rows(path):
            bad = isinstance(row, UnicodeDecodeError)
            yield RowError(f"broken text: the row is not UTF-8: {row.reason}; fix its encoding") if bad else row
    except ParquetError as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}; download or write it again") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _is_one(text: str, kind: type) -> bool:
    """Whether the whole text is one JSON value of this kind."""
    try:
        return isinstance(json.loads(text), kind)
    except (ValueError, RecursionError):
        return False


def _wrong_bytes(line: str) -> bool:
    """Whether bytes of a line were no UTF-8, as `surrogateescape` keeps them."""
    return not line.isascii() and any("\udc80" <= character <= "\udcff" for character in line)


def _parse_line(line: str) -> Any:
    if _wrong_bytes(line):
        return RowError("broken text: the line is not UTF-8; fix its encoding")
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowError(f"broken JSON line: {error}; each line must hold one complete JSON object")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{path} does not exist")
    return DataError(f"{path} cannot be read: {why(error)}")
