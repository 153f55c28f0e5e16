"""`mmrm plan`: what is counted is what XLA counts, what is read from a compiled program is what it does."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from commands import run
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny_models import MODEL

from mmrm_jax.config import DecoderConfig, LoraConfig, MeshConfig, ModelConfig, TrainConfig, VisionConfig
from mmrm_jax.plan.compile import DoesNotFit, compile_step, has_libtpu
from mmrm_jax.plan.costs import train_costs
from mmrm_jax.plan.estimate import device_bytes, estimate_collectives, saved_activations
from mmrm_jax.plan.hardware import CHIPS, Topology, parse_topology
from mmrm_jax.plan.hlo import Collective, by_kind, collectives
from mmrm_jax.plan.run import find_model
from mmrm_jax.plan.search import Job, abstract_mesh, candidates, describe, meshes, placed_batch, search
from mmrm_jax.plan.shapes import DataShape, abstract_batch
from mmrm_jax.sharding import make_mesh
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.program import build_program

SHAPE = DataShape(tiles=2, prompt=32, response=32, responses=3)
# Three layers each are unrolled, so that XLA's count, which takes the body of a loop once, has them all.
UNROLLED = ModelConfig(
    VisionConfig(image_size=16, patch_size=2, width=128, mlp_width=256, num_layers=3, num_heads=4),
    DecoderConfig(vocab_size=64, width=128, mlp_width=384, num_layers=3, num_heads=4, num_kv_heads=2, head_width=32),
)
ONE_HOST = Topology("8xh100", CHIPS["h100"], 8, None)


def job(model: ModelConfig = MODEL, topology: Topology = ONE_HOST, **config) -> Job:
    return Job(model, TrainConfig(**{"batch_size": 8, **config}), SHAPE, topology)


# FLOPs


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"freeze": (), "remat": "dots"},
        {"remat": "full", "proxy_input": "blank"},
        {"objective": "standard", "freeze": ("vision", "decoder")},
    ],
    ids=str,
)
def test_flops_are_those_that_xla_counts(config: dict) -> None:
    planned = job(UNROLLED, mesh=MeshConfig(8, 1, 1), **config)
    program = build_program(UNROLLED, planned.config, 10)
    lowered = program.lower_train_step(program.abstract, placed_batch(planned, program))
    views = program.views
    costs = train_costs(
        UNROLLED, planned.config, SHAPE, views, program.abstract.params, batch_ways=1, tensor_ways=1, state_bytes=0.0
    )
    # XLA counts norms, softmax and the optimiser, too: at these widths 2 to 3 %, at real ones next to nothing.
    assert 0.96 < costs.device_flops / lowered.cost_analysis()["flops"] < 1
    assert (costs.device_flops > costs.model_flops) == (planned.config.remat != "none")


def test_costs_scale_with_depth_batch_and_devices() -> None:
    def costs(model: ModelConfig = MODEL, **config):
        planned = job(model, mesh=MeshConfig(8, 1, 1), **config)
        program = build_program(model, planned.config, 10)
        ways = {"batch_ways": 2, "tensor_ways": 2, "state_bytes": 100.0}
        views = program.views
        return train_costs(model, planned.config, SHAPE, views, program.abstract.params, **ways)

    deep = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, num_layers=4))
    deepest = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, num_layers=6))
    assert costs(deepest).model_flops - costs(deep).model_flops == costs(deep).model_flops - costs().model_flops > 0
    assert costs(batch_size=16).model_flops == 2 * costs().model_flops
    assert costs(micro_batches=2).model_flops == costs().model_flops
    assert costs(micro_batches=2).device_bytes > costs().device_bytes  # weights are read once more
    assert costs().model_flops / 4 < costs().device_flops < costs().model_flops / 2  # the projector is not split


# Collectives


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


@pytest.mark.parametrize("rank", [0, 4])
def test_what_fsdp_gathers_and_scatters(rank: int) -> None:
    """Everything forward; backward again what lies behind something trained; the proxy sees no image."""
    config = TrainConfig(batch_size=8, mesh=MeshConfig(1, 8, 1), lora=LoraConfig(rank=rank), micro_batches=1)
    program = build_program(MODEL, config, 10, abstract_mesh(config.mesh))

    def held(tree) -> float:
        return device_bytes(tree) / 4

    trained, frozen = program.abstract.params, program.abstract.frozen
    own = sum(held(branch) for branch in trained.values())
    passes = 2 * own + held(frozen["vision"])
    scattered = own + sum(held(branch["decoder"]) for branch in trained.values())
    if rank:  # both decoders have adapters at the bottom, which only the primary's projector and tower lie below
        passes += held(frozen["projector"]) + 2 * 2 * held(frozen["decoder"])
    found = by_kind(estimate_collectives(program, MODEL, config, SHAPE))
    assert found["all-gather"]["bytes"] == pytest.approx(passes * 8 * 4 * 7 / 8)
    assert found["reduce-scatter"]["bytes"] == pytest.approx(scattered * 4 * 7)
    assert "all-reduce" not in found


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


# Hardware


@pytest.mark.parametrize(
    ("name", "devices", "libtpu"),
    [
        ("v5p-64", 32, "v5p:4x4x2"),
        ("v5p-8", 4, "v5p:2x2x1"),
        ("v5p-128", 64, "v5p:4x4x4"),
        ("v5e-256", 256, "v5e:16x16"),
        ("v5e-8", 8, "v5e:4x2"),
        ("v6e-64", 64, "v6e:8x8"),
        ("8xH200", 8, None),
    ],
)
def test_topology_names(name: str, devices: int, libtpu: str | None) -> None:
    topology = parse_topology(name)
    assert (topology.devices, topology.libtpu_name) == (devices, libtpu)
    assert topology.chip.name in name.lower()


@pytest.mark.parametrize("name", ["v4-8", "v5e-512", "v6e-48", "v5p-4", "v5e-1", "16xh100", "h100", ""])
def test_other_topologies_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"topology '{name}' is .*; known: v5e-N and v6e-N .*8xh200"):
        parse_topology(name)


# Memory


def test_state_is_counted_part_by_part() -> None:
    program = build_program(MODEL, TrainConfig(mesh=MeshConfig(2, 2, 2)), 10)
    params = program.init(jax.tree.map(lambda x: jnp.zeros(x.shape), _parameters()), TrainConfig()).params
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert device_bytes(program.abstract.params) == held
    counters = 2 * 4  # Adam's and the schedule's
    assert device_bytes(program.abstract.opt_state) == 2 * held + counters


def _parameters():
    from mmrm_jax.train.state import abstract_model

    return abstract_model(MODEL)[1]


def test_rematerialisation_keeps_each_layers_input_alone() -> None:
    def saved(remat: str):
        config = TrainConfig(batch_size=8, remat=remat)  # type: ignore[arg-type]
        return saved_activations(build_program(UNROLLED, config, 10), UNROLLED, config, SHAPE)

    none, dots, full = saved("none"), saved("dots"), saved("full")
    assert none.whole + none.split > dots.whole + dots.split > full.whole + full.split
    tokens = 2 * SHAPE.prompt + SHAPE.tiles * UNROLLED.visual_tokens_per_tile + 2 * SHAPE.responses * SHAPE.response
    inputs = 4 * tokens * UNROLLED.decoder.width * UNROLLED.decoder.num_layers
    assert inputs <= full.whole < 3 * inputs  # beside them: embeddings, the projector, the final norm


def test_a_batch_has_the_shapes_of_a_real_one() -> None:
    views = {"primary": "multimodal", "proxy": "blank"}
    batch = abstract_batch(SHAPE, MODEL, views, groups=8, micro_batches=2)  # type: ignore[arg-type]
    visual = MODEL.visual_tokens_per_tile
    assert batch.prefixes["primary"].tokens.shape == (2, 4, 32 + 2 * visual)
    assert batch.prefixes["primary"].pixels.shape == (2, 4, 2, 8, 8, 3)
    assert batch.prefixes["proxy"].tokens.shape == (2, 4, 32 + visual)
    assert batch.prefixes["proxy"].pixels.shape == (2, 1, 1, 8, 8, 3)
    assert (batch.responses.shape, batch.comparisons.index.shape) == ((2, 4, 3, 32), (2, 4, 2))


# Search


def test_every_mesh_and_micro_batching_is_a_candidate() -> None:
    assert {(m.data, m.fsdp, m.tensor) for m in meshes(4)} == {
        (4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4),
    }  # fmt: skip
    assert all(m.data * m.fsdp * m.tensor == 256 and m.tensor <= 8 for m in meshes(256))
    tried = list(candidates(job(batch_size=16)))
    assert len(tried) == len(set(tried))
    assert {micro for mesh, micro in tried if mesh == MeshConfig(8, 1, 1)} == {1, 2}
    assert {micro for mesh, micro in tried if mesh == MeshConfig(1, 2, 4)} == {1, 2, 4, 8}
    assert (MeshConfig(8, 1, 1), 1) in list(candidates(job(batch_size=4)))  # to say why not


def test_what_fits_comes_first_and_the_rest_says_why_not() -> None:
    rows = search(job(batch_size=4), every=True, attempts=0)
    usable = [row for row in rows if row.problem is None]
    assert usable and rows[: len(usable)] == usable
    steps = [row.times.step for row in usable]
    assert steps == sorted(steps) and all(0 < row.mfu < 1 for row in usable)
    reasons = {(row.mesh.data, row.mesh.fsdp, row.mesh.tensor): row.problem for row in rows if row.problem}
    assert reasons[8, 1, 1] == "4 groups do not split evenly 8 ways in 1 parts"
    assert "decoder.num_kv_heads 2" in reasons[1, 1, 8]

    small = dataclasses.replace(ONE_HOST, chip=dataclasses.replace(ONE_HOST.chip, hbm=1e3))
    (row,) = search(job(topology=small, mesh=MeshConfig(fsdp=2)), every=False, attempts=0)
    assert describe(row) == "data=4 fsdp=2 tensor=1, 1 micro-batch(es)"
    assert "by analysis, it needs" in row.problem and row.memory.total > 1e3
    with pytest.raises(ValueError, match="does not multiply to the 8 devices of 8xh100"):
        search(job(mesh=MeshConfig(3, 1, 1)), every=False, attempts=0)


def test_candidates_are_compiled_until_one_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def fake(job: Job, row):
        compiled.append(row)
        problem = "compiled, it needs 20G of 16G" if len(compiled) < 3 else None
        return dataclasses.replace(row, compiled=True, problem=problem)

    monkeypatch.setattr("mmrm_jax.plan.search.compile_candidate", fake)
    rows = search(job(), every=True, attempts=8)
    assert [c.times.step for c in compiled] == sorted(c.times.step for c in compiled)
    assert len(compiled) == 3
    assert rows[0] == dataclasses.replace(compiled[2], compiled=True)
    assert [row.problem for row in rows if row.compiled] == [None] + ["compiled, it needs 20G of 16G"] * 2


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("RESOURCE_EXHAUSTED: x. Used 19.93G of 15.75G hbm. Exceeded by 4.18G.", "it needs 19.93G of 15.75G"),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (97.48G) "
            "exceeds available HBM (95.74G).",
            "temporaries alone need 97.48G of 95.74G",
        ),
        ("RESOURCE_EXHAUSTED: no more\ndetails", "RESOURCE_EXHAUSTED: no more"),
    ],
)
def test_the_compilers_verdict_is_one_line(message: str, expected: str) -> None:
    def lower(*_):
        raise RuntimeError(message)

    with pytest.raises(DoesNotFit) as error:
        compile_step(SimpleNamespace(lower_train_step=lower, abstract=None), None)  # type: ignore[arg-type]
    assert str(error.value).removeprefix("compiled, ") == expected


# The command

TINY = [
    "--model",
    MODEL_DIR,
    "--batch-size",
    "8",
    "--shape.tiles",
    "1",
    "--shape.prompt",
    "16",
    "--shape.response",
    "8",
]


def test_gpus_are_planned_by_analysis(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    status, text = run(capsys, "plan", "--topology", "8xh100", *TINY, "--json", tmp_path / "plan.json")
    assert status == 0 and "by analysis only" in text and "libtpu" not in text
    assert "what does not fit, and why" in text and "what fits, fastest first" in text
    result = json.loads((tmp_path / "plan.json").read_text())
    best = result["candidates"][0]
    assert best["problem"] is None and not best["compiled"]
    memory = best["memory"]
    assert memory["total"] == math.fsum(v for k, v in memory.items() if k != "total")
    assert best["times"]["overlapped"] <= best["times"]["step"]
    assert result["config"]["compute_dtype"] == "bfloat16" and result["config"]["proxy_input"] == "blank"


def test_without_libtpu_the_extra_is_named_and_the_analysis_printed(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmrm_jax.plan.run.has_libtpu", lambda: False)
    status, text = run(capsys, "plan", "--topology", "v5e-4", *TINY, "--no-search", "--mesh.fsdp", "2")
    assert status == 0 and 'pip install "mmrm-jax[plan]"' in text
    assert "4 x v5e" in text and "2 x 2 x 1" in text and "arithmetic intensity" in text


def test_mistakes_are_one_message(capsys) -> None:
    for arguments, message in (
        (["--topology", "v9-8"], "topology 'v9-8' is not known"),
        (["--topology", "8xh100", "--model", "9B"], "'9B' is neither a checkpoint folder nor one of InternVL2-1B"),
        (["--topology", "8xh100", *TINY, "--objective", "best"], "objective 'best' is not known"),
        (["--topology", "8xh100", *TINY, "--shape.tiles", "0"], "DataShape.tiles is 0; it must be at least 1"),
    ):
        status, text = run(capsys, "plan", *arguments)
        assert status == 2 and message in " ".join(text.split()), text


def test_models_go_by_name_or_folder() -> None:
    assert find_model("8B") == find_model("InternVL2-8B")
    assert find_model(str(MODEL_DIR)).decoder.num_layers < 8


@pytest.mark.skipif(not has_libtpu(), reason="compiling for a TPU needs libtpu, the extra `plan`")
def test_a_step_compiles_for_a_tpu(capsys, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    status, text = run(capsys, "plan", "--topology", "v5e-4", *TINY, "--no-search", "--mesh.fsdp", "4", "--json", file)
    assert status == 0, text
    (row,) = json.loads(file.read_text())["candidates"]
    assert row["compiled"] and row["problem"] is None and row["memory"]["code"] > 0
    assert row["collectives_by_kind"]["all-gather"]["bytes"] > 0


def test_the_mesh_of_a_plan_is_that_of_training() -> None:
    rows = search(job(mesh=MeshConfig(-1, 2, 2)), every=False, attempts=0)
    assert make_mesh(MeshConfig(-1, 2, 2)).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert rows[0].mesh == MeshConfig(2, 2, 2)
