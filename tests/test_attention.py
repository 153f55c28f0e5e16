"""Every attention kernel against plain array code, in values and gradients, and where each is chosen."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from attention_cases import RESPONSES, SEQUENCES, responses, sequence
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mmrm_jax.config import MeshConfig
from mmrm_jax.models import attention as module
from mmrm_jax.models.attention import attention, best_kernel, block_size, response_attention, splash, splash_responses
from mmrm_jax.models.blocked import blocked_attention
from mmrm_jax.plan.compile import has_libtpu, topology_devices
from mmrm_jax.plan.hardware import parse_topology
from mmrm_jax.sharding import make_mesh

TOLERANCE = 1e-5
HALF_TOLERANCE = 0.02  # in bfloat16 each of several roundings is 2**-9
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def run_splash(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool) -> jax.Array:
    return splash(q * q.shape[-1] ** -0.5, k, v, offset=0 if causal else None, interpret=True)


def run_responses(arguments: Callable, run: Callable = response_attention) -> Callable[..., jax.Array]:
    return lambda *arrays: run(*arguments(*arrays))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splash attention wherever a kernel is chosen, interpreted."""
    monkeypatch.setattr(module, "best_kernel", lambda dtype, width: "splash")
    monkeypatch.setattr(module, "splash", functools.partial(splash, interpret=True))
    monkeypatch.setattr(module, "splash_responses", functools.partial(splash_responses, interpret=True))


# Numbers


@pytest.mark.parametrize("shape", [SEQUENCES[2], SEQUENCES[5]], ids=str)
def test_attention_on_this_device_is_plain_attention(shape: tuple) -> None:
    assert max(sequence(*shape).errors(functools.partial(attention, causal=shape[-1]))) < TOLERANCE


@pytest.mark.parametrize("shape", RESPONSES[1:], ids=str)
def test_attention_of_responses_on_this_device_is_plain_attention(shape: tuple) -> None:
    case, arguments = responses(*shape)
    assert max(case.errors(run_responses(arguments))) < TOLERANCE


@pytest.mark.parametrize("shape", [*SEQUENCES, (1, 1100, 4, 2, 8, True)], ids=str)
def test_blocked_attention_is_plain_attention(shape: tuple) -> None:
    assert max(sequence(*shape).errors(functools.partial(blocked_attention, causal=shape[-1]))) < TOLERANCE


def test_blocked_attention_keeps_no_scores() -> None:
    """Temporaries of its gradient grow with the length, and those of plain attention with its square."""
    case, temporaries = sequence(1, 1100, 4, 2, 8, True), {}
    for run in (blocked_attention, jax.nn.dot_product_attention):
        causal = {"causal": True} if run is blocked_attention else {"is_causal": True}
        grad = jax.jit(jax.grad(lambda q, k, v: jnp.sum(run(q, k, v, **causal) ** 2), argnums=(0, 1, 2)))  # noqa: B023
        temporaries[run] = grad.lower(*case.arrays).compile().memory_analysis().temp_size_in_bytes
    assert temporaries[blocked_attention] < temporaries[jax.nn.dot_product_attention] / 4


@pytest.mark.parametrize("shape", SEQUENCES, ids=str)
def test_splash_attention_is_plain_attention(shape: tuple) -> None:
    assert max(sequence(*shape).errors(functools.partial(run_splash, causal=shape[-1]))) < TOLERANCE


@pytest.mark.parametrize("shape", RESPONSES, ids=str)
def test_splash_attention_of_responses_is_plain_attention(shape: tuple) -> None:
    case, arguments = responses(*shape)
    run = functools.partial(splash_responses, interpret=True)
    assert max(case.errors(run_responses(arguments, run))) < TOLERANCE


def test_blocked_attention_in_bfloat16_is_plain_attention_but_for_rounding() -> None:
    case = sequence(2, 300, 4, 2, 24, True, dtype="bfloat16")
    assert max(case.errors(functools.partial(blocked_attention, causal=True))) < HALF_TOLERANCE


def test_splash_attention_in_bfloat16_is_plain_attention_but_for_rounding() -> None:
    case = sequence(2, 37, 4, 2, 24, True, dtype="bfloat16")
    assert max(case.errors(functools.partial(run_splash, causal=True))) < HALF_TOLERANCE
    case, arguments = responses(*RESPONSES[1], dtype="bfloat16")
    run = functools.partial(splash_responses, interpret=True)
    assert max(case.errors(run_responses(arguments, run))) < HALF_TOLERANCE


@pytest.mark.parametrize(("device", "platform"), [("nvidia[0-9]*", "cuda"), ("accel*", "tpu")])
def test_kernels_on_a_real_device_are_plain_attention(device: str, platform: str) -> None:
    if not any(Path("/dev").glob(device)):
        pytest.skip(f"there is no /dev/{device} here, so {platform} kernels cannot run")
    script = Path(__file__).with_name("attention_cases.py")
    environment = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Choice


def test_blocks_pad_little() -> None:
    assert [block_size(n) for n in (1, 128, 129, 300, 512, 1025, 1408)] == [128, 128, 256, 384, 512, 384, 512]


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "width", "kernel"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 128, "cudnn"),
        ("NVIDIA A100-SXM4-40GB", "8.0", "bfloat16", 64, "cudnn"),
        ("NVIDIA B200", "10.0", "float16", 96, "cudnn"),
        ("NVIDIA H100 80GB HBM3", "9.0", "float32", 64, "xla"),
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 136, "xla"),
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 20, "xla"),
        ("Tesla T4", "7.5", "bfloat16", 64, "xla"),
        ("NVIDIA T4", "7.5", "bfloat16", 64, "xla"),
        ("AMD Instinct MI300X", "gfx942", "bfloat16", 64, "xla"),
    ],
)
def test_gpus_use_cudnn_where_it_takes_the_shapes(
    monkeypatch: pytest.MonkeyPatch, kind: str, capability: str, dtype: str, width: int, kernel: str
) -> None:
    device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(module.jax, "devices", lambda: [device])
    assert best_kernel(jnp.dtype(dtype), width) == kernel


def test_the_mesh_decides_before_the_device() -> None:
    assert best_kernel(jnp.dtype("bfloat16"), 64) == "xla"
    for platform, kernel in (("tpu", "splash"), ("gpu", "xla"), ("cpu", "xla")):
        device = AbstractDevice(device_kind="some", num_cores=1, platform=platform)
        mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert best_kernel(jnp.dtype("float32"), 64) == kernel


# Sharding and compilation


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("groups", "heads", "kv_heads"), [(4, 4, 2), (1, 3, 3)], ids=["split", "whole"])
def test_each_device_attends_in_its_own_groups_and_heads(groups: int, heads: int, kv_heads: int) -> None:
    """And in all of them where they are shared, as a blank tile is, or odd in number, as InternViT-6B's heads are."""
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        case = sequence(groups, 9, heads, kv_heads, 8, True)
        assert max(case.errors(functools.partial(attention, causal=True))) < TOLERANCE
        case, arguments = responses([(2, 3)] * groups, 1, 5, heads, kv_heads, 8)
        assert max(case.errors(run_responses(arguments))) < TOLERANCE


@pytest.mark.usefixtures("interpreted")
def test_kernels_exchange_nothing() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    arrays = tuple(jax.device_put(x, split) for x in sequence(8, 9, 4, 2, 8, True).arrays)

    def total(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(attention(*arrays, causal=True) ** 2)

    with jax.set_mesh(mesh):
        hlo = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*arrays).compile().as_text()
    assert not re.search(COLLECTIVES, hlo)


@pytest.mark.parametrize(("length", "causal"), [(64, True), (33, True), (33, False)])
@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)], ids=["one device", "several"])
def test_cudnn_is_in_the_program_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, mesh: MeshConfig, length: int, causal: bool
) -> None:
    """Lowered where there is neither a GPU nor cuDNN, whose version JAX asks for."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(module, "best_kernel", lambda dtype, width: "cudnn")
    q, k, v = (jax.ShapeDtypeStruct((8, length, heads, 64), jnp.bfloat16) for heads in (4, 2, 2))

    def total(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(attention(*arrays, causal=causal).astype(jnp.float32) ** 2)

    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    with jax.set_mesh(make_mesh(mesh, devices)):
        traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, k, v)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = set(re.findall(r"__cudnn\$\w+", text))
    assert calls == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    masks = set(re.findall(r"mask_type\\22: \\22(\w+?)\\22", text))
    assert masks == {"CAUSAL" if causal else "PADDING"}


@pytest.mark.skipif(not has_libtpu(), reason="compiling for a TPU needs libtpu, the extra `plan`")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_splash_attention_compiles_for_a_tpu(dtype: str) -> None:
    mesh = make_mesh(MeshConfig(2, 1, 2), topology_devices(parse_topology("v5e-4")))

    def lower(case, run: Callable) -> str:
        def total(*arrays: jax.Array) -> jax.Array:
            return jnp.sum(run(*arrays).astype(jnp.float32) ** 2)

        placed = jax.NamedSharding(mesh, jax.P("data"))
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for x in case.arrays]
        with jax.set_mesh(mesh):
            graded = jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(arrays)))))
            return graded.lower(*arrays).compile().as_text()

    case, arguments = responses([(20, 30)] * 2, 1, 40, 2, 2, 128, dtype=dtype)
    programs = [lower(case, run_responses(arguments))]
    programs.append(lower(sequence(2, 300, 4, 2, 24, True, dtype=dtype), functools.partial(attention, causal=True)))
    programs.append(lower(sequence(2, 1025, 2, 2, 64, False, dtype=dtype), functools.partial(attention, causal=False)))
    for hlo in programs:
        kernels = re.findall(r'%splash_mha_(fwd|dq|dkv)_.* custom_call_target="tpu_custom_call"', hlo)
        assert sorted(kernels) == ["dkv", "dq", "fwd"]
