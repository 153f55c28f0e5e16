"""Random access to groups, wherever they are kept, and a hold-out split that never shares an image."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mmrm_jax.data.folder import why
from mmrm_jax.data.records import DataError, read_groups
from mmrm_jax.distributed import divided
from mmrm_jax.types import Group, Quarantined

_BLOCK = 4096  # groups whose text processes exchange at a time


class GroupSource(Protocol):
    """A picklable sequence of groups: what the input pipeline reads from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Group: ...


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """Groups held in memory; their images stay files."""

    groups: tuple[Group, ...]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int, /) -> Group:
        return self.groups[index]


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """One split of a prepared data set (ArrayRecord); groups are read, and decoded, one at a time."""

    examples: Sequence[Any]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Group:
        from mmrm_jax.data.tfds.features import decode_group

        return decode_group(self.examples[index])


@dataclasses.dataclass(frozen=True)
class ViewSource:
    """The groups of another source at `indices`."""

    source: GroupSource
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Group:
        return self.source[self.indices[index]]


@dataclasses.dataclass(frozen=True)
class ChainSource:
    """The groups of several sources, one source after another."""

    sources: tuple[GroupSource, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int, /) -> Group:
        for source in self.sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(f"there are {len(self)} groups")


def open_source(
    path: str | Path,
    split: str | None = None,
    *,
    image_root: str | Path | None = None,
    environment: str | None = None,
) -> tuple[GroupSource, list[Quarantined]]:
    """Open a preference file (FILE or FILE@FORMAT), or one split of a directory that `mmrm prepare` or a builder wrote.

    `split` may be left out where the data set has only one; `image_root` and `environment` apply to files alone. The
    quarantined rows are those of this reading: a prepared data set has none left, its own are in `quarantine.jsonl`.
    Raises DataError naming what is missing.
    """
    path = Path(path)
    if path.is_dir():
        if image_root is not None or environment is not None:
            raise DataError(f"{path} is a prepared data set: image_root and environment apply to preference files only")
        return _open_prepared(path, split), []
    if split is not None:
        raise DataError(f"{path} is no directory: split {split!r} applies to prepared data sets only")
    groups, quarantined = read_groups(path, image_root=image_root, environment=environment)
    return MemorySource(tuple(groups)), quarantined


def _open_prepared(path: Path, split: str | None) -> TfdsSource:
    import tensorflow_datasets as tfds

    # Any: TFDS's decorators hide the signatures from type checkers.
    builder: Any = tfds.builder_from_directory(_dataset_directory(path))
    splits = sorted(builder.info.splits)
    if split is None:
        if len(splits) != 1:
            raise DataError(f"{path} has the splits {', '.join(splits)}: name one")
        return TfdsSource(builder.as_data_source(split=splits[0]))
    name = split.partition("[")[0]  # TFDS slices, such as train[:90%], are welcome
    if name not in splits:
        close = difflib.get_close_matches(name, splits, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"{path} has no split {name!r}, only {', '.join(splits)}{hint}")
    return TfdsSource(builder.as_data_source(split=split))


def _dataset_directory(path: Path) -> Path:
    """The one data set at or below `path` (TFDS nests a data set under its name, config and version)."""
    found = sorted(file.parent for file in path.rglob("features.json") if (file.parent / "dataset_info.json").is_file())
    if path in found:
        return path
    if not found:
        raise DataError(f"{path} holds no prepared data set; `mmrm prepare` makes one from preference files")
    if len(found) > 1:
        raise DataError(f"{path} holds several data sets: name one of {', '.join(map(str, found))}")
    return found[0]


def split_holdout(source: GroupSource, fraction: float, seed: int) -> tuple[ViewSource, ViewSource]:
    """(train, validation): about `fraction` of the images, with every group that shows them, is held out.

    Groups belong together when their encoded images are the same bytes, whatever the file's name, or, without an
    image, when their prompts are the same. Each image is drawn by a hash of its bytes and `seed`, so that one held out
    of a file is held out of every file; images that groups of a file show together are drawn as one there. At least
    one lands on each side, unless `fraction` is 0, which holds nothing out: where the draw leaves a side empty, the
    image nearest to it changes over. Raises DataError where that is impossible or an image cannot be read, ValueError
    for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must be at least 0 and below 1")
    held = draw_holdout(identities(source), fraction, seed)
    if fraction > 0 and not any(held):
        raise DataError(f"cannot hold out a part of {len(source)} groups: they share one image; set data.holdout to 0")
    train, validation = (tuple(index for index, out in enumerate(held) if out == side) for side in (False, True))
    return ViewSource(source, train), ViewSource(source, validation)


def draw_holdout(found: Sequence[str], fraction: float, seed: int) -> list[bool]:
    """Whether each of these identities is held out, as `split_holdout` does; none is where all are the same."""
    draws = {identity: _draw(f"{seed}:{identity}".encode()) for identity in set(found)}
    order = sorted(draws, key=lambda identity: draws[identity])
    drawn = sum(draw < fraction for draw in draws.values())
    held_out = set(order[: min(max(drawn, 1), len(order) - 1) if fraction > 0 and order else 0])
    return [identity in held_out for identity in found]


def identities(source: GroupSource) -> list[str]:
    """An identity of every group that groups with an image in common, also by way of others, share.

    It is one of `image_identities`; of several processes each reads its part of the images.
    """
    known: dict[Path, str] = {}

    def one(index: int) -> dict[str, Any]:
        try:
            return {"identities": image_identities(source[index], known)}
        except DataError as error:
            return {"problem": str(error)}

    found = divided(one, len(source))
    for problem in [each["problem"] for each in found if "problem" in each]:
        raise DataError(problem)  # in every process
    return connected([each["identities"] for each in found])


def connected(found: Sequence[Sequence[str]]) -> list[str]:
    """The least of all identities that each of these sets is connected with."""
    above: dict[str, str] = {}

    def top(name: str) -> str:
        while (parent := above.get(name, name)) != name:
            above[name] = above.get(parent, parent)
            name = parent
        return name

    for names in found:
        tops = {top(name) for name in names}
        least = min(tops)
        above |= dict.fromkeys(tops, least)
    return [top(names[0]) for names in found]


def group_identity(group: Group, known: dict[Path, str]) -> str:
    """A hash of the group's images, or of its prompt where there is none; `known` saves reading a file twice.

    Raises DataError where an image cannot be read.
    """
    found = image_identities(group, known)
    return found[0] if len(found) == 1 else "images:" + _digest(" ".join(found).encode())


def image_identities(group: Group, known: dict[Path, str]) -> list[str]:
    """A hash of each of the group's images, or of its prompt where there is none; as `group_identity` for one."""
    if not group.images:
        return ["prompt:" + _digest(_turns_text(group).encode())]
    return [_image_identity(image, group, known) for image in group.images]


def _turns_text(group: Group) -> str:
    """The prompt, or of several turns a text that no prompt is."""
    return "\0" + json.dumps(group.turns) if group.history or group.prompt.startswith("\0") else group.prompt


def _image_identity(image: Path | bytes, group: Group, known: dict[Path, str]) -> str:
    if isinstance(image, bytes):
        return "image:" + _digest(image)
    if image not in known:
        try:
            known[image] = "image:" + _digest(image.read_bytes())
        except OSError as error:
            reason = f"image {image} cannot be read: {why(error)}"
            raise DataError(f"{group.file} row {group.row}: {reason}") from error
    return known[image]


def fingerprint(source: GroupSource, known: dict[Path, str]) -> str:
    """SHA-256 of what training and testing see of a source: ids, prompts, responses, comparisons and images, in order,
    and where there are several environments, which groups share one.

    `known` is shared between sources that show the same files, as in `group_identity`. Where files lie and what they
    are called does not matter. An image that cannot be read counts as such: it is quarantined, not used. Of several
    processes each reads its part of the images.
    """

    def line(index: int) -> tuple[str, str]:
        group = source[index]
        try:
            image = group_identity(group, known)
        except DataError:
            image = "unreadable"
        comparisons = [dataclasses.astuple(comparison) for comparison in group.comparisons]
        caption = [] if group.caption is None else [group.caption]
        text = json.dumps([group.id, _turns_text(group), group.responses, comparisons, image, *caption])
        return text, group.environment

    total = hashlib.sha256()
    numbers: dict[str, int] = {}
    environments: list[int] = []
    for start in range(0, len(source), _BLOCK):
        for text, name in divided(lambda i, start=start: line(start + i), min(_BLOCK, len(source) - start)):
            total.update(text.encode() + b"\n")
            environments.append(numbers.setdefault(name, len(numbers)))
    if len(numbers) > 1:
        total.update(json.dumps(environments).encode())
    return total.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _draw(data: bytes) -> float:
    """A number in [0, 1) that `data` alone decides."""
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "big") / 2**48
