"""Collectives that are read from a compiled program are those it runs, as often as it runs them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mmrm_jax.plan.hlo import Collective, by_kind, collectives


@pytest.fixture(scope="module")
def hlo() -> str:
    """Collectives in a loop, in a loop within a loop, and in none, on a 2 x 4 mesh."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def body(x, _):
        x = jax.lax.psum(x, "b") * 0.5
        return x, jax.lax.all_gather(x, "a").sum()

    def inner(x, _):
        return jax.lax.ppermute(x, "b", [(0, 1), (1, 2), (2, 3), (3, 0)]) + 1, None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=3)[0] + 1, None

    def program(x):
        x, sums = jax.lax.scan(body, x, None, length=5)
        x, _ = jax.lax.scan(outer, x, None, length=2)
        return jax.lax.psum_scatter(x, "b", tiled=True), sums

    mapped = jax.shard_map(program, mesh=mesh, in_specs=P(), out_specs=(P("b"), P()), check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct((16, 8), jnp.float32)).compile().as_text()


def test_collectives_are_counted_as_often_as_they_run(hlo: str) -> None:
    found = {c.kind: c for c in collectives(hlo, 8)}
    assert found == {  # x is 16 * 8 float32: 512 bytes
        "all-reduce": Collective("all-reduce", 512, 4, 5),
        "all-gather": Collective("all-gather", 1024, 2, 5),
        "collective-permute": Collective("collective-permute", 512, 8, 6),
        "reduce-scatter": Collective("reduce-scatter", 128, 4, 1),
    }
    # In a ring of n, a device receives (n - 1) / n of what is gathered, of what is scattered, and both to all-reduce.
    assert by_kind(found.values()) == {
        "all-reduce": {"count": 5, "bytes": 5 * 2 * 512 * 3 / 4},
        "all-gather": {"count": 5, "bytes": 5 * 1024 / 2},
        "collective-permute": {"count": 6, "bytes": 6 * 512},
        "reduce-scatter": {"count": 1, "bytes": 512 * 3 / 4},
    }


def test_trip_counts_are_also_read_from_the_condition(hlo: str) -> None:
    bare = "\n".join(line.split(", backend_config=")[0] for line in hlo.splitlines())
    assert "known_trip_count" in hlo and "known_trip_count" not in bare
    assert sorted(collectives(bare, 8), key=str) == sorted(collectives(hlo, 8), key=str)
    with pytest.raises(ValueError, match=r"the trip count of loop while\S* cannot be read"):
        collectives(bare.replace("constant(3)", "constant(-3)"), 8)


# What a TPU makes of an asynchronous all-gather: a start, a part inside a loop that it overlaps with, and an end.
TPU = """HloModule step

%start (p.0: bf16[1,8]) -> bf16[4,8] {
  %p.0 = bf16[1,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[4,8]{1,0:T(8,128)} all-gather(%p.0), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'x'}
}

%part (p.1: bf16[1,8]) -> bf16[4,8] {
  %p.1 = bf16[1,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[4,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['x'=4,'y'=2] {'x'}
}

%body (p.2: (s32[], bf16[1,8])) -> (s32[], bf16[1,8]) {
  %p.2 = (s32[], /*index=1*/bf16[1,8]{1,0}) parameter(0)
  %x = bf16[1,8]{1,0} get-tuple-element(%p.2), index=1
  %fusion.1 = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%part
  %all-reduce.1 = (f32[3]{0}, f32[2]{0}) all-reduce(%x, %x), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add
}

%condition (p.3: (s32[], bf16[1,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(24)
  %p.3 = (s32[], bf16[1,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main (a: bf16[1,8]) -> bf16[4,8] {
  %a = bf16[1,8]{1,0} parameter(0)
  %fusion.2 = bf16[4,8]{1,0} fusion(%a), kind=kCustom, calls=%start
  %while.1 = (s32[], bf16[1,8]{1,0}) while(%a), condition=%condition, body=%body
  %permute.1 = (bf16[1,8]{1,0}, bf16[1,8]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=9
  ROOT %permute.2 = bf16[1,8]{1,0} collective-permute-done(%permute.1)
}
"""


def test_an_asynchronous_collective_counts_once() -> None:
    assert set(collectives(TPU, 8)) == {
        Collective("all-gather", 64, 4, 1),
        Collective("all-reduce", 20, 4, 24),
        Collective("collective-permute", 16, 8, 1),
    }


@pytest.mark.parametrize(
    ("result", "root", "payload"),
    [
        ("bf16[8,8]{1,0}", "bf16[2,8]{1,0} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,8}", 32),
        ("(bf16[8,8]{1,0}, bf16[4,8]{1,0})", "(bf16[2,8]{1,0}, bf16[1,8]{1,0}) tuple(%s.1, %s.2)", 48),
    ],
    ids=["one", "several"],
)
def test_a_slice_of_an_all_reduce_is_a_reduce_scatter(result: str, root: str, payload: int) -> None:
    text = f"""HloModule step

%scatter (p.0: bf16[8,8]) -> bf16[2,8] {{
  %p.0 = bf16[8,8]{{1,0}} parameter(0)
  %r = {result} all-reduce(%p.0), channel_id=2, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  %s.1 = bf16[2,8]{{1,0}} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={{2,8}}
  %s.2 = bf16[1,8]{{1,0}} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={{1,8}}
  ROOT %out = {root}
}}

ENTRY %main (a: bf16[8,8]) -> bf16[2,8] {{
  %a = bf16[8,8]{{1,0}} parameter(0)
  ROOT %fusion = bf16[2,8]{{1,0}} fusion(%a), kind=kCustom, calls=%scatter
}}
"""
    assert collectives(text, 4) == [Collective("reduce-scatter", payload, 4, 1)]
    apart = text.replace(root, "bf16[8,8]{1,0} add(%r, %r)")
    assert [c.kind for c in collectives(apart, 4)] == ["all-reduce"]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=4,'b'=8] {'b'}", 8),
        ("mesh['a'=4,'b'=8], device_ids=([4,8]T(1,0)) {'a','b':(2)4}", 16),
        ("mesh[a=4,b=8], device_ids=(3,1,2,0) {a,b}", 32),
        ("{}", 64),
    ],
)
def test_every_form_of_groups_is_read(groups: str, size: int) -> None:
    text = TPU.replace("mesh['x'=4,'y'=2] {'x'}", groups)
    assert {c.group for c in collectives(text, 64) if c.kind == "all-gather"} == {size}


def test_unknown_groups_are_an_error() -> None:
    with pytest.raises(ValueError, match="the groups of a collective cannot be read .*: by moonlight"):
        collectives(TPU.replace("[2,4]<=[8]", "by moonlight"), 8)
