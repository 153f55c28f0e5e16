"""Checkpoints damaged at random, many times over: a ValueError, or exactly what the files say; nothing in between."""

from __future__ import annotations

import dataclasses
import json
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_hf import VARIANTS
from tiny_models import MODEL, flat, random_params

from mmrm_jax.config import ModelConfig
from mmrm_jax.models.hf.config import config_to_hf, config_to_native, read_config
from mmrm_jax.models.hf.names import name_table
from mmrm_jax.models.hf.weights import load_params, save_params
from mmrm_jax.train.state import abstract_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SEEDS = range(100)
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.fixture(autouse=True)
def no_hang_and_no_huge_allocation() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("reading damaged files takes far too long")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(240)
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert peak < 64 * 2**20


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    save_params(folder, MODEL, random_params(MODEL, 1))
    return folder


LIKE = abstract_model(MODEL)[1]


def load(folder: Path) -> dict[str, np.ndarray] | None:
    """Parameters, all of them from the files; or None for a ValueError that names the folder. Others propagate."""
    try:
        params, kept = load_params(folder, MODEL, LIKE)
    except ValueError as error:
        assert str(folder) in str(error)
        return None
    assert kept == []
    return {name: np.asarray(x) for name, x in flat(params).items()}


def bits(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def said_by(content: bytes) -> dict[str, np.ndarray]:
    """What a safetensors file says, read by hand."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.pop("__metadata__", None)
    found = {}
    for name, x in header.items():
        first, last = x["data_offsets"]
        found[name] = np.frombuffer(content[end + first : end + last], DTYPES[x["dtype"]]).reshape(x["shape"])
    return found


def assert_all_or_nothing(content: bytes, folder: Path) -> bool:
    """Whether the file was read: then every parameter is what the file says, and no other."""
    (folder / SINGLE).write_bytes(content)
    found = load(folder)
    if found is None:
        return False
    save_file(said_by(content), folder / SINGLE)
    again = load(folder)
    assert again is not None
    for name, x in again.items():
        assert bits(found[name]) == bits(x), name
    return True


def damage_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """One of: bits flipped in the length, in the header or in the data; cut short; bytes added, lost or repeated."""
    out, end = bytearray(content), 8 + int.from_bytes(content[:8], "little")
    kind = rng.integers(8)
    if kind < 3:
        first, last = ((0, 8), (8, end), (end, len(out)))[kind]
        for _ in range(rng.integers(1, 4)):
            out[rng.integers(first, last)] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        digits = [i for i in range(8, end) if chr(out[i]).isdigit()]
        out[digits[rng.integers(len(digits))]] = ord(str(rng.integers(10)))
    elif kind == 4:
        del out[int(rng.integers(len(out))) :]
    elif kind == 5:
        out += rng.bytes(int(rng.integers(1, 100)))
    else:
        at, size = int(rng.integers(end)), int(rng.integers(1, 20))
        out[at : at + size] = b"" if kind == 6 else out[at : at + size] * 2
    return bytes(out)


def test_damaged_bytes(clean: Path, tmp_path: Path) -> None:
    content, read = (clean / SINGLE).read_bytes(), 0
    for seed in SEEDS:
        read += assert_all_or_nothing(damage_bytes(content, np.random.default_rng(seed)), tmp_path)
    assert 0 < read < len(SEEDS) / 2  # flipped bits of a weight are a weight, which no format without sums can tell


def test_every_length_but_the_whole_is_refused(clean: Path, tmp_path: Path) -> None:
    content = (clean / SINGLE).read_bytes()
    for length in np.random.default_rng(0).integers(len(content), size=len(SEEDS)):
        assert not assert_all_or_nothing(content[:length], tmp_path)
    for length in (*range(12), len(content) - 1):
        assert not assert_all_or_nothing(content[:length], tmp_path)


def test_hostile_header_lengths(clean: Path, tmp_path: Path) -> None:
    """Far beyond the file, around its end and around the limits of integers, on a file that is otherwise whole."""
    content = (clean / SINGLE).read_bytes()
    true = int.from_bytes(content[:8], "little")
    near = [n + d for n in (0, true, len(content), 100_000_000, 2**31, 2**32, 2**63, 2**64 - 8) for d in range(-9, 9)]
    for length in {n for n in near if 0 <= n < 2**64 and n != true}:
        assert not assert_all_or_nothing(length.to_bytes(8, "little") + content[8:], tmp_path)


HOSTILE_VALUES: tuple[Any, ...] = (
    *(0, -1, 1, 3, 2**31, 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf")),
    *(None, True, "", "x", "F64", "I8", [], [0], [-1], [2**40, 2**40], [[1]], {}, {"x": 1}),
)


def replaced(tree: Any, rng: np.random.Generator, others: list[Any]) -> Any:
    """The JSON value with one of its parts, at random depth, exchanged for one of `others`."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.85:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key, copy = keys[rng.integers(len(keys))], tree.copy()
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = replaced(tree[key], rng, others)
        return copy
    return others[rng.integers(len(others))]


def test_headers_that_say_something_else(clean: Path, tmp_path: Path) -> None:
    """Fields lost, of other types, of hostile sizes, or those of another tensor."""
    content = (clean / SINGLE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    parts = [part for x in header.values() for part in (x, *x.values())]
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        text = json.dumps(replaced(header, rng, [*HOSTILE_VALUES, *parts])).encode()
        assert_all_or_nothing(len(text).to_bytes(8, "little") + text + content[end:], tmp_path)


def test_tensors_that_changed_places(clean: Path, tmp_path: Path) -> None:
    """Shapes, types or contents of two tensors exchanged."""
    content = (clean / SINGLE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    outcomes = set()
    for seed in SEEDS:
        rng, header = np.random.default_rng(seed), json.loads(content[8:end])
        names = [name for name in header if name != "__metadata__"]
        a, b = (header[names[i]] for i in rng.choice(len(names), 2, replace=False))
        field = ("shape", "data_offsets", "dtype")[rng.integers(3)]
        a[field], b[field] = ("F16", "BF16") if field == "dtype" else (b[field], a[field])
        text = json.dumps(header).encode()
        outcomes.add((field, assert_all_or_nothing(len(text).to_bytes(8, "little") + text + content[end:], tmp_path)))
    # Exchanged contents of one shape are a checkpoint like any other; a type that does not fit its size never is.
    assert {("shape", False), ("data_offsets", False), ("dtype", False)} <= outcomes
    assert ("dtype", True) not in outcomes


def test_damaged_indices(tmp_path: Path) -> None:
    save_params(tmp_path, MODEL, random_params(MODEL, 1), max_file_bytes=4000)
    text, want = (tmp_path / INDEX).read_text(), flat(random_params(MODEL, 1))
    names = [
        *HOSTILE_VALUES,
        *(p.name for p in tmp_path.iterdir()),
        "/etc/passwd",
        "a\0.safetensors",
        "\ud800.safetensors",
    ]
    names += ["x" * 5000 + ".safetensors", ".safetensors", "..", "./model-00001-of-00002.safetensors"]
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        damaged = json.dumps(replaced(json.loads(text), rng, names)).encode()
        if seed % 3 == 0:
            damaged = bytearray(text.encode())
            damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        (tmp_path / INDEX).write_bytes(damaged)
        found = load(tmp_path)
        for name, x in (found or {}).items():
            np.testing.assert_array_equal(x, want[name], err_msg=name)
    for damaged in ("[" * 200_000, '{"weight_map":' * 50_000):
        (tmp_path / INDEX).write_text(damaged)
        assert load(tmp_path) is None


CONFIGS = [
    *(config_to_hf(c, template="chatml", max_tiles=6) for c in VARIANTS.values()),
    *(config_to_native(VARIANTS[name], image_token_id=7) for name in ("qwen2", "phi3", "qwen3")),
]


@pytest.mark.parametrize("which", range(len(CONFIGS)))
def test_configurations_that_say_something_else(which: int, tmp_path: Path) -> None:
    """Read as a model that can be described without its memory, or refused by name of the file."""
    for seed in SEEDS:
        damaged = replaced(CONFIGS[which], np.random.default_rng(1000 * which + seed), list(HOSTILE_VALUES))
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        try:
            config = read_config(tmp_path)
        except ValueError as error:
            assert str(tmp_path / "config.json") in str(error)
            continue
        assert isinstance(config, ModelConfig)
        try:
            hash(config)
            name_table(config, "native" if "text_config" in damaged else "chat")
            assert config.visual_tokens_per_tile > 0
            for part in (config.vision, config.decoder):
                for field in dataclasses.fields(part):
                    value = getattr(part, field.name)
                    if field.type == "int" or (field.type == "int | None" and value is not None):
                        assert isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**32
                    if field.type in ("float", "bool"):
                        assert isinstance(value, {"float": (int, float), "bool": bool}[field.type])
            assert config.decoder.num_heads % config.decoder.num_kv_heads == 0
        except Exception as error:
            raise AssertionError(f"seed {seed}: {damaged}") from error
    for text in ("[" * 200_000, "", "null", "[]", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match="config.json"):
            read_config(tmp_path)
