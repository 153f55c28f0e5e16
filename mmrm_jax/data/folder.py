"""The JSON files of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming the file where it is missing, damaged or no object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {why(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def read_optional(file: Path) -> dict[str, Any]:
    """As `read_object`, but empty where there is no such file."""
    return read_object(file) if file.exists() else {}


def why(error: Exception) -> str:
    """An error for a message that names the file itself: of an OSError the words alone, without number and path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def write_object(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, indented, in UTF-8."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
