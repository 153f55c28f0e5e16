"""The same global batch gives the same step on any mesh, in any number of micro-batches, with any padding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny_models import DECODER, VISION, flat, make_batch, random_group, random_params, relative_errors

from mmrm_jax.config import LoraConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from mmrm_jax.sharding import (
    RULES,
    batch_shardings,
    check_heads,
    make_mesh,
    param_shardings,
    partition_spec,
    put_batch,
)
from mmrm_jax.train.program import Program, build_program
from mmrm_jax.train.state import TrainState, abstract_model
from mmrm_jax.types import Comparison

MODEL = ModelConfig(vision=VISION, decoder=dataclasses.replace(DECODER, num_layers=1))

# The largest epsilon that still lets the second step move everything: Adam would blow up rounding in tiny gradients.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, clip_norm=1.0, eps=1e-3)
TOLERANCE = 1e-5  # relative to the largest entry of the same parameter's gradient; for metrics relative to their value


def groups(proxy_tiles: int = 0) -> list:
    """Eight ragged groups: 1-4 responses, 0-2 tiles, with margins and ties, two of them without a comparison."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(8):
        n = 1 + i % 4
        # Not the fourth against the third: they are identical, and the sign of a margin of 0 is rounding.
        pairs = [(a, b) for a in range(n) for b in range(a) if (a, b) != (3, 2)]
        chosen = [pairs[j] for j in rng.permutation(len(pairs))[:3]]
        comparisons = [Comparison(a, b, margin=0.3 * (j == 1), tie=j == 2) for j, (a, b) in enumerate(chosen)]
        made.append(
            random_group(MODEL, rng, i, tiles=i % 3, responses=n, comparisons=comparisons, proxy_tiles=proxy_tiles)
        )
    return made


def program(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int], config: TrainConfig) -> Program:
    """`build_program` on the first data * fsdp * tensor devices."""
    devices = jax.devices()[: int(np.prod(sizes))]
    monkeypatch.setattr("mmrm_jax.train.program.make_mesh", functools.partial(make_mesh, devices=devices))
    return build_program(MODEL, dataclasses.replace(config, mesh=MeshConfig(*sizes)), steps=4)


def gradients(state: TrainState) -> dict[str, np.ndarray]:
    """Clipped gradients of the first step, from Adam's first moment (1 - b1) * g."""
    moments = state.opt_state[1][0].mu
    return {f"{b}/{k}": np.asarray(v) / (1 - OPTIMIZER.b1) for b, mu in moments.items() for k, v in flat(mu).items()}


def parameters(state: TrainState) -> dict[str, np.ndarray]:
    return {f"{b}/{k}": np.asarray(v) for b, params in state.params.items() for k, v in flat(params).items()}


def away_from_zero(state: TrainState) -> TrainState:
    """Adapters whose B is not 0, so that A has a gradient too."""

    def one(path: tuple, x: jax.Array) -> jax.Array:
        values = 0.1 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
        return jax.device_put(values, x.sharding) if "lora_b" in jax.tree_util.keystr(path) else x

    return dataclasses.replace(state, params=jax.tree_util.tree_map_with_path(one, state.params))


def run(
    monkeypatch, sizes, *, objective="shortcut_aware", micro_batches=1, num_groups=8, extra=0, remat="none", rank=0
):
    """(metrics of two steps, gradients of the first, parameters after the second).

    The proxy sees nothing beside a primary, and a blank tile where it is alone."""
    proxy = "blank" if objective == "text_only" else "absent"
    config = TrainConfig(
        objective=objective,
        proxy_input=proxy,
        batch_size=num_groups,
        micro_batches=micro_batches,
        optimizer=OPTIMIZER,
        remat=remat,
        lora=LoraConfig(rank, targets=("decoder", "vision", "projector")),
    )
    compiled = program(monkeypatch, sizes, config)
    batch = make_batch(
        groups(proxy_tiles=int(proxy == "blank")),
        MODEL,
        num_groups=num_groups,
        micro_batches=micro_batches,
        views={"primary": "multimodal", "proxy": proxy},
        extra=extra,
    )
    placed = compiled.put(batch)
    state = away_from_zero(compiled.init(random_params(MODEL, 1), config))
    state, first = compiled.train_step(state, placed)
    grads = gradients(state)
    state, second = compiled.train_step(state, placed)
    assert int(state.step) == 2
    return jax.device_get((first, second)), grads, parameters(state)


@pytest.fixture(scope="module")
def reference():
    """One device, one micro-batch, the tightest padding, nothing computed twice; by objective and rank of adapters."""
    with pytest.MonkeyPatch.context() as patch:
        yield functools.cache(lambda objective, rank=0: run(patch, (1, 1, 1), objective=objective, rank=rank))


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 1, 1), {"micro_batches": 4, "extra": 1}),
        ((1, 1, 2), {"micro_batches": 2}),
        ((8, 1, 1), {"num_groups": 16, "remat": "dots"}),
        ((2, 2, 2), {"objective": "text_only", "micro_batches": 2, "num_groups": 16}),
        ((1, 4, 2), {"micro_batches": 4, "num_groups": 16, "extra": 2}),
        ((2, 2, 2), {"rank": 2, "remat": "full"}),
    ],
    ids=lambda x: "x".join(map(str, x)) if isinstance(x, tuple) else " ".join(f"{k}={v}" for k, v in x.items()),
)
def test_the_same_step_on_any_mesh(reference, monkeypatch: pytest.MonkeyPatch, sizes: tuple, options: dict) -> None:
    want_metrics, want_grads, want_params = reference(
        options.get("objective", "shortcut_aware"), options.get("rank", 0)
    )
    metrics, grads, params = run(monkeypatch, sizes, **options)
    for got, want in zip(metrics, want_metrics):
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)
    errors = relative_errors(grads, want_grads)
    assert max(errors.values()) < TOLERANCE, sorted(errors.items(), key=lambda e: -e[1])[:5]
    errors = relative_errors(params, want_params)
    assert max(errors.values()) < TOLERANCE, sorted(errors.items(), key=lambda e: -e[1])[:5]


def test_the_reference_step_moves_everything(reference) -> None:
    (first, second), grads, params = reference("shortcut_aware")
    assert all(np.any(g) for g in grads.values())
    assert first["grad_norm"] > OPTIMIZER.clip_norm  # so that clipping is part of what agrees
    before = flat(random_params(MODEL, 1))
    assert all(np.any(p != before[name.split("/", 1)[1]]) for name, p in params.items())
    assert first["primary/loss"] == pytest.approx(second["primary/loss"], rel=1e-6)  # the first step's rate is 0


# What the rule table means for each kind of parameter; stacked layers have a leading axis that is never split.
EXPECTED = {
    "decoder/embedding": P(None, ("tensor", "fsdp")),
    "decoder/layers/q/kernel": P(None, "fsdp", "tensor"),
    "decoder/layers/q/bias": P(None, "tensor"),
    "decoder/layers/k/kernel": P(None, "fsdp", "tensor"),
    "decoder/layers/o/kernel": P(None, "tensor", "fsdp"),
    "decoder/layers/up/kernel": P(None, "fsdp", "tensor"),
    "decoder/layers/down/kernel": P(None, "tensor", "fsdp"),
    "decoder/layers/norm1/scale": P(None, None),
    "decoder/norm/scale": P(None),
    "projector/fc1/kernel": P("fsdp", "tensor"),
    "projector/fc2/kernel": P("tensor", "fsdp"),
    "vision/patch/kernel": P(None, "fsdp"),
    "vision/position_embedding": P(None, "fsdp"),
    "vision/layers/q/kernel": P(None, "fsdp", "tensor"),
    "vision/layers/proj/kernel": P(None, "tensor", "fsdp"),
    "vision/layers/proj/bias": P(None, None),
    "vision/layers/fc1/kernel": P(None, "fsdp", "tensor"),
    "vision/layers/fc2/kernel": P(None, "tensor", "fsdp"),
    "score": P(None),
}


def test_parameters_and_moments_lie_as_the_rules_say(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(freeze=("vision",))
    state = program(monkeypatch, (2, 2, 2), config).init(random_params(MODEL, 1), config)
    everything = flat(state.frozen) | flat(state.params["primary"])
    for name, spec in EXPECTED.items():
        x = everything[name]
        assert x.sharding.spec == spec, name
        ways = [{None: 1, "fsdp": 2, "tensor": 2, ("tensor", "fsdp"): 4}[axis] for axis in spec]
        assert x.addressable_shards[0].data.shape == tuple(n // w for n, w in zip(x.shape, ways)), name
    adam = state.opt_state[1][0]
    for moments in (adam.mu, adam.nu):
        for branch, params in state.params.items():
            values = flat(moments[branch])
            for name, x in flat(params).items():
                assert values[name].sharding == x.sharding, (branch, name)


def test_batches_are_split_by_group_and_comparisons_are_whole() -> None:
    mesh = make_mesh(MeshConfig(2, 2, 2))
    batch = make_batch(
        groups(), MODEL, num_groups=16, micro_batches=2, views={"primary": "multimodal", "proxy": "blank"}
    )
    shardings = batch_shardings(batch, mesh, micro=True, shared={"proxy"})
    split = P(None, ("data", "fsdp"))
    assert {s.spec for s in jax.tree.leaves(shardings.responses)} == {shardings.group_index.spec} == {split}
    assert shardings.prefixes["primary"].pixels.spec == split
    assert shardings.prefixes["proxy"].pixels.spec == P()  # one blank tile for all groups
    assert {s.spec for s in jax.tree.leaves(shardings.comparisons)} == {P()}

    # In a process's share of one group, a shape does not tell whose the image is.
    one = batch_shardings(jax.tree.map(lambda x: x[:, :1], batch), mesh, micro=True, shared={"proxy"})
    assert one.prefixes["primary"].pixels.spec == split and one.prefixes["proxy"].pixels.spec == P()


def test_rules_that_collide_raise() -> None:
    assert partition_spec(("mlp", "embed")) == P("tensor", "fsdp")
    with pytest.raises(ValueError, match=r"'mlp', 'heads'.*one mesh axis"):
        partition_spec(("mlp", "heads"))
    with pytest.raises(ValueError, match="one mesh axis"):
        partition_spec(("batch", "embed"))  # the batch is split over fsdp too
    with pytest.raises(KeyError, match="colour"):
        partition_spec(("colour",))
    partition_spec(("mlp", "heads"), dict(RULES, heads=None))


def test_a_dimension_the_mesh_does_not_divide_raises_with_its_name() -> None:
    config = dataclasses.replace(MODEL, decoder=dataclasses.replace(DECODER, mlp_width=22, vocab_size=33))
    wrong = (
        r"decoder/layers/down/kernel \(2, 22, 16\): 22 does not divide into 4 parts \(tensor=4\); it does into 2: make "
    )
    with pytest.raises(ValueError, match=wrong + "tensor of the mesh smaller, and data larger instead"):
        param_shardings(abstract_model(config)[1], make_mesh(MeshConfig(2, 1, 4)))
    # No vocabulary has to divide: only the columns of its table are split.
    param_shardings(abstract_model(config)[1], make_mesh(MeshConfig(2, 2, 2)))


def test_a_parameter_without_axes_raises() -> None:
    with nnx.use_eager_sharding(False):
        params = nnx.State({"a": nnx.Param(np.zeros((2, 2)), out_sharding=("embed",)), "b": nnx.Param(np.zeros(2))})
    with pytest.raises(ValueError, match=r"parameter a of shape \(2, 2\)"):
        param_shardings(params, make_mesh(MeshConfig()))
    with pytest.raises(ValueError, match=r"parameter b .*None"):
        param_shardings(nnx.State({"b": params["b"]}), make_mesh(MeshConfig()))


def test_a_mesh_of_the_wrong_size_raises() -> None:
    assert make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2)).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    for wrong in (MeshConfig(3, 1, 1), MeshConfig(-1, 3, 1), MeshConfig(2, 2, 1), MeshConfig(-1, 16, 1)):
        with pytest.raises(ValueError, match="needs a product of 8"):
            make_mesh(wrong)
    for field in ({"data": 0}, {"fsdp": 0}, {"tensor": -1}, {"dcn_data": 0}):
        ((name, value),) = field.items()
        with pytest.raises(ValueError, match=f"MeshConfig.{name} is {value}; it must be at least 1"):
            MeshConfig(**field)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh is laid out by. `Mesh` takes no such thing, so the grid alone is looked at."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize(("by", "platform"), [("slice", "gpu"), ("process", "cpu")])
def test_only_the_data_axis_crosses_the_data_centre(monkeypatch: pytest.MonkeyPatch, by: str, platform: str) -> None:
    """JAX calls each host of GPUs a slice, too; those InfiniBand joins, and any axis may span them."""
    monkeypatch.setattr("mmrm_jax.sharding.Mesh", lambda grid, names, **_: grid)
    # Two granules of four, whose devices come interleaved.
    devices = [Device(i, i % 2 * (by == "process"), i % 2 * (by == "slice"), platform) for i in range(8)]
    grid = make_mesh(MeshConfig(-1, 2, 1, dcn_data=2), devices)
    assert grid.shape == (4, 2, 1)
    assert [[d.id % 2 for d in row.ravel()] for row in grid] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    for wrong in (MeshConfig(1, 8, 1, dcn_data=2), MeshConfig(4, 2, 1, dcn_data=4), MeshConfig(8, 1, 1, dcn_data=8)):
        with pytest.raises(ValueError, match=r"dcn_data=\d must divide data=\d.* slices .*dcn_data=1 is for"):
            make_mesh(wrong, devices)
    assert make_mesh(MeshConfig(1, 8, 1), devices).shape == (1, 8, 1)
    if by == "slice":  # what no setting says must not put FSDP on the slow network
        with pytest.raises(ValueError, match=r"2 slices, .* set dcn_data=2"):
            make_mesh(MeshConfig(1, 8, 1), [dataclasses.replace(device, platform="tpu") for device in devices])


def test_a_mesh_that_cuts_through_heads_raises() -> None:
    mesh = make_mesh(MeshConfig(1, 2, 4))
    with pytest.raises(
        ValueError, match=r"tensor=4 does not divide decoder.num_kv_heads 2 and vision.num_heads 2: .*divides 2"
    ):
        check_heads(MODEL, mesh)
    check_heads(MODEL, make_mesh(MeshConfig(2, 2, 2)))
    # An odd number of vision heads is not split; the tower's MLPs are.
    odd = dataclasses.replace(MODEL, vision=dataclasses.replace(VISION, width=12, num_heads=3))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    check_heads(odd, mesh)
    specs = {"/".join(map(str, p)): s.spec for p, s in nnx.to_flat_state(param_shardings(abstract_model(odd)[1], mesh))}
    assert specs["vision/layers/q/kernel"] == P(None, "fsdp", None)
    assert specs["vision/layers/fc1/kernel"] == P(None, "fsdp", "tensor")


def test_a_batch_the_mesh_does_not_divide_raises() -> None:
    with pytest.raises(
        ValueError, match=r"a micro-batch has 2 groups, which mesh data=4 \* fsdp=2 does not divide: .* of 8"
    ):
        put_batch(make_batch(groups(), MODEL, micro_batches=4), make_mesh(MeshConfig(4, 2, 1)), micro=True)
