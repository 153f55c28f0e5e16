"""Prefixes that are read once and answered later: the rewards of a whole forward, whatever is kept or forgotten."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from pictures import png

import mmrm_jax
from mmrm_jax.config import DynamicRope, LongRope, MeshConfig
from mmrm_jax.eval.scorer import Scorer
from mmrm_jax.models.rope import fixed
from mmrm_jax.serve.kept import Kept
from mmrm_jax.serve.prefixes import Asked, Prefixes
from mmrm_jax.sharding import make_mesh
from mmrm_jax.tiny import MODEL_DIR
from mmrm_jax.train.setup import open_checkpoint
from mmrm_jax.train.state import init_params

CLOSE = 1e-5
RESPONSES = ["It is red.", "It is a blue bus, as one can see.", "No.", "\n\nIt is red", "It", " assistant"]


def on(devices: int, dtype: str = "float32") -> Scorer:
    """The packaged model on so many devices, its own weights also as a proxy that sees a blank tile."""
    alone = mmrm_jax.load(MODEL_DIR, draw_score=3)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:devices])
    params = jax.device_put(alone.params["primary"], jax.sharding.NamedSharding(mesh, jax.P()))
    both, views = {"primary": params, "proxy": params}, {"primary": "multimodal", "proxy": "blank"}
    return Scorer(alone.checkpoint, both, mesh, views=views, dtype=dtype, batch_size=4)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rm() -> Scorer:
    return on(1)


def deep() -> Scorer:
    """Six layers, which are run in a loop and not one by one."""
    checkpoint = open_checkpoint(MODEL_DIR)
    config = dataclasses.replace(
        checkpoint.config, decoder=dataclasses.replace(checkpoint.config.decoder, num_layers=6, num_kv_heads=2)
    )
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    params = jax.device_put(init_params(config, 1), jax.sharding.NamedSharding(mesh, jax.P()))
    checkpoint = dataclasses.replace(checkpoint, config=config)
    views = {"primary": "multimodal"}
    return Scorer(checkpoint, {"primary": params}, mesh, views=views, dtype="float32", batch_size=4)  # type: ignore[arg-type]


def test_in_a_deep_model_too() -> None:
    there = deep()
    (group,) = there.encode([there.features(there.tiles(png(1)))], "What is it?", RESPONSES, alone=True)
    (read,) = there.read([group])
    assert read.shape[1] == 6 and read.nbytes == len(group.prefixes["primary"].tokens) * there.read_bytes
    (got,), (want,) = there.answer([read], [group]), there.rewards([group])
    np.testing.assert_allclose(got, want, atol=CLOSE)
    assert np.ptp(want) > 1e-2


def test_answers_of_several_lengths_run_together(rm) -> None:
    prefixes = Prefixes(rm, 2**30)
    each = [asked(rm, png(1), "What is it?", ["word " * count]) for count in (2, 9, 20, 60)]
    keys = [prefixes.key(one, "primary") for one in each]
    assert keys[0] == keys[1] == keys[2] != keys[3] != prefixes.key(each[3], "proxy")
    assert len({rm.ladder.shape(one.group.shape).rows for one in each}) == 4
    for one, got in zip(each[:3], prefixes.rewards(each[:3], "primary"), strict=True):
        np.testing.assert_allclose(got, rm.rewards([one.group])[0], atol=CLOSE)


def asked(rm: Scorer, image: bytes | None, prompt: str, responses: list[str], *, alone: bool = True) -> Asked:
    shown = [rm.features(rm.tiles(image))] if image else []
    (group,) = rm.encode(shown, prompt, responses, proxy=True, alone=alone)
    return Asked(group, image or b"")


@pytest.mark.parametrize("branch", ["primary", "proxy"])
@pytest.mark.parametrize("devices", [1, 4])
def test_what_is_read_before_gives_the_rewards_of_a_whole_forward(rm, branch, devices) -> None:
    """Prompts of several lengths beside one another, with an image and without, on one device and on four."""
    there = on(devices)
    for image in (None, png(1)):
        each = [asked(rm, image, "What is it? " * n, RESPONSES[:count]) for n, count in ((1, 6), (2, 5), (3, 6))]
        groups = [one.group for one in each]
        assert len({there.ladder.shape(group.shape).key for group in groups[1:]}) == 1
        for batch in ([groups[0]], groups[1:]):
            read = there.read(batch, branch)
            for found, group in zip(read, batch):
                assert found.shape[:3] == (2, 2, len(group.prefixes[branch].tokens)) and found.dtype == np.float32
            for got, want in zip(there.answer(read, batch, branch), rm.rewards(batch, branch), strict=True):
                np.testing.assert_allclose(got, want, atol=CLOSE)
                assert np.ptp(want) > 1e-2


def test_a_prefix_alone_does_not_depend_on_the_responses(rm) -> None:
    prefixes = [asked(rm, png(1), "What?", [r]).group.prefixes["primary"] for r in RESPONSES if r != "\n\nIt is red"]
    assert all(np.array_equal(prefixes[0].tokens, other.tokens) for other in prefixes)
    shared = asked(rm, png(1), "What?", [RESPONSES[0]], alone=False).group
    assert len(shared.prefixes["primary"].tokens) > len(prefixes[0].tokens)
    whole = asked(rm, png(1), "What?", [RESPONSES[0]]).group
    assert [*whole.prefixes["primary"].tokens, *whole.responses[0]] == [
        *shared.prefixes["primary"].tokens,
        *shared.responses[0],
    ]


def test_a_prompt_is_read_once_for_its_image_and_branch(rm, monkeypatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(rm, "read", lambda groups, branch: read.append(len(groups)) or Scorer.read(rm, groups, branch))
    prefixes = Prefixes(rm, 2**30)
    assert prefixes.on

    def ask(image: bytes | None, *responses: str, branch: str = "primary") -> None:
        each = [asked(rm, image, "What is it?", [r]) for r in responses]
        found = prefixes.rewards(each, branch)
        for one, got in zip(each, found, strict=True):
            np.testing.assert_allclose(got, rm.rewards([one.group], branch)[0], atol=CLOSE)

    ask(png(1), "Red.", "Blue.", "Green.")  # one prompt three times in a batch
    ask(png(1), "Yellow.")
    assert read == [1] and prefixes.kept.hits == 1
    ask(png(2), "Red.")  # another image of the same size: the tokens are the same
    ask(None, "Red.")
    ask(png(1), "Red.", branch="proxy")
    ask(png(2), "Red.", branch="proxy")  # to whom all images are one white tile
    assert read == [1, 1, 1, 1]
    ask(png(1), "Black.")
    ask(png(1), "Black.", branch="proxy")
    assert read == [1, 1, 1, 1] and prefixes.kept.hits == 4


@pytest.mark.parametrize("capacity", [0, 1, 30_000])
def test_what_does_not_fit_is_read_again(rm, capacity) -> None:
    """Nothing is kept; not even one prefix would fit; one alone fits, and each takes the other's place."""
    prefixes = Prefixes(rm, capacity)
    assert prefixes.tokens == capacity // rm.read_bytes
    for _ in range(2):
        for image in (png(1), png(2)):
            one = asked(rm, image, "What is it?", RESPONSES[:3], alone=prefixes.on)
            found = prefixes.rewards([one], "primary")[0]
            np.testing.assert_allclose(found, rm.score(image, "What is it?", RESPONSES[:3]), atol=CLOSE)
    assert prefixes.on is bool(capacity) and prefixes.kept.hits == 0
    both = [asked(rm, image, "What is it?", RESPONSES[:3], alone=prefixes.on) for image in (png(1), png(2))]
    for one, got in zip(both, prefixes.rewards(both, "primary"), strict=True):
        np.testing.assert_allclose(got, rm.rewards([one.group])[0], atol=CLOSE)
    assert prefixes.kept.hits == 0  # though one of them is there: a batch that does not fit runs as a whole


def test_in_bfloat16_half_as_much_is_kept(rm) -> None:
    half = on(1, "bfloat16")
    one = asked(rm, png(1), "What is it?", RESPONSES)
    (read,) = half.read([one.group])
    assert read.dtype.name == "bfloat16" and read.nbytes * 2 == rm.read([one.group])[0].nbytes
    exact = rm.rewards([one.group])[0]
    for found in (half.answer([read], [one.group])[0], half.rewards([one.group])[0]):
        np.testing.assert_allclose(found, exact, rtol=2**-6, atol=2**-6)  # bfloat16 has 2**-8, a few times over


def test_what_was_not_asked_for_longest_is_forgotten() -> None:
    kept = Kept(100)
    for name in (b"a", b"b", b"a"):
        kept.put(name, np.zeros(40, np.int8))
    assert kept.get(b"a") is not None
    kept.put(b"c", np.zeros(40, np.int8))
    assert kept.get(b"b") is None and kept.get(b"a") is not None and kept.get(b"c") is not None
    kept.put(b"d", np.zeros(400, np.int8))
    assert [kept.get(n) is not None for n in (b"a", b"c", b"d")] == [False, False, True] and kept.hits == 4


def test_where_positions_look_at_the_length_nothing_is_read_alone(rm) -> None:
    config = rm.checkpoint.config
    dynamic = DynamicRope(factor=2.0, max_length=2048)
    for scaling, most, on in ((None, 10**6, True), (dynamic, 2048, True), (dynamic, 2049, False)):
        decoder = dataclasses.replace(config.decoder, rope_scaling=scaling)
        assert fixed(decoder, most) is on
        checkpoint = dataclasses.replace(
            rm.checkpoint,
            config=dataclasses.replace(config, decoder=decoder),
            processor=dataclasses.replace(rm.checkpoint.processor, max_length=most),
        )
        other = Scorer(checkpoint, rm.params, rm.mesh, views=rm.views, dtype="float32", batch_size=4)
        assert Prefixes(other, 2**20).on is on
    width = config.decoder.head_width // 2
    long = LongRope((1.0,) * width, (2.0,) * width, original_length=128, max_length=256)
    assert fixed(dataclasses.replace(config.decoder, rope_scaling=long), 128)
    assert not fixed(dataclasses.replace(config.decoder, rope_scaling=long), 129)
