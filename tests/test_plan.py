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
from tiny_models import MODEL

from mmrm_jax.config import DataConfig, DecoderConfig, LoraConfig, MeshConfig, ModelConfig, TrainConfig, VisionConfig
from mmrm_jax.plan.compile import DoesNotFit, compile_step, has_libtpu
from mmrm_jax.plan.costs import Part, Product, train_costs
from mmrm_jax.plan.estimate import cast_bytes, device_bytes, estimate_collectives, saved_activations
from mmrm_jax.plan.hardware import CHIPS, Topology, parse_topology
from mmrm_jax.plan.hlo import by_kind, collectives
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
        {"proxy_input": "blank", "data": DataConfig(features=Path("features"))},
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
    assert costs().model_flops / 4 < costs().device_flops < costs().model_flops / 2  # patches are not split


def test_products_in_float32_run_at_half_the_peak_on_gpus_alone() -> None:
    for name, share in (("h100", 0.5), ("h200", 0.5), ("v5e", 1.0), ("v5p", 1.0), ("v6e", 1.0)):
        assert CHIPS[name].peak_in("float32") == share * CHIPS[name].peak_in("bfloat16") == share * CHIPS[name].peak


def test_what_is_of_the_compute_dtype_is_not_copied() -> None:
    shard = jax.sharding.NamedSharding(abstract_mesh(MeshConfig(1, 8, 1), ONE_HOST), jax.sharding.PartitionSpec("fsdp"))
    wide, half = (jax.ShapeDtypeStruct((16, 4), dtype, sharding=shard) for dtype in ("float32", "bfloat16"))
    assert cast_bytes({"a": wide, "b": half}, "bfloat16") == 2 * 4 * 2
    assert cast_bytes({"a": wide, "b": half}, "float32") == 2 * 4 * 4
    assert cast_bytes({"b": half}, "bfloat16") == 0


def test_flash_attention_skips_what_is_masked_and_computes_scores_again() -> None:
    weight = Product(8, 8, 8)
    whole, half = Product(8, 4, 8, weight=False), Product(8, 4, 8, weight=False, causal=True)
    trained, frozen = Part((), True, True, remat="full"), Part((), False, False, remat="full")
    for flash, want in ((False, [4, 4, 4, 1, 1, 1]), (True, [4, 5.5, 2.75, 1, 1, 0.5])):
        assert [part.computed(p, flash) for part in (trained, frozen) for p in (weight, whole, half)] == want


def test_on_tpus_attention_keeps_no_scores() -> None:
    """Neither those of all layers that plain code saves for the backward pass, nor those of the layer it is in."""
    shape = DataShape(tiles=1, prompt=384, response=128, responses=1)
    topologies = ONE_HOST, parse_topology("v5e-8")
    planned = [Job(UNROLLED, TrainConfig(batch_size=8, objective="text_only"), shape, t) for t in topologies]
    (gpu,), (tpu,) = (search(j, every=False, attempts=0) for j in planned)
    scores = 4 * UNROLLED.decoder.num_heads * shape.prefix_of("absent", UNROLLED) ** 2  # of one group and layer
    assert gpu.memory.temporaries - tpu.memory.temporaries > (UNROLLED.decoder.num_layers + 3) * scores
    assert gpu.costs.model_flops == tpu.costs.model_flops
    assert gpu.costs.device_bytes > tpu.costs.device_bytes


# Collectives


@pytest.mark.parametrize("rank", [0, 4])
def test_what_fsdp_gathers_and_scatters(rank: int) -> None:
    """Everything forward; backward again what lies behind something trained; the proxy sees no image."""
    config = TrainConfig(batch_size=8, mesh=MeshConfig(1, 8, 1), lora=LoraConfig(rank=rank), micro_batches=1)
    program = build_program(MODEL, config, 10, abstract_mesh(config.mesh, ONE_HOST))

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


@pytest.mark.parametrize("remat", ["none", "full"])
def test_what_data_and_tensor_parallel_devices_reduce_is_what_the_compiled_step_does(remat) -> None:
    """Each of the two, of about equal size here; the CPU's compiler, without a TPU's fusions."""
    planned = job(UNROLLED, mesh=MeshConfig(4, 1, 2), remat=remat, objective="standard")
    program = build_program(UNROLLED, planned.config, 10)
    compiled = program.lower_train_step(program.abstract, placed_batch(planned, program)).compile()
    found = [c for c in collectives(compiled.as_text(), 8) if c.kind == "all-reduce"]
    estimated = estimate_collectives(program, UNROLLED, planned.config, SHAPE)
    for group in (4, 2):
        moved = [sum(c.moved for c in each if c.group == group) for each in (found, estimated)]
        assert moved[1] == pytest.approx(moved[0], rel=0.03), group


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
    kept = abstract_batch(SHAPE, MODEL, views, groups=8, micro_batches=2, features="bfloat16")  # type: ignore[arg-type]
    for branch, groups, tiles in (("primary", 4, 2), ("proxy", 1, 1)):
        features = kept.prefixes[branch].features
        assert kept.prefixes[branch].pixels is None
        assert (features.shape, features.dtype) == ((2, groups, tiles, visual, 4 * MODEL.vision.width), "bfloat16")
    assert (batch.responses.tokens.shape, batch.comparisons.index.shape) == ((2, 4, 3, 32), (2, 4, 2))


# Search


def test_every_mesh_and_micro_batching_is_a_candidate() -> None:
    assert {(m.data, m.fsdp, m.tensor) for m in meshes(4)} == {
        (4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4),
    }  # fmt: skip
    assert all(m.data * m.fsdp * m.tensor == 256 and m.tensor <= 8 for m in meshes(256))
    assert MeshConfig(2, 3, 1) in list(meshes(6)) and MeshConfig(1, 2, 3) in list(meshes(6))
    assert [micro for mesh, micro in candidates(job(batch_size=24)) if mesh == MeshConfig(4, 2, 1)] == [1, 3]
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
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("mmrm_jax.plan.run.has_libtpu", lambda: False)
    status, text = run(capsys, "plan", "--topology", "v5e-4", *TINY, "--no-search", "--mesh.fsdp", "2")
    assert status == 0 and 'pip install ".[plan]"' in text
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
