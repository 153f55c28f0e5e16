"""`mmrm train --profile`: what it counts, and what it says of a real run."""

import json

import jax
import numpy as np
import pytest
from commands import FAST, run, write_pairs
from tiny_models import MODEL, is_response, make_batch, random_group

from mmrm_jax.eval.profile import count_tokens, describe
from mmrm_jax.eval.profile_trace import Time, part_of, read_trace, scopes
from mmrm_jax.plan.hardware import CHIPS, find_chip

pytestmark = pytest.mark.usefixtures("one_device")

HLO = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %dot.3 = f32[8]{0} dot(%p, %p), metadata={op_name="jit(step)/jvp(decoder)/dot_general" source_file="x.py"}
  ROOT %fusion.1 = f32[8]{0} fusion(%dot.3), kind=kLoop, metadata={op_name="jit(step)/optimizer/add"}
}
"""


def test_instructions_and_where_they_come_from() -> None:
    assert scopes(HLO) == {
        "p": "",
        "dot.3": "jit(step)/jvp(decoder)/dot_general",
        "fusion.1": "jit(step)/optimizer/add",
    }


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(step)/jvp(decoder)/dot_general", ("decoder", "matrix products, forward")),
        ("jit(step)/transpose(jvp(decoder))/while/body/dot_general", ("decoder", "matrix products, backward")),
        ("jit(step)/jvp(vision)/transpose", ("vision", "the rest, forward")),
        ("jit(step)/jvp(vision)/while/body/attention/dot_general", ("vision", "attention, forward")),
        ("jit(step)/optimizer/mul", ("optimizer", "all")),
        ("jit(step)/div", ("other", "all")),
    ],
)
def test_parts_and_kinds(scope: str, part: tuple[str, str]) -> None:
    assert part_of(scope) == part


def xspace(programs: dict[int, dict[str, int]]) -> bytes:
    """A trace of one thread: the microseconds of operations by program."""
    names = sorted({name for operations in programs.values() for name in operations})
    metadata = [f'stat_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}' for i, name in enumerate(names, 10)]
    events = [
        f"events {{ duration_ps: {us * 10**6} stats {{ metadata_id: 1 ref_value: {names.index(name) + 10} }}"
        f" stats {{ metadata_id: 2 uint64_value: {program} }} }}"
        for program, operations in programs.items()
        for name, us in operations.items()
    ]
    named = [
        f'stat_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}' for i, n in ((1, "hlo_op"), (2, "program_id"))
    ]
    text = "planes { lines { " + " ".join(events) + " } " + " ".join(named + metadata) + " }"
    return jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)


def test_only_the_traced_step_is_told_apart_by_parts(tmp_path) -> None:
    """A step of another shape, and evaluation, share names of operations with it, and have others."""
    file = tmp_path / "a.xplane.pb"
    step, evaluation = {"dot.3": 5, "fusion.1": 2}, {"dot.3": 40, "reduce.9": 1}
    file.write_bytes(xspace({7: step, 8: evaluation, 9: {"dot.3": 30, "fusion.1": 9, "fusion.2": 1}}))
    assert read_trace(file, scopes(HLO)) == [
        Time("decoder", "matrix products, forward", pytest.approx(5e-6)),
        Time("optimizer", "all", pytest.approx(2e-6)),
    ]
    file.write_bytes(xspace({8: evaluation}))
    assert read_trace(file, scopes(HLO)) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_tokens_that_hold_data(seed: int, micro_batches: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [random_group(MODEL, rng, i, tiles=1, responses=int(rng.integers(1, 5))) for i in range(3)]
    batch = make_batch(groups, MODEL, num_groups=4, micro_batches=micro_batches, extra=2, rows=2)
    held, padded = count_tokens(batch)
    responses = int(is_response(batch.responses).sum())
    assert responses == sum(len(r) for g in groups for r in g.responses)
    assert held == sum(len(c.tokens) for g in groups for c in g.prefixes.values()) + 2 * responses
    assert padded == sum(p.tokens.size for p in batch.prefixes.values()) + 2 * batch.responses.tokens.size > held


def test_devices_are_found_by_what_jax_calls_them() -> None:
    names = {"TPU v5 lite": "v5e", "TPU v5p": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "h100"}
    assert {name: find_chip(name) for name in names} == {name: CHIPS[chip] for name, chip in names.items()}
    assert find_chip("cpu") is None


def test_a_profiled_run_says_where_its_time_went(capsys, tmp_path) -> None:
    file, out = write_pairs(tmp_path, "train", 24), tmp_path / "run"
    settings = [a.replace("--train.", "--") for a in FAST] + ["--data.buckets", 1, "--steps", 8]
    status, text = run(capsys, "train", "--data", file, "--out", out, *settings, "--profile", "--json", out / "r.json")
    assert status == 0, text
    found = json.loads((out / "profile" / "profile.json").read_text())
    assert json.loads((out / "r.json").read_text())["profile"] == found
    assert (found["steps"], found["shapes"], found["recompilations"]) == (8, 1, 0) and found["timed_steps"] == 2
    assert found["compile_seconds"] > 0 and 0 < found["mfu"] < 1 and 0 <= found["waiting_share"] < 1
    assert 0 < found["padding"] < 1 and list((out / "profile").rglob("*.xplane.pb"))
    seconds = {(t["part"], t["kind"]): t["seconds"] for t in found["time"]}
    assert min(seconds.values()) > 0
    for part in ("vision", "projector", "decoder"):
        assert (part, "matrix products, forward") in seconds
    assert ("decoder", "matrix products, backward") in seconds and ("optimizer", "all") in seconds
    assert not any(part == "vision" and "backward" in kind for part, kind in seconds)  # the tower is frozen
    assert "of tokens are padding" in text and "waiting for data" in text and "Where the time of the traced" in text
    assert "(2 steps that compiled nothing)" in text
    assert "8 steps all with compilation in them" in describe(found | {"timed_compilation": True, "timed_steps": 8})
    # The profile changes nothing of what is trained.
    run(capsys, "train", "--data", file, "--out", tmp_path / "plain", *settings)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "plain")
    ]
    assert losses[0] == losses[1]
