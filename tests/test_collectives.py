"""What the compiled train step sends between devices, and how large its program is.

XLA decides that before it makes machine code, which is all that these tests, like most, leave unoptimised.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_models import compile_train_step, flat, make_batch, random_group

from mmrm_jax.config import DecoderConfig, LoraConfig, MeshConfig, ModelConfig, TrainConfig, VisionConfig
from mmrm_jax.objectives import shortcut_aware
from mmrm_jax.sharding import make_mesh, param_shardings
from mmrm_jax.train.state import abstract_model, merge_branch, split_params
from mmrm_jax.types import Comparison

# Layers are scanned, no width is a number of groups, tokens or layers, and the vocabulary divides by nothing.
MODEL = ModelConfig(
    vision=VisionConfig(image_size=8, patch_size=2, width=64, mlp_width=128, num_layers=5, num_heads=4),
    decoder=DecoderConfig(
        vocab_size=99, width=96, mlp_width=160, num_layers=5, num_heads=4, num_kv_heads=2, head_width=24, rope_theta=1e4
    ),
)
GROUPS = 16
SMALL = 40  # elements: metrics, their histogram, rewards of a batch; what every device needs to compare responses

Shape = tuple[int, ...]


def batch(micro_batches: int = 1):
    rng = np.random.default_rng(0)
    groups = [random_group(MODEL, rng, i, tiles=1, responses=2, comparisons=(Comparison(0, 1),)) for i in range(GROUPS)]
    return make_batch(groups, MODEL, micro_batches=micro_batches)


def collectives(hlo: str) -> Iterator[tuple[str, Shape]]:
    """(kind, shape of one result) of every collective; several that were combined count one by one."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    for line in hlo.splitlines():
        if found := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            for sizes in re.findall(r"\w+\[([\d,]*)\]", found[1]):
                yield found[2], tuple(int(n) for n in sizes.split(",") if n)


def layer_shapes(params: nnx.State, mesh: MeshConfig) -> set[Shape]:
    """Sides of every parameter, or of one layer of a stack, as a device computes with it: FSDP's part gathered."""
    sharding = {"/".join(map(str, path)): s for path, s in nnx.to_flat_state(param_shardings(params, make_mesh(mesh)))}
    shapes = set()
    for name, x in flat(params).items():
        tensor = [mesh.tensor if "tensor" in (entry or ()) else 1 for entry in sharding[name].spec]
        shape = tuple(size // ways for size, ways in zip(x.shape, tensor))
        shapes.add(sides(shape[1:] if "/layers/" in name else shape))
    return shapes


def sides(shape: Shape) -> tuple[int, ...]:
    """A shape up to transposition: the compiler chooses layouts."""
    return tuple(sorted(n for n in shape if n > 1))


def shards(shapes: set[Shape], ways: int) -> set[Shape]:
    """What a device holds of each, whichever side is split."""
    split = [((*s[:i], s[i] // ways, *s[i + 1 :]), s[i]) for s in shapes for i in range(len(s))]
    return {sides(shape) for shape, side in split if side % ways == 0}


def parameters(lora: LoraConfig = LoraConfig()) -> tuple[nnx.State, nnx.State]:
    """(all parameters of the primary branch, those of them that are trained), of a shortcut-aware run."""
    params = abstract_model(MODEL)[1]
    views = shortcut_aware().views("absent")
    trained, frozen = jax.eval_shape(lambda p: split_params(p, views, ("vision",), lora), params)
    return merge_branch(trained["primary"], frozen), trained["primary"]


def test_data_parallel_devices_exchange_gradients_alone() -> None:
    mesh = MeshConfig(8, 1, 1)
    found = list(collectives(compile_train_step(MODEL, TrainConfig(mesh=mesh), batch()).as_text()))
    assert {kind for kind, _ in found} == {"all-reduce"}
    large, gradients = {sides(s) for _, s in found if math.prod(s) > SMALL}, layer_shapes(parameters()[1], mesh)
    assert large == {s for s in gradients if math.prod(s) > SMALL}


def test_fsdp_gathers_one_layer_at_a_time_and_sums_gradients_in_shards() -> None:
    mesh = MeshConfig(1, 8, 1)
    config = TrainConfig(mesh=mesh, micro_batches=2)
    hlo = compile_train_step(MODEL, config, batch(micro_batches=2)).as_text()
    found = list(collectives(hlo))
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}  # on CPU a reduce-scatter is an all-reduce
    params, gradients = (layer_shapes(part, mesh) for part in parameters())
    assert {sides(s) for kind, s in found if kind == "all-gather"} <= params
    assert {sides(s) for kind, s in found if kind == "all-reduce" and math.prod(s) > SMALL} <= gradients
    # A stack is nowhere whole: neither its parameters, nor sums of gradients over micro-batches, nor moments.
    for name, x in flat(parameters()[0]).items():
        if "/layers/" in name and name.endswith("kernel"):
            assert f"[{','.join(map(str, x.shape))}]" not in hlo, name
    assert "f32[5,12,160]" in hlo


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=3)], ids=["full", "lora"])
def test_tensor_parallel_devices_exchange_activations_of_their_own_groups(lora) -> None:
    mesh = MeshConfig(1, 4, 2)
    found = list(collectives(compile_train_step(MODEL, TrainConfig(mesh=mesh, lora=lora), batch()).as_text()))
    assert {kind for kind, _ in found} == {"all-gather", "all-reduce"}
    params, gradients = (layer_shapes(part, mesh) for part in parameters(lora))
    own, activations = GROUPS // 4, [(kind, s) for kind, s in found if len(s) > 2]
    assert {s[0] for _, s in activations} == {own}
    # Only the token embeddings of each branch's prefix and responses are joined from their columns.
    joined = [s for kind, s in activations if kind == "all-gather"]
    assert len(joined) == 4 and all(s[-1] == MODEL.decoder.width for s in joined)
    assert {sides(s) for kind, s in found if kind == "all-gather" and len(s) < 3} <= params
    assert {sides(s) for kind, s in found if kind == "all-reduce" and len(s) < 3 and math.prod(s) > SMALL} <= gradients


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=3)], ids=["full", "lora"])
def test_data_fsdp_and_tensor_parallel_devices_exchange_no_more_than_each(lora) -> None:
    mesh = MeshConfig(2, 2, 2)
    found = list(collectives(compile_train_step(MODEL, TrainConfig(mesh=mesh, lora=lora), batch()).as_text()))
    params, gradients = (layer_shapes(part, mesh) for part in parameters(lora))
    assert {s[0] for _, s in found if len(s) > 2} == {GROUPS // 4}
    assert {sides(s) for kind, s in found if kind == "all-gather" and len(s) < 3} <= params
    summed = {sides(s) for kind, s in found if kind == "all-reduce" and len(s) < 3 and math.prod(s) > SMALL}
    assert summed <= gradients | shards(gradients, mesh.fsdp)
    # Shards of the patch kernel and of adapters may go where the order of devices wants them before they are gathered.
    patch = {(3 * MODEL.vision.patch_size**2, MODEL.vision.width)}
    adapters = {shape for shape in gradients if lora.rank in shape}
    assert {sides(s) for kind, s in found if kind == "collective-permute"} <= shards(patch | adapters, mesh.fsdp)
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce", "collective-permute"}


def test_the_program_does_not_grow_with_depth() -> None:
    def instructions(depth: int) -> int:
        vision, decoder = (dataclasses.replace(part, num_layers=depth) for part in (MODEL.vision, MODEL.decoder))
        model = dataclasses.replace(MODEL, vision=vision, decoder=decoder)
        config = TrainConfig(objective="standard", mesh=MeshConfig(1, 8, 1), freeze=(), remat="dots")
        return compile_train_step(model, config, batch()).as_text().count(" = ")

    assert instructions(24) == pytest.approx(instructions(6), rel=0.02)
