"""Checkpoints of several files and with a proxy inside, read part by part onto a mesh; and damaged ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_models import DECODER, MODEL, flat, random_params

from mmrm_jax.config import DataConfig, MeshConfig, ModelConfig
from mmrm_jax.eval.inspect import inspect_checkpoint
from mmrm_jax.models.hf import tensors
from mmrm_jax.models.hf.config import config_to_hf
from mmrm_jax.models.hf.tensors import Tensor
from mmrm_jax.models.hf.weights import checkpoint_problems, load_params, save_params
from mmrm_jax.sharding import make_mesh, param_shardings
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.setup import initial_params, model_fingerprint, open_checkpoint
from mmrm_jax.train.state import abstract_model, init_params, place_abstract

INTERNLM2 = dataclasses.replace(
    MODEL, decoder=dataclasses.replace(DECODER, family="internlm2", qkv_bias=False, num_heads=8, num_kv_heads=4)
)
PHI3 = dataclasses.replace(MODEL, decoder=dataclasses.replace(DECODER, family="phi3", qkv_bias=False))
INDEX = "model.safetensors.index.json"


def assert_same(got: nnx.State, want: nnx.State) -> None:
    for name, x in flat(want).items():
        np.testing.assert_array_equal(flat(got)[name], x, err_msg=name)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of several files."""
    save_params(tmp_path, MODEL, random_params(MODEL, 1), max_file_bytes=4000)
    return tmp_path


def test_several_files_hold_what_one_does(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    whole = {name: x for file in files for name, x in load_file(sharded / file).items()}
    assert whole.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    for file in files:
        loaded = load_file(sharded / file)
        assert len(loaded) == 1 or sum(x.nbytes for x in loaded.values()) <= 4000
    params, drawn = load_params(sharded, MODEL, init_params(MODEL, 0))
    assert drawn == []
    assert_same(params, random_params(MODEL, 1))
    # Saving the other way removes what would be read in its place.
    prints = [model_fingerprint(sharded)]
    for limit in (10**9, 4000):
        save_params(sharded, MODEL, params, max_file_bytes=limit)
        assert_same(load_params(sharded, MODEL, init_params(MODEL, 0))[0], params)
        prints.append(model_fingerprint(sharded))
    assert prints[0] == prints[2] != prints[1]


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    params = random_params(MODEL, 1)
    save_params(tmp_path, MODEL, params, dtype="bfloat16", max_file_bytes=4000)
    loaded, _ = load_params(tmp_path, MODEL, init_params(MODEL, 0))
    rounded = {k: np.asarray(v).astype(ml_dtypes.bfloat16) for k, v in flat(params).items()}
    for name, x in flat(loaded).items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, rounded[name].astype(np.float32), err_msg=name)
    # Onto parameters of that dtype, bit by bit.
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype(ml_dtypes.bfloat16)), abstract_model(MODEL)[1])
    loaded, _ = load_params(tmp_path, MODEL, like)
    for name, x in flat(loaded).items():
        np.testing.assert_array_equal(np.asarray(x), rounded[name], err_msg=name)


def test_a_proxy_inside_is_read_on_demand(tmp_path: Path) -> None:
    primary, proxy = random_params(MODEL, 1), random_params(MODEL, 2)
    save_params(tmp_path, MODEL, primary, proxy=proxy)
    assert "bias_reward_model.score.weight" in load_file(tmp_path / "model.safetensors")
    init = init_params(MODEL, 0)
    assert_same(load_params(tmp_path, MODEL, init)[0], primary)
    assert_same(load_params(tmp_path, MODEL, init, branch="proxy")[0], proxy)
    # One without image parts, as an absent-image proxy is saved
    text = nnx.State({k: proxy[k] for k in ("decoder", "score")})
    save_params(tmp_path, MODEL, primary, proxy=text)
    got, _ = load_params(tmp_path, MODEL, nnx.State({k: init[k] for k in ("decoder", "score")}), branch="proxy")
    assert_same(got, text)
    save_params(tmp_path, MODEL, primary)
    with pytest.raises(ValueError, match=r"missing: language_model\.model\.embed_tokens\.weight"):
        load_params(tmp_path, MODEL, init, branch="proxy")


@pytest.mark.parametrize("max_file_bytes", [4000, 10**9], ids=["several files", "one file"])
def test_a_value_head_in_its_own_file_is_the_score_head(tmp_path: Path, max_file_bytes: int) -> None:
    params = random_params(MODEL, 1)
    weight, bias = np.asarray(params["score"].get_value())[None], np.full(1, 0.25, np.float32)
    base, head = nnx.State({k: v for k, v in params.items() if k != "score"}), {"v_head.summary.weight": weight}
    save_params(tmp_path, MODEL, base, max_file_bytes=max_file_bytes)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(MODEL, template="", max_tiles=1)))
    save_file(head | {"v_head.summary.bias": bias}, tmp_path / "value_head.safetensors")
    got, initialised = load_params(tmp_path, MODEL, init_params(MODEL, 0))
    assert_same(got, params)
    assert initialised == []
    found, before = inspect_checkpoint(tmp_path), model_fingerprint(tmp_path)
    assert (found["score_head"], found["value_head_bias"]) == (True, 0.25)
    save_file(head, tmp_path / "value_head.safetensors")
    assert inspect_checkpoint(tmp_path)["value_head_bias"] is None
    assert model_fingerprint(tmp_path) != before
    save_file({"v_head.0.weight": weight}, tmp_path / "value_head.safetensors")
    with pytest.raises(ValueError, match=r"value_head.safetensors has v_head.0.weight; supported: v_head.summary"):
        load_params(tmp_path, MODEL, init_params(MODEL, 0))
    # A later save takes it away; put beside a score head it is one too many.
    save_params(tmp_path, MODEL, params, max_file_bytes=max_file_bytes)
    assert not (tmp_path / "value_head.safetensors").exists()
    save_file(head, tmp_path / "value_head.safetensors")
    with pytest.raises(ValueError, match=r"score.weight and a value head in value_head.safetensors"):
        load_params(tmp_path, MODEL, init_params(MODEL, 0))


@pytest.mark.parametrize("config", [MODEL, INTERNLM2, PHI3], ids=["qwen2", "internlm2", "phi3"])
@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 4, 1), (8, 1, 1)], ids=str)
def test_every_device_reads_its_own_part(
    config: ModelConfig, sizes: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = random_params(config, 1)
    save_params(tmp_path, config, params, max_file_bytes=4000)
    like = place_abstract(abstract_model(config)[1], make_mesh(MeshConfig(*sizes)))
    read = []
    original = Tensor.read

    def counted(self: Tensor, index: tuple) -> np.ndarray:
        found = original(self, index)
        read.append(found.nbytes)
        return found

    monkeypatch.setattr(tensors.Tensor, "read", counted)
    loaded, _ = load_params(tmp_path, config, like)
    assert_same(loaded, params)
    shardings = param_shardings(abstract_model(config)[1], make_mesh(MeshConfig(*sizes)))
    leaves = zip(jax.tree.leaves(loaded), jax.tree.leaves(shardings))
    for x, sharding in leaves:
        assert x.sharding == sharding
    # No part is read twice, and nothing beside the parts: every byte of the files once.
    assert sum(read) == sum(x.nbytes for x in jax.tree.leaves(params))


def test_host_memory_stays_near_the_shards(tmp_path: Path) -> None:
    """The bound: this process's own shards and twice the largest tensor. CPU devices take the shards over uncopied."""
    wide = dataclasses.replace(DECODER, width=256, mlp_width=512, vocab_size=1024, num_layers=4)
    config = dataclasses.replace(MODEL, decoder=wide)
    save_params(tmp_path, config, init_params(config, 1))
    like = place_abstract(abstract_model(config)[1], make_mesh(MeshConfig(1, 4, 2)))
    load_params(tmp_path, config, like)  # what JAX allocates once is not the question
    tracemalloc.start()
    try:
        loaded, _ = load_params(tmp_path, config, like)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    own = sum(s.data.nbytes for x in jax.tree.leaves(loaded) for s in x.addressable_shards)
    largest = max(x.nbytes for x in load_file(tmp_path / "model.safetensors").values())
    assert peak < own + 2 * largest


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def traverse(folder: Path, name: str) -> None:
    edit_index(folder, lambda i: i["weight_map"].update({"score.weight": name}))


def add_tensor(folder: Path, name: str, x: np.ndarray) -> None:
    save_file(load_file(first_file(folder)) | {name: x}, first_file(folder))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no entry": (lambda f: edit_index(f, lambda i: i["weight_map"].pop("mlp1.1.bias")), "mlp1.1.bias.*no entry"),
    "wrong file": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({"mlp1.1.bias": first_file(f).name})),
        "mlp1.1.bias is in model-",
    ),
    "entry without tensor": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update(extra=first_file(f).name)),
        "extra is not in model-00001",
    ),
    "outside": (lambda f: traverse(f, "../secret.safetensors"), r"\.\./secret\.safetensors.*own folder"),
    "absolute": (lambda f: traverse(f, "/tmp/secret.safetensors"), "/tmp/secret.*own folder"),
    "subfolder": (lambda f: traverse(f, "a/b.safetensors"), "own folder"),
    "other kind of file": (lambda f: traverse(f, "pytorch_model.bin"), "own folder"),
    "file is missing": (lambda f: first_file(f).unlink(), r"model-00001.*does not exist"),
    "file is cut short": (
        lambda f: first_file(f).write_bytes(first_file(f).read_bytes()[:-1]),
        r"model-00001-of-.*cannot be read",
    ),
    "index is cut short": (lambda f: (f / INDEX).write_text((f / INDEX).read_text()[:50]), "not an index"),
    "index is no object": (lambda f: (f / INDEX).write_text("[1]"), "not an index"),
    "map is no object": (lambda f: (f / INDEX).write_text('{"weight_map": 3}'), "not an index"),
    "index is binary": (lambda f: (f / INDEX).write_bytes(b"\x80\x04\xff"), "not an index"),
    "no index": (lambda f: (f / INDEX).unlink(), "has no weights"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_checkpoints_are_value_errors(damage: Callable, message: str, sharded: Path) -> None:
    damage(sharded)
    with pytest.raises(ValueError, match=message):
        load_params(sharded, MODEL, init_params(MODEL, 0))


def test_types_and_shapes_that_do_not_fit_are_listed_together(tmp_path: Path) -> None:
    save_params(tmp_path, MODEL, random_params(MODEL, 1))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["mlp1.1.bias"] = np.zeros(16, np.int64)
    tensors["mlp1.3.bias"] = np.zeros(15, np.float64)
    position = "vision_model.embeddings.position_embedding"
    tensors[position] = tensors[position][:, :10]  # 1 + 3 * 3: another size of image, and not what config.json says
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_params(tmp_path, MODEL, init_params(MODEL, 0))
    assert str(error.value).split("\n  ")[1:] == [
        "dtype: mlp1.1.bias is I64; supported: F32, F16, BF16",
        "shape: mlp1.3.bias is (15,), config.json says (16,)",
        "dtype: mlp1.3.bias is F64; supported: F32, F16, BF16",
        "shape: vision_model.embeddings.position_embedding is (1, 10, 8), config.json says (1, 17, 8)",
    ]


def test_initial_parameters_on_a_mesh_are_those_on_one_device() -> None:
    checkpoint = open_checkpoint(MODEL_DIR, DataConfig())
    alone, drawn = initial_params(checkpoint, 3)
    assert drawn == ["score"]
    np.testing.assert_array_equal(flat(alone)["score"], flat(init_params(checkpoint.config, 3))["score"])
    spread, _ = initial_params(checkpoint, 3, make_mesh(MeshConfig(2, 2, 2)))
    assert_same(spread, alone)
    assert len(flat(spread)["decoder/embedding"].addressable_shards) == 8
    with pytest.raises(ValueError, match=r"missing: score\.weight"):
        load_params(MODEL_DIR, checkpoint.config, abstract_model(checkpoint.config)[1])


def test_of_many_problems_the_first_are_listed(tmp_path: Path) -> None:
    save_params(tmp_path, MODEL, random_params(MODEL, 1))
    deep = dataclasses.replace(MODEL, decoder=dataclasses.replace(DECODER, num_layers=40))
    problems = checkpoint_problems(tmp_path, deep, abstract_model(deep)[1])
    assert len(problems) == 51 and problems[-1] == f"and {38 * 12 - 50} more"
    with pytest.raises(ValueError, match=f"and {38 * 12 - 50} more$"):
        load_params(tmp_path, deep, abstract_model(deep)[1])


def test_a_tokenizer_and_tiles_that_the_model_cannot_take(tmp_path: Path) -> None:
    """An id beyond the embedding would be clamped to its last row, and tiles of another size fail in the first step."""
    shutil.copytree(MODEL_DIR, tmp_path, dirs_exist_ok=True)
    hf = json.loads((tmp_path / "config.json").read_text())
    rows = open_checkpoint(tmp_path).processor.chat.tokenizer.get_vocab_size()
    assert hf["llm_config"]["vocab_size"] == rows

    def problem() -> str:
        with pytest.raises(ValueError) as error:
            open_checkpoint(tmp_path)
        assert str(error.value).split(": ", 1)[1] in "; ".join(inspect_checkpoint(tmp_path)["problems"])
        return str(error.value)

    (tmp_path / "config.json").write_text(json.dumps(hf | {"llm_config": hf["llm_config"] | {"vocab_size": rows - 1}}))
    assert f"ids up to {rows - 1}, but vocab_size in config.json is {rows - 1}: give the folder" in problem()
    (tmp_path / "config.json").write_text(json.dumps(hf))
    processor = open_checkpoint(tmp_path).processor
    images = dataclasses.replace(processor.preprocessing, image_size=64)
    dataclasses.replace(processor, preprocessing=images).save(tmp_path)
    assert "tiles of 64 pixels, but image_size in config.json is 32" in problem()
