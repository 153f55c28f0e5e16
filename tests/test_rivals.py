"""Rival objectives: numbers worked out by hand, what their gradients reach, what they make of a real step."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import comparisons, seen
from tiny_models import MODEL, make_batch, one_micro, random_group, random_params, with_numbers

from mmrm_jax.config import TEXT_VIEWS, OptimizerConfig, TrainConfig
from mmrm_jax.eval.matrix import forward_passes
from mmrm_jax.objectives import MODIFIERS, OBJECTIVES, Forward, Objective, Seen, find_objective
from mmrm_jax.objectives.images import _of_another
from mmrm_jax.objectives.spec import parse_objective
from mmrm_jax.train.program import build_program
from mmrm_jax.train.state import HEADS
from mmrm_jax.train.step import response_lengths
from mmrm_jax.types import Comparison

pytestmark = pytest.mark.usefixtures("one_device")

DOCS = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
LN2, LN3 = math.log(2), math.log(3)
SURE = LN3  # a margin with p = 3/4: L = ln 4/3, and ln 4 the other way round
LOW, HIGH = math.log(4 / 3), math.log(4)


def loss(spec: str, margins: dict[str, list[float]], **fields) -> np.ndarray:
    """Losses of pairs with these margins."""
    given = {b: jnp.asarray(d, jnp.float32) for b, d in margins.items()}
    n = len(next(iter(given.values())))
    objective = find_objective(spec)
    fields = {"memory": jnp.zeros((n, objective.remembers))} | fields
    return np.asarray(
        jax.jit(lambda s: objective.terms(s).loss)(dataclasses.replace(seen(given, comparisons(n)), **fields))
    )


@pytest.mark.usefixtures("strict_numerics")
@pytest.mark.parametrize(
    ("spec", "margins", "expected"),
    [
        # (1 - 3/4)^2 ln 4/3 and (3/4)^2 ln 4; gamma = 0 is the loss itself
        ("focal", {"primary": [SURE, -SURE]}, [LOW / 16, 9 * HIGH / 16]),
        ("focal:gamma=0", {"primary": [SURE]}, [LOW]),
        ("debiased_focal", {"primary": [0, 0], "proxy": [SURE, -SURE]}, [LN2 / 16 + LOW, 9 * LN2 / 16 + HIGH]),
        # d + b = 0, and 2 ln 3: ln(1 + 1/9)
        ("product_of_experts", {"primary": [SURE, SURE], "proxy": [-SURE, SURE]}, [LN2 + HIGH, math.log(10 / 9) + LOW]),
        # W = ln 4 / (ln 4 + ln 4/3), GCE = (1 - (1/4)^0.7) / 0.7
        ("lff", {"primary": [SURE], "proxy": [-SURE]}, [HIGH / (HIGH + LOW) * LOW + (1 - 0.25**0.7) / 0.7]),
        ("lff:q=0", {"primary": [SURE], "proxy": [-SURE]}, [HIGH / (HIGH + LOW) * LOW + HIGH]),
        ("lff:weighted=false", {"primary": [SURE], "proxy": [SURE]}, [LOW + (1 - 0.75**0.7) / 0.7]),
        ("lff:q=0,proxy=multimodal", {"primary": [0.0], "biased": [0.0]}, [LN2 / 2 + LN2]),
        # min and twice the product of 1/2 and ln 4 / (ln 4 + ln 2) = 2/3
        ("dual_sfc", {"primary": [0], "proxy": [0], "image": [-SURE]}, [LN2 / 2 + LN2 + HIGH]),
        ("dual_sfc:combine=product", {"primary": [0], "proxy": [0], "image": [-SURE]}, [2 / 3 * LN2 + LN2 + HIGH]),
        ("self_ablation:weight=0.5", {"primary": [SURE], "ablated": [2.0]}, [LOW + 2.0]),
        ("self_ablation:weight=2,hinge=3", {"primary": [SURE, 9], "ablated": [1, 1]}, [LOW + 2 * (4 - SURE), 0.000123]),
        ("modality_dropout", {"primary": [SURE]}, [LOW]),
        ("listwise", {"primary": [SURE, -SURE]}, [LOW, HIGH]),
        # Lt^2 / (Lt^2 + L^2) with L = Lt / 5 and so on: temperature 1/2 squares the losses
        (
            "shortcut_aware:temperature=0.5",
            {"primary": [SURE], "proxy": [-SURE]},
            [HIGH**2 / (HIGH**2 + LOW**2) * LOW + HIGH],
        ),
        ("shortcut_aware:epsilon=0.5", {"primary": [0], "proxy": [0]}, [(0.25 + LN2 / (0.5 + 2 * LN2)) * LN2 + LN2]),
        # Weights 1/2 and 0.82814 / their mean
        (
            "shortcut_aware:normalise=true",
            {"primary": [0, SURE], "proxy": [0, -SURE]},
            [0.5 / 0.66407 * LN2 + LN2, 0.82814 / 0.66407 * LOW + HIGH],
        ),
        ("standard+margin:m=1.0986123", {"primary": [SURE]}, [LN2]),
        # Rewards are (d, 0): weight * d^2 / 2
        ("standard+centring:weight=0.5", {"primary": [SURE]}, [LOW + LN3**2 / 4]),
        ("standard+margin:m=1.0986123+centring:weight=0.5", {"primary": [SURE]}, [LN2 + LN3**2 / 4]),
    ],
)
def test_losses_by_hand(spec: str, margins: dict, expected: list[float]) -> None:
    np.testing.assert_allclose(loss(spec, margins), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("strict_numerics")
def test_rubi_by_hand() -> None:
    # r = (4, 2) masked with sigmoid(ln 3) = 3/4 and sigmoid(0) = 1/2: d = 3 - 1, and b = ln 3
    rewards = {"primary": jnp.array([[4.0, 2.0]]), "proxy": jnp.array([[LN3, 0.0]])}
    terms = find_objective("rubi").terms(Seen(rewards, comparisons(1)))
    np.testing.assert_allclose(terms.loss, [math.log1p(math.exp(-2)) + LOW], rtol=1e-6)
    np.testing.assert_allclose(terms.branch_losses["primary"], [math.log1p(math.exp(-2.0))], rtol=1e-6)


@pytest.mark.usefixtures("strict_numerics")
def test_listwise_is_plackett_luce() -> None:
    # r = ln (3, 2, 1), a full ranking: P = 3/6 * 2/3; its factors are shared by two comparisons and one.
    c = comparisons(4, index=[[0, 1], [0, 2], [1, 2], [0, 0]], mask=[True, True, True, False])
    found = find_objective("listwise").terms(Seen({"primary": jnp.log(jnp.array([[3.0, 2.0, 1.0]]))}, c)).loss
    np.testing.assert_allclose(found[:3], [LN2 / 2, LN2 / 2, math.log(3 / 2)], rtol=1e-6)
    # With a target margin of ln 2 on a pair of equals: P = 1 / (1 + 2)
    wide = comparisons(1, margin=[LN2])
    found = find_objective("listwise").terms(Seen({"primary": jnp.zeros((1, 2))}, wide)).loss
    np.testing.assert_allclose(found, [LN3], rtol=1e-6)
    # A tie has the pairwise loss, and is no rival in another factor.
    tied = comparisons(2, index=[[0, 1], [0, 2]], tie=[False, True])
    found = find_objective("listwise").terms(Seen({"primary": jnp.zeros((1, 3))}, tied)).loss
    np.testing.assert_allclose(found, [LN2, LN2], rtol=1e-6)


@pytest.mark.usefixtures("strict_numerics")
def test_contrast_of_images_by_hand() -> None:
    # Own reward 0, another image's ln 3: -log 1/(1 + 3); where the other image is the same there is no such term.
    rewards = {"primary": jnp.zeros((2, 2)), "other1": jnp.full((2, 2), LN3)}
    given = Seen(rewards, comparisons(2), changed={"other1": jnp.array([True, False])})
    np.testing.assert_allclose(find_objective("image_contrast").terms(given).loss, [LN2 + HIGH, LN2], rtol=1e-6)
    # JS of p = 3/4 and 1/4 (middle 1/2): ln 2 - H(1/4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    given = Seen(
        {"primary": jnp.array([[LN3, 0], [LN3, 0]]), "permuted": jnp.array([[0, LN3], [0, LN3]])},
        comparisons(2),
        changed={"permuted": jnp.array([True, False])},
    )
    found = find_objective("mcr:weight=2").terms(given).loss
    np.testing.assert_allclose(found, [LOW - 2 * (LN2 - entropy), LOW], rtol=1e-5)


@pytest.mark.usefixtures("strict_numerics")
def test_the_weaker_modality_is_learnt_again_by_hand() -> None:
    # Blank image ln 4/3, no prompt ln 4: the image is weaker, by ln 3, which counts as 1; then the other way round, and
    # with losses ln 2 and ln 4/3 text is weaker by ln 3/2.
    margins = {"primary": [SURE, SURE, 0], "ablated": [SURE, -SURE, 0], "unprompted": [-SURE, SURE, SURE]}
    expected = [LOW + HIGH, LOW + HIGH, LN2 + math.log(3 / 2) * LN2]
    np.testing.assert_allclose(loss("arm", margins), expected, rtol=1e-5)
    np.testing.assert_allclose(loss("arm:weight=0", margins), [LOW, LOW, LN2], rtol=1e-6)

    # Neither the gap nor the stronger modality has a gradient.
    given = {name: jnp.asarray([d[0]], jnp.float32) for name, d in margins.items()}
    total = lambda given: jnp.sum(find_objective("arm").terms(seen(given, comparisons(1))).loss)  # noqa: E731
    grads = jax.grad(total)(given)
    assert float(grads["ablated"][0]) == 0 and float(grads["unprompted"][0]) == pytest.approx(-0.75)


@pytest.mark.usefixtures("strict_numerics")
def test_environments_by_hand() -> None:
    # Risks ln 2 (twice), (ln 4 + ln 4/3) / 2 = ln 4 / sqrt 3, and one that padding alone is of.
    c = comparisons(5, mask=[True, True, True, True, False])
    c = dataclasses.replace(c, given={"environment": jnp.array([0.0, 0, 2, 2, 1])})
    given = seen({"primary": jnp.asarray([0, 0, SURE, -SURE, 9.0])}, c)
    other = math.log(4 / math.sqrt(3))
    expected = (LN2 + other) / 2 + 3 * ((LN2 - other) / 2) ** 2
    assert float(given.mean(find_objective("v_rex:beta=3").terms(given).loss)) == pytest.approx(expected, rel=1e-6)
    # With uneven environments they still count alike; of a single one it is standard training.
    uneven = dataclasses.replace(c, given={"environment": jnp.array([0.0, 0, 0, 2, 1])})
    given = dataclasses.replace(given, comparisons=uneven)
    first = (2 * LN2 + LOW) / 3
    assert float(given.mean(find_objective("v_rex:beta=0").terms(given).loss)) == pytest.approx((first + HIGH) / 2)
    alone = dataclasses.replace(given, comparisons=dataclasses.replace(c, given={"environment": jnp.ones(5)}))
    np.testing.assert_allclose(find_objective("v_rex").terms(alone).loss[:4], [LN2, LN2, LOW, HIGH], rtol=1e-6)

    # Group DRO over text right and wrong in each of two environments: means ln 2, none, ln 4/3, ln 4.
    two = dataclasses.replace(c, given={"environment": jnp.array([0.0, 0, 1, 1, 1])})
    given = seen({"primary": given.margin("primary"), "proxy": jnp.array([1.0, 1, 1, -1, 1])}, two)
    objective = find_objective("group_dro:step=1,environments=2")
    terms = objective.terms(dataclasses.replace(given, state=jnp.asarray(objective.state)))
    q = np.array([2, 1, 4 / 3, 4])
    np.testing.assert_allclose(terms.state, q / q.sum(), rtol=1e-6)
    proxy = float(given.mean(given.loss("proxy")))
    expected = (2 * LN2 + 4 / 3 * LOW + 4 * HIGH) / q.sum() + proxy
    assert float(given.mean(terms.loss)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="environments is 0; it must be at least 1"):
        find_objective("group_dro:environments=0")


@pytest.mark.usefixtures("strict_numerics")
def test_group_dro_by_hand() -> None:
    # Text right: losses ln 2 (twice, mean ln 2); text wrong: ln 4. q = (1/2 e^ln2, 1/2 e^ln4) = (1/3, 2/3) at step 1.
    given = seen(
        {"primary": jnp.array([0.0, 0.0, -LN3, 5.0]), "proxy": jnp.array([1.0, 1.0, -1.0, 1.0])},
        comparisons(4, mask=[True, True, True, False]),
    )
    terms = find_objective("group_dro:step=1").terms(dataclasses.replace(given, state=jnp.array([0.5, 0.5])))
    np.testing.assert_allclose(terms.state, [1 / 3, 2 / 3], rtol=1e-6)
    mean = float(given.mean(terms.loss))
    proxy = (2 * math.log1p(math.exp(-1)) + math.log1p(math.e)) / 3
    assert mean == pytest.approx(LN2 / 3 + 2 * HIGH / 3 + proxy, rel=1e-6)


@pytest.mark.usefixtures("strict_numerics")
def test_heads_by_hand() -> None:
    pooled = {"primary": jnp.array([[[1.0, 0.0], [0.0, 1.0]]])}
    heads = {"score": jnp.array([[LN3], [0.0]]), "length": jnp.array([[0.0], [2.0]]), "gate": jnp.zeros((2, 1))}
    heads["variance"] = jnp.zeros((2, 2))
    given = Seen({"primary": jnp.array([[LN3, 0.0]]), "proxy": jnp.zeros((1, 2))}, comparisons(1))
    given = dataclasses.replace(given, pooled=pooled, heads=heads, lengths=jnp.array([[3, 9]]))
    # odin: d = ln 3 - 2; rho of the score with length is -1, of the other head 1; the heads are orthogonal.
    found = find_objective("odin").terms(given).loss
    np.testing.assert_allclose(found, [math.log1p(math.exp(2 - LN3)) + 1 - 1], rtol=1e-5)
    tilted = dataclasses.replace(given, heads=heads | {"length": jnp.array([[0.5], [2.0]])})
    more = find_objective("odin:correlation=0,orthogonality=2").terms(tilted).loss
    np.testing.assert_allclose(more, [math.log1p(math.exp(1.5 - LN3)) + 2 * LN3 / 2], rtol=1e-5)
    # learned_mixin: g = softplus(0) = ln 2, b = ln 3: d + g b, and the entropy of sigmoid(g b).
    gated = dataclasses.replace(given, rewards={"primary": jnp.zeros((1, 2)), "proxy": jnp.array([[LN3, 0.0]])})
    p = 1 / (1 + math.exp(-LN2 * LN3))
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    found = find_objective("learned_mixin:penalty=0.5").terms(gated).loss
    np.testing.assert_allclose(found, [-math.log(p) + LOW + entropy / 2], rtol=1e-5)
    # inform: with sigma = 1, KL = |h|^2 / 2 = 1/2 each; with sigma = 0 there is no noise.
    keyed = dataclasses.replace(given, keys=jax.random.split(jax.random.key(0), 1))
    quiet = dataclasses.replace(keyed, heads=heads | {"variance": jnp.full((2, 2), -200.0)})
    free = find_objective("inform:beta=0")
    np.testing.assert_allclose(free.terms(quiet).loss, [LOW], rtol=1e-6)
    noisy = free.terms(keyed).loss
    assert abs(float(noisy[0]) - LOW) > 1e-3
    np.testing.assert_allclose(find_objective("inform:beta=2").terms(keyed).loss - noisy, [1.0], rtol=1e-5)


@pytest.mark.usefixtures("strict_numerics")
def test_length_residual_takes_the_line_out() -> None:
    # r = 2 * length + (1, -1, -1, 1): the line has slope 2, and what is left of margins is that of the rest.
    lengths, rest = jnp.array([[1, 2], [3, 4]]), jnp.array([[1.0, -1.0], [-1.0, 1.0]])
    given = Seen({"primary": 2.0 * lengths.astype(jnp.float32) + rest}, comparisons(2), lengths)
    found = find_objective("standard+length_residual").terms(given)
    np.testing.assert_allclose(found.loss, [math.log1p(math.exp(-2)), math.log1p(math.exp(2))], rtol=1e-5)


PROXIED = ("debiased_focal", "product_of_experts", "lff", "dual_sfc", "group_dro")


@pytest.mark.parametrize("spec", [*PROXIED, "rubi", "shortcut_aware:stop_gradient=false"])
def test_what_gradients_reach(spec: str) -> None:
    """The proxy's gradient does not know the primary, but in RUBi and without SFC's stop-gradient."""
    rng = np.random.default_rng(1)
    objective = find_objective(spec)
    draw = lambda: {b: jnp.asarray(rng.normal(size=(5, 2)), jnp.float32) for b in objective.branches}  # noqa: E731
    rewards, other = draw(), draw()
    other["proxy"] = jnp.sort(other["proxy"], axis=1)[:, ::-1]  # always right, and group DRO asks no more
    state = jnp.asarray(objective.state) if objective.state else None

    def total(rewards):
        memory = jnp.zeros((5, objective.remembers))
        return jnp.sum(objective.terms(Seen(rewards, comparisons(5), state=state, memory=memory)).loss)

    grads, moved = jax.grad(total)(rewards), jax.grad(total)(rewards | {"primary": other["primary"]})
    apart = spec in PROXIED
    assert np.array_equal(grads["proxy"], moved["proxy"]) == apart
    by_proxy = jax.grad(total)(rewards | {"proxy": other["proxy"]})
    assert not np.array_equal(by_proxy["primary"], grads["primary"])  # but the primary's knows the proxy
    for g in jax.tree.leaves(grads):
        assert np.all(np.isfinite(g)) and np.any(g)


def test_losses_stay_finite_where_margins_do_not_fit_any_probability() -> None:
    for name in OBJECTIVES:
        objective = find_objective(name)
        if objective.heads or objective.extra:
            continue
        ends = jnp.array([[1e4, 0.0], [0.0, 1e4], [0.0, 0.0]])
        c = comparisons(3, tie=[False, False, True])
        if objective.environments:
            c = dataclasses.replace(c, given={"environment": jnp.array([0.0, 1.0, 1.0])})
        if objective.before is not None:
            c = dataclasses.replace(c, given={b: jnp.array([1e4, -1e4, 1e4]) for b in objective.before.given})
        state = jnp.asarray(objective.state) if objective.state else None

        def total(rewards, objective=objective, c=c, state=state):
            memory = jnp.zeros((3, objective.remembers))
            return jnp.sum(objective.terms(Seen(rewards, c, state=state, memory=memory)).loss)

        value, grads = jax.value_and_grad(total)({b: ends for b in objective.branches})
        assert np.isfinite(value), name
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads)), name


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_with_options() -> None:
    assert find_objective("focal:gamma=1").name == "focal:gamma=1"
    assert find_objective("lff:q=1,proxy=multimodal").views("absent") == {
        "primary": "multimodal",
        "biased": "multimodal",
    }
    assert find_objective("standard+length_residual").couples and not find_objective("standard").couples


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("standrd", "objective 'standrd' is not known; do you mean standard? known: arm, caption_only"),
        ("standard+x", "modifier 'x' is not known; known: centring, length_residual, margin"),
        ("focal:beta=1", "focal has no option 'beta'; its options and their defaults: gamma=2.0"),
        ("standard:a=1", "its options and their defaults: none"),
        ("focal:gamma=high", "focal:gamma is 'high'; it must be a finite number"),
        ("focal:gamma=nan", "it must be a finite number"),
        ("image_contrast:negatives=1.5", "it must be a whole number"),
        ("lff:weighted=1", "it must be true or false"),
        ("lff:proxy=image", "must be text or multimodal"),
        ("modality_dropout:p=2", "must be from 0 to 1"),
        ("dual_sfc:combine=sum", "must be least or product"),
    ],
)
def test_names_that_mean_nothing(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        find_objective(spec)
    assert message in str(error.value)


# --- through a real step --------------------------------------------------------------------------------------------


def a_batch(objective: Objective, micro_batches: int = 1):
    rng = np.random.default_rng(7)
    won = [(Comparison(0, 1), Comparison(2, 0)), (Comparison(1, 2, tie=True),), (Comparison(2, 1),)]
    groups = [random_group(MODEL, rng, i, tiles=1 + i % 2, responses=3, comparisons=c) for i, c in enumerate(won)]
    inputs = objective.inputs("absent")
    groups = [
        dataclasses.replace(
            g, prefixes={n: g.prefixes["proxy" if v in TEXT_VIEWS else "primary"] for n, v in inputs.items()}
        )
        for g in groups
    ]
    if objective.before is not None:
        margins = {b: rng.normal(size=2).astype(np.float32) for b in objective.before.given}
        groups = [
            dataclasses.replace(g, given={b: m[: len(g.comparisons)] for b, m in margins.items()}) for g in groups
        ]
    if objective.environments:
        groups = [
            dataclasses.replace(g, given={"environment": np.full(len(g.comparisons), i % 2)})
            for i, g in enumerate(groups)
        ]
    if objective.remembers:
        groups = with_numbers(groups)
    if "ablated" in inputs:  # one blank tile, with fewer visual tokens
        blank = random_group(MODEL, rng, 0, tiles=1, responses=1).prefixes["primary"]
        groups = [dataclasses.replace(g, prefixes=g.prefixes | {"ablated": blank}) for g in groups]
    return make_batch(groups, MODEL, num_groups=8, views=inputs, micro_batches=micro_batches)


def a_step(spec: str, steps: int = 2):
    config = TrainConfig(objective=spec, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0))
    program = build_program(MODEL, config, 10)
    state = program.init(random_params(MODEL, 1), config)
    before = jax.device_get(state.params)
    for _ in range(steps):
        state, metrics = program.train_step(state, program.put(a_batch(program.objective)))
    return program, before, state, metrics


@pytest.mark.parametrize(
    "spec", ["odin", "inform", "group_dro", "self_ablation", "modality_dropout:p=1", "mcr", "v_rex"]
)
def test_a_step_trains_what_it_should(spec: str) -> None:
    program, before, state, metrics = a_step(spec)
    assert np.isfinite(metrics["loss"]) and float(metrics["comparisons"]) == 4
    assert (HEADS in before) == bool(program.objective.heads)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
    if spec == "modality_dropout:p=1":
        white = a_batch(program.objective).prefixes["primary"].pixels
        assert white.max() <= 255 and np.any(white != 255)  # whitened in the step, not in the batch
    assert any(jax.tree.leaves(moved["primary"]["decoder"])) and all(jax.tree.leaves(moved.get(HEADS, {})))
    if spec == "group_dro":
        carried = np.asarray(state.carried)
        assert carried.sum() == pytest.approx(1) and not np.array_equal(carried, [0.5, 0.5])
    out = program.eval_step(
        state.params, state.frozen, program.put(jax.tree.map(lambda x: x[0], a_batch(program.objective)), micro=False)
    )
    assert set(out) == {f"{b}/{what}" for b in program.objective.branches for what in ("rewards", "margins")}


def test_every_objective_traces() -> None:
    """Shapes alone: nothing is compiled."""
    for spec in (
        *OBJECTIVES,
        "group_dro:environments=2",
        "standard+length_residual",
        "lff:proxy=multimodal",
        "image_contrast:negatives=2",
    ):
        program = build_program(MODEL, TrainConfig(objective=spec), 10)
        with jax.set_mesh(program.mesh):
            step = program.train_step.__wrapped__
            state, metrics = jax.eval_shape(step, program.abstract, a_batch(program.objective))
        assert metrics["loss"].shape == ()
        assert jax.tree.structure(state) == jax.tree.structure(program.abstract), spec


def test_what_couples_a_batch_refuses_micro_batches() -> None:
    with pytest.raises(ValueError, match="group_dro looks at a batch as a whole"):
        build_program(MODEL, TrainConfig(objective="group_dro", micro_batches=2), 10)


def test_another_image_is_that_of_the_next_group_there_is() -> None:
    batch = one_micro(a_batch(find_objective("standard")))
    prefix = batch.prefixes["primary"]
    keys = jax.random.split(jax.random.key(0), 8)
    shown = _of_another(1)(prefix, batch, keys)
    for g, partner in ((0, 1), (1, 2), (2, 0), (3, 3)):
        np.testing.assert_array_equal(shown.pixels[g], prefix.pixels[partner])
        tokens = int(prefix.visual_index[partner].max()) + 1
        own = np.asarray(prefix.visual_index[g])
        np.testing.assert_array_equal(shown.visual_index[g], np.where(own >= 0, own % max(tokens, 1), -1))
    np.testing.assert_array_equal(shown.tokens, prefix.tokens)


def test_lengths_are_tokens() -> None:
    batch = one_micro(a_batch(find_objective("standard")))
    lengths = np.asarray(response_lengths(batch.responses))
    tokens = np.asarray(batch.responses.last) >= 0
    assert np.array_equal(lengths > 0, tokens)
    # Packed one after another, all tokens but padding belong to a response.
    rng = np.random.default_rng(7)
    group = random_group(MODEL, rng, 0, tiles=1, responses=3)
    np.testing.assert_array_equal(lengths[0, :3], [len(r) for r in group.responses])


def test_an_objective_of_ones_own_is_what_the_docs_show() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    module: dict = {}
    exec(code, module)
    hinge = module["hinge"]
    found = hinge(m=2.0).terms(seen({"primary": jnp.array([0.5, 3.0])}, comparisons(2))).loss
    np.testing.assert_allclose(found, [1.5, 0.0])
    assert hinge().forwards() == {"primary": Forward("primary")}
    assert parse_objective("hinge:m=3+centring", {"hinge": hinge}, MODIFIERS).name == "hinge:m=3+centring"


def test_the_docs_have_a_row_for_each_and_know_its_options() -> None:
    rows = re.findall(r"^\| `(.+?)` \|(.*)$", DOCS, flags=re.MULTILINE)
    named = {spec.removeprefix("+").partition(":")[0] for spec, _ in rows}
    assert named == {*OBJECTIVES, *MODIFIERS} and len(rows) == len(named)
    for spec, row in rows:
        if spec.startswith("+"):
            find_objective("standard" + spec)
            continue
        find_objective(spec)
        forwards = next((cell for cell in row.split("|") if re.fullmatch(r" [\d.]+ ", cell)), None)
        if forwards is not None:
            assert forward_passes(spec) == float(forwards), spec
        given = dict(option.split("=") for option in spec.partition(":")[2].split(",") if option)
        defaults = inspect.signature(OBJECTIVES[spec.partition(":")[0]]).parameters
        assert all(float(defaults[name].default) == float(value) for name, value in given.items() if name != "combine")
