"""What every format reads of a row: its fields, checked, and the group that they make."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrm_jax.data.templates import IMAGE_PLACEHOLDER, has_place
from mmrm_jax.types import Comparison, Group

Row = Mapping[str, Any]

IMAGE_FIELDS = ("img_path", "image", "images")

# A URL, or an image written out as text.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


class RowError(ValueError):
    """One row that cannot be used. The message is "kind of problem: what is wrong and what to do about it"."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a row comes from: its file and 1-based row, the folder of its images, and its environment."""

    file: Path
    row: int
    image_root: Path
    environment: str


@dataclasses.dataclass(frozen=True)
class Field:
    """A value, and the name that a person finds it by in the row: "completions[2].response".

    Where there is no such value, a RowError stands in its place and is raised by whoever needs it.
    """

    name: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Record:
    """What a row asks and answers, unchecked: its prompt, its images (none where it is text-only), every response.

    `history` are the turns before the prompt, of the user and the assistant in turn.
    """

    prompt: Field
    images: tuple[Field, ...]
    responses: tuple[Field, ...]
    history: tuple[Field, ...] = ()


@dataclasses.dataclass(frozen=True)
class Judged:
    """The responses of a row that are compared, how, and a reason for each response or comparison left out."""

    responses: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    dropped: tuple[str, ...] = ()


def make_group(
    record: Record, row: Row, origin: Origin, responses: tuple[str, ...], comparisons: tuple[Comparison, ...]
) -> Group:
    """The group of a record's own prompt and images. Raises RowError where one of them cannot be used."""
    check_read(row)
    if row.get("history") and not record.history:
        raise RowError("turns not read: 'history' has turns that this format does not read; write them as messages")
    images = tuple(_image(field, origin) for field in record.images)
    *history, prompt = check_asked([*record.history, record.prompt], len(images))
    if len(images) == 1 and not history:  # where it stands anyway: the same prompt, however it is spelt
        prompt = prompt.removeprefix(IMAGE_PLACEHOLDER + "\n")
    names = image_names(record)
    return Group(
        id=identity(row, origin),
        prompt=prompt,
        responses=responses,
        comparisons=comparisons,
        image=images[0] if images else None,
        environment=origin.environment,
        file=str(origin.file),
        row=origin.row,
        image_name=names[0] if len(names) == 1 else None,
        more_images=images[1:],
        caption=_caption(row),
        history=tuple(history),
    )


def check_read(row: Row) -> None:
    """Raises RowError where answers were judged by what would not be read of a row."""
    for name in ("video", "videos", "audio", "audios"):
        if row.get(name):
            kind, shown = name.rstrip("s"), f"{row[name]!r:.80}"
            raise RowError(f"{kind}: '{name}' is {shown}; only images are read: leave the row out")
    if row.get("system"):
        raise RowError(
            f"system: 'system' is {row['system']!r:.80}, which would not be read; put it into the prompt, or leave the "
            "row out"
        )


def _caption(row: Row) -> str | None:
    """What `caption_only` reads in place of the images; no other objective asks for it."""
    caption = row.get("caption")
    return caption if isinstance(caption, str) and caption.strip() else None


def misplaced(name: str, places: int, images: int, others: int = 0) -> RowError:
    """What to raise where texts say that they have another number of images than there are, or `others` stand in turns
    of the assistant."""
    if others:
        return RowError(f"image of the assistant: {others} in turns before '{name}'; only the user's may have one")
    return RowError(
        f"images and places differ: '{name}' has {places} {IMAGE_PLACEHOLDER} but the row has {images} image(s); "
        "each image needs one place"
    )


def in_place(field: Field, images: int) -> Field:
    """A prompt whose `<image>` are the places of its images: as many of them, or none where all stand before the text.

    The only image of a prompt gets a line of its own, which is how a prompt says where its image stands. Raises
    RowError where the numbers differ.
    """
    text = check_text(field)
    places = text.count(IMAGE_PLACEHOLDER)
    if places not in (0, images):
        raise misplaced(field.name, places, images)
    if places == 1:
        before, after = text.split(IMAGE_PLACEHOLDER)
        line = "\n" if before and not before.endswith("\n") else ""
        end = "\n" if before and after and not after.startswith(("\n", "\r\n")) else ""
        text = before + line + IMAGE_PLACEHOLDER + end + after
    return Field(field.name, text)


def turns_in_place(asked: Sequence[Field], images: int) -> list[Field]:
    """`in_place` of the user's turns, whose images may stand in any of them; those of the assistant as they are."""
    if len(asked) == 1:
        return [in_place(asked[0], images)]
    texts = [check_text(field) for field in asked]
    places, others = count_places(texts), count_places(texts[1:])
    if places not in (0, images) or (images and others):
        raise misplaced(asked[-1].name, places, images, others)
    one = images == 1
    return [
        in_place(field, 1) if one and i % 2 == 0 and IMAGE_PLACEHOLDER in field.value else field
        for i, field in enumerate(asked)
    ]


def places_first(asked: Sequence[Field], images: int) -> list[Field]:
    """The user's turns with their `<image>` before the text; the prompt of one turn without, since it is so anyway."""
    turns = [field if i % 2 else _place_first(field, keep=len(asked) > 1) for i, field in enumerate(asked)]
    return turns_in_place(turns, images) if len(turns) > 1 else turns


def _place_first(field: Field, *, keep: bool) -> Field:
    whole = check_text(field)
    text = whole.replace(IMAGE_PLACEHOLDER + "\n", "").replace("\n" + IMAGE_PLACEHOLDER, "")
    places = (IMAGE_PLACEHOLDER + "\n") * whole.count(IMAGE_PLACEHOLDER) if keep else ""
    return Field(field.name, places + text.replace(IMAGE_PLACEHOLDER, ""))


# ---- one field


def take(row: Row, name: str) -> Field:
    """A field of a row; a RowError in place of its value where the row has none."""
    if name in row:
        return Field(name, row[name])
    problem = f"missing field: the row has no {spelt(name, row)}; fields found: {found(row)}"
    return Field(name, RowError(problem))


def pictures(row: Row, *, optional: bool = False) -> tuple[Field, ...]:
    """The images of a row; none where the field is null or, if they are `optional`, where there is no such field.

    A RowError stands in place of an image where the row must have the field.
    """
    present = [name for name in IMAGE_FIELDS if name in row]
    if not present:
        missing = take(row, IMAGE_FIELDS[0])
        return () if optional else (Field(missing.name, RowError(f"{missing.value}; {_TEXT_ONLY}")),)
    name = next((name for name in present if row[name] is not None), present[0])
    value = row[name]
    if isinstance(value, list):
        return tuple(Field(f"{name}[{i}]", item) for i, item in enumerate(value))
    return () if value is None else (Field(name, value),)


_TEXT_ONLY = 'a text-only record says "img_path": null'


def image_names(record: Record) -> list[str]:
    """The paths of a record's images, as far as it names them."""
    values = [field.value for field in record.images]
    paths = [value.get("path") if isinstance(value, dict) else value for value in values]
    return [path for path in paths if isinstance(path, str)]


def _image(field: Field, origin: Origin) -> Path | bytes:
    """The bytes of an image, or its path, checked to exist: the value is either, or `{"bytes", "path"}`."""
    value = field.value
    if isinstance(value, RowError):
        raise value
    if isinstance(value, dict):
        content = value.get("bytes")
        if content is not None and not isinstance(content, bytes):
            raise RowError(
                f"wrong type: '{field.name}.bytes' is a {type_name(content)}; only Parquet holds bytes: save the image "
                "as a file and name its path"
            )
        value = value.get("path") if content is None else content
    if isinstance(value, bytes):
        if not value:
            raise RowError(f"empty image: '{field.name}' has no bytes; remove the row or fill it in")
        return value
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"wrong type: '{field.name}' is {value!r:.50}; it must be the path of an image file, or null")
    if _URL.match(value):
        raise RowError(
            f"image by URL: '{field.name}' is {value!r:.80}; nothing is fetched: save it as a file and name its path"
        )
    path = origin.image_root / value
    # os.path and not Path.is_file, which raises for names that are too long.
    if not os.path.isfile(path):
        problem = (
            "is a directory; name the file in it" if os.path.isdir(path) else "does not exist; is the image root right?"
        )
        raise RowError(f"missing image file: '{field.name}' points to {path}, which {problem}")
    return path


def identity(row: Row, origin: Origin) -> str:
    """The row's `id`; a row without a usable one is named after its file and row."""
    value = row.get("id")
    if isinstance(value, int) or (isinstance(value, str) and _encodable(value)):
        return str(value)
    return f"{origin.file.stem}-{origin.row}"


def check_asked(asked: Sequence[Field], images: int) -> list[str]:
    """The prompt and the turns before it, of so many images. Raises RowError where one is no text, or they do not go
    with the images.

    What the user says may be blank beside an image, which is then all that is asked about, and not without one.
    """
    texts = [check_text(field) for field in asked]
    if len(texts) % 2 == 0:
        raise RowError(f"wrong turns: {len(texts) - 1} before the prompt; they must be the user's and the assistant's")
    for field, text in zip(asked[::2], texts[::2], strict=True):
        if not images and not text.strip():
            raise RowError(
                f"empty prompt: '{field.name}' has no text, and there is no image either; remove the row or fill it in"
            )
        if not images and has_place(text):
            raise RowError(
                f"image forgotten: '{field.name}' has a place for one, {IMAGE_PLACEHOLDER}, and there is none; name "
                "the image, or take its place out of the text"
            )
    places = count_places(texts)
    if images > 1 and places not in (0, images):
        raise misplaced(asked[-1].name, places, images)
    return texts


def count_places(asked: Sequence[str]) -> int:
    """How many `<image>` the user's turns have, of turns of the user and the assistant."""
    return sum(text.count(IMAGE_PLACEHOLDER) for text in asked[::2])


def check_response(field: Field) -> str:
    """The response in a field. Raises RowError where it is no text, or an empty one."""
    text = check_text(field)
    if not text.strip():
        raise RowError(f"empty response: '{field.name}' has no text; remove the row or fill it in")
    return text


def check_text(field: Field) -> str:
    """The text in a field. Raises RowError where it is none."""
    name, value = field.name, field.value
    if isinstance(value, RowError):
        raise value
    if not isinstance(value, str):
        raise RowError(f"wrong type: '{name}' is a {type_name(value)}; it must be a text")
    if not _encodable(value):
        raise RowError(f"broken text: '{name}' has half of a surrogate pair, which is no character; fix its encoding")
    return value


def check_list(field: Field, what: str) -> list[Any]:
    """The list in a field. Raises RowError where it is none, or an empty one; `what` is what it must be a list of."""
    if isinstance(field.value, RowError):
        raise field.value
    if not isinstance(field.value, list) or not field.value:
        found = "empty" if field.value == [] else f"a {type_name(field.value)}"
        raise RowError(f"wrong type: '{field.name}' is {found}; it must be a list of one or more {what}")
    return field.value


def number(value: Any) -> float | None:
    """The finite number that `float()` makes of a JSON text or number, if any."""
    try:
        found = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def type_name(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


# ---- the names of fields


def spelt(name: str, row: Row) -> str:
    """A missing field: "'chosen' (did you mean it by 'choosen'?)"."""
    near = guess(name, row)
    return f"'{name}'" + (f" (did you mean it by '{near}'?)" if near and near != name else "")


def found(row: Row) -> str:
    """The fields of a row, for a message."""
    return ", ".join(sorted(row)) or "none"


def guess(name: str, row: Row) -> str | None:
    """The row's field that is, or is spelt most like, `name`."""
    return next(iter(difflib.get_close_matches(name, list(row), n=1)), None)
