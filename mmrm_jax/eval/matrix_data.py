"""The data sets of a cross-distribution matrix: opened, named, fingerprinted, measured."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mmrm_jax.config import Environment, MatrixConfig, TrainConfig
from mmrm_jax.data.buckets import Buckets
from mmrm_jax.data.overlap import Seen, describe_overlap, overlaps, seen
from mmrm_jax.data.pipeline import EncodedSource, buckets_for
from mmrm_jax.data.records import DataError, raise_first
from mmrm_jax.data.sources import GroupSource, fingerprint
from mmrm_jax.objectives import find_objective
from mmrm_jax.train.features import with_features
from mmrm_jax.train.setup import (
    Checkpoint,
    encode,
    merged_views,
    model_fingerprint,
    open_spec,
    require_comparisons,
    training_sources,
)
from mmrm_jax.types import Quarantined


@dataclasses.dataclass(frozen=True)
class Sources:
    """Training and test sets by name, the i.i.d. test of each training set, and what was left out."""

    train: dict[str, GroupSource]
    test: dict[str, GroupSource]
    iid: dict[str, str]
    quarantined: list[Quarantined]


@dataclasses.dataclass(frozen=True)
class Data:
    """Encoded training and test sets by name, the buckets that cover them all, and what was left out."""

    train: dict[str, EncodedSource]
    test: dict[str, EncodedSource]
    iid: dict[str, str]
    buckets: Buckets
    quarantined: list[Quarantined]


def set_names(sets: Sequence[tuple[Environment, str]]) -> dict[str, str]:
    """What each set (environment, specification) is called: as its environment, or, where several share it, by itself.

    Raises ValueError where that does not tell two sets apart.
    """
    owners: dict[str, list[str]] = {}
    for environment, spec in sets:
        owners.setdefault(spec, []).append(environment.name)
    names = {spec: found[0] if len(found) == 1 else _own_name(spec) for spec, found in owners.items()}
    for name, count in collections.Counter(names.values()).items():
        if count > 1:
            same = ", ".join(spec for spec in names if names[spec] == name)
            raise ValueError(f"{count} data sets would be called {name!r}: {same}; give the environments other names")
    return names


def train_names(config: MatrixConfig) -> dict[str, str]:
    """What each training set (its specification) is called."""
    return set_names([(env, env.train) for env in config.environments if env.train is not None])


def _own_name(spec: str) -> str:
    """The stem of a file, or the split of a prepared data set."""
    return Path(spec).name.partition(":")[2] or Path(spec).stem


def _without_holdout(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, holdout=0.0))


def _check_pairs(config: MatrixConfig, tested: Mapping[Environment, str | None]) -> None:
    """Raises ValueError where a training set would have two i.i.d. tests, or be a validation set as a whole, too."""
    first: dict[str, Environment] = {}
    for env in tested:
        if env.train is not None:
            other = first.setdefault(env.train, env)
            if tested[other] != tested[env]:
                raise ValueError(
                    f"environments {other.name} and {env.name} both train on {env.train}, and are tested on "
                    f"{tested[other]} and {tested[env]}: only one of them is in distribution; name the other as a "
                    f"test alone, {env.name}=,{tested[env]}"
                )
    if config.on == "validation":
        for env in tested:
            if env.validation in first and first[env.validation].validation is None:
                raise ValueError(
                    f"environment {env.name} is validated on all of {env.validation}, which environment "
                    f"{first[env.validation].name} holds out a part of to validate on: give that one a validation set"
                )


def open_data(config: MatrixConfig) -> Sources:
    """Open every set. On "validation" the held-out parts of the training sets are the test sets.

    Raises ValueError where environments share sets in a way that leaves open what is in distribution, or held out.
    """
    quarantined: list[Quarantined] = []
    train_sets: dict[str, GroupSource] = {}
    test_sets: dict[str, GroupSource] = {}
    iid: dict[str, str] = {}
    tested = {env: env.test if config.on == "test" else env.validation or env.train for env in config.environments}
    _check_pairs(config, tested)
    names = train_names(config)
    test_names = set_names([(env, spec) for env, spec in tested.items() if spec is not None])
    for env, spec in tested.items():
        if spec is None:  # a test set alone, and on "validation"
            continue
        held_out = None
        if env.train is not None:
            settings = config.train if env.validation is None else _without_holdout(config.train)
            source, held_out, bad = training_sources(env.train, config.root, config.image_root, settings)
            quarantined += bad
            train_sets[names[env.train]] = source
            iid[names[env.train]] = test_names[spec]
        if test_names[spec] in test_sets:
            continue
        if config.on == "test" or env.validation is not None:
            source, bad = open_spec(spec, config.root, config.image_root)
            quarantined += bad
            if config.train.strict:
                raise_first(bad)
            test_sets[test_names[spec]] = source
        elif held_out is not None:
            test_sets[test_names[spec]] = held_out
        else:
            raise ValueError(f"environment {env.name} has nothing to validate on: no validation set and no hold-out")
    if not train_sets or not test_sets:
        raise ValueError("the matrix needs an environment with training data and a test set (or a hold-out)")
    return Sources(train_sets, test_sets, iid, quarantined)


def seen_in_training(sources: Sources, known: dict[Path, str]) -> list[str]:
    """A line for every training and test set that show the same images: what is right there may be remembered.

    `known` is shared with `fingerprints`.
    """

    def each(source: GroupSource) -> Iterator[Seen]:
        for i in range(len(source)):
            with contextlib.suppress(DataError):  # of an image that cannot be read, which is quarantined
                yield seen(source[i], known)

    train, test = ({name: list(each(sets[name])) for name in sets} for sets in (sources.train, sources.test))
    pairs = [{f"training set {a}": train[a], f"test set {b}": test[b]} for a in train for b in test]
    return [describe_overlap(found) for pair in pairs for found in overlaps(pair)]


def fingerprints(sources: Sources, model: Path, known: dict[Path, str] | None = None) -> dict[str, Any]:
    """What the numbers come from beside the settings: hashes of the weights and of every set."""
    known = {} if known is None else known
    return {
        "model": model_fingerprint(model),
        "train": {name: fingerprint(source, known) for name, source in sources.train.items()},
        "test": {name: fingerprint(source, known) for name, source in sources.test.items()},
    }


def load_data(config: MatrixConfig, sources: Sources, checkpoint: Checkpoint, console: Console) -> Data:
    """Measure every set, and encode it where it is cached; the tower's features are made where they are kept."""
    views = merged_views(map(find_objective, config.objectives), config.train)
    quarantined = list(sources.quarantined)

    def encoded(sets: dict[str, GroupSource], join: int = 1) -> dict[str, EncodedSource]:
        found = {}
        for name, source in sets.items():
            found[name], bad = encode(source, checkpoint, views, config.train, name=name, console=console, join=join)
            quarantined.extend(bad)
            require_comparisons(found[name], name, quarantined)
        return found

    train_sets, test_sets = encoded(sources.train, config.train.data.join), encoded(sources.test)
    featured = with_features([*train_sets.values(), *test_sets.values()], checkpoint, config.train, console)
    train_sets = dict(zip(train_sets, featured, strict=False))
    test_sets = dict(zip(test_sets, featured[len(train_sets) :], strict=True))
    buckets = buckets_for([*train_sets.values(), *test_sets.values()], config.train.data.buckets)
    return Data(train_sets, test_sets, sources.iid, buckets, quarantined)
