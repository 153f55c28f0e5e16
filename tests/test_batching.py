"""Padding loses nothing: whatever goes into a batch can be read back out of it."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import is_response

from mmrm_jax.data.batching import EncodedGroup, collate
from mmrm_jax.data.buckets import Buckets, GroupShape, fit_buckets
from mmrm_jax.data.text import Conversation
from mmrm_jax.types import Comparison

SIDE = 4
VIEWS = {"primary": "multimodal", "proxy": "absent"}
BLANK = {"primary": "multimodal", "proxy": "blank"}
SEEDS = range(6)


def random_group(rng: np.random.Generator, index: int, *, most_tiles: int = 3) -> EncodedGroup:
    def conversation(tiles: int) -> Conversation:
        tokens = rng.integers(1, 100, rng.integers(1, 20) + 2 * tiles, dtype=np.int32)
        visual = np.full(len(tokens), -1, np.int32)
        visual[1 : 1 + 2 * tiles] = np.arange(2 * tiles)
        return Conversation(tokens, visual[: len(tokens)])

    count = int(rng.integers(0, most_tiles + 1))
    n = int(rng.integers(1, 5))
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    chosen = rng.permutation(len(pairs))[: rng.integers(0, 4)]
    return EncodedGroup(
        index=index,
        prefixes={"primary": conversation(count), "proxy": conversation(0)},
        responses=tuple(rng.integers(1, 100, rng.integers(1, 30), dtype=np.int32) for _ in range(n)),
        tiles=rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8) if count else None,
        comparisons=tuple(
            Comparison(*pairs[int(c)], margin=float(np.float32(rng.normal())), tie=bool(rng.random() < 0.3))
            for c in chosen
        ),
    )


def shape_of(g: EncodedGroup) -> GroupShape:
    return GroupShape(
        prefixes={b: len(c.tokens) for b, c in g.prefixes.items()},
        responses=tuple(len(r) for r in g.responses),
        tiles=0 if g.tiles is None else len(g.tiles),
        comparisons=len(g.comparisons),
    )


def random_data(seed: int, count: int = 40) -> tuple[list[EncodedGroup], Buckets]:
    rng = np.random.default_rng(seed)
    groups = [random_group(rng, i) for i in range(count)]
    return groups, fit_buckets(map(shape_of, groups), 3, SIDE)


def micro(batch, m: int):
    return jax.tree.map(lambda x: x[m], batch)


def recovered(batch) -> dict[int, dict]:
    """Read every group of one micro-batch back, by its index."""
    n = batch.responses.last.shape[1]
    out = {}
    for g in np.flatnonzero(batch.group_index >= 0):
        tokens, positions = batch.responses.tokens[g].ravel(), batch.responses.positions[g].ravel()
        ends = [int(end) for end in batch.responses.last[g] if end >= 0]
        spans = [slice(end - positions[end], end + 1) for end in ends]
        assert all(positions[span].tolist() == list(range(span.stop - span.start)) for span in spans)
        width = batch.responses.tokens.shape[-1]
        assert all(span.start // width == (span.stop - 1) // width for span in spans)  # within one row
        out[int(batch.group_index[g])] = {
            "responses": [tokens[span].tolist() for span in spans],
            "prefixes": {b: p.tokens[g, : p.lengths[g]].tolist() for b, p in batch.prefixes.items()},
            "visual": {b: p.visual_index[g, : p.lengths[g]].tolist() for b, p in batch.prefixes.items()},
            "pixels": None if batch.prefixes["primary"].pixels is None else batch.prefixes["primary"].pixels[g],
            "comparisons": [],
        }
    c = batch.comparisons
    for row in np.flatnonzero(c.mask):
        (group, winner), (other, loser) = (divmod(int(i), n) for i in c.index[row])
        assert group == other
        comparison = Comparison(winner, loser, float(c.margin[row]), bool(c.tie[row]))
        out[int(batch.group_index[group])]["comparisons"].append(comparison)
    return out


def check_equal(group: EncodedGroup, found: dict) -> None:
    assert found["responses"] == [r.tolist() for r in group.responses]
    assert found["prefixes"] == {b: c.tokens.tolist() for b, c in group.prefixes.items()}
    assert found["visual"] == {b: c.visual.tolist() for b, c in group.prefixes.items()}
    assert found["comparisons"] == list(group.comparisons)
    count = 0 if group.tiles is None else len(group.tiles)
    if group.tiles is not None:
        np.testing.assert_array_equal(found["pixels"][:count], group.tiles)
    if found["pixels"] is not None:
        assert not found["pixels"][count:].any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_every_group_can_be_read_back(seed, micro_batches):
    groups, buckets = random_data(seed)
    chosen = groups[: 12 - seed]  # also batches that are not full
    batch = collate(chosen, buckets, num_groups=12, micro_batches=micro_batches, views=VIEWS)
    assert {x.shape[0] for x in jax.tree.leaves(batch)} == {micro_batches}
    parts = [recovered(micro(batch, m)) for m in range(micro_batches)]
    found = {index: group for part in parts for index, group in part.items()}
    assert sum(map(len, parts)) == len(found) == len(chosen)
    for group in chosen:
        check_equal(group, found[group.index])
    # A batch that is not full is spread evenly over the micro-batches.
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_no_data_is_padding(seed):
    groups, buckets = random_data(seed)
    batch = collate(groups[:5], buckets, num_groups=8, micro_batches=2, views=VIEWS)
    for p in batch.prefixes.values():
        beyond = np.arange(p.tokens.shape[-1]) >= p.lengths[..., None]
        assert (p.tokens[beyond] == 0).all()
        assert (p.visual_index[beyond] == -1).all()
    beyond = ~is_response(batch.responses)
    assert beyond.size - beyond.sum() == sum(len(r) for g in groups[:5] for r in g.responses)
    assert (batch.responses.tokens[beyond] == 0).all() and (batch.responses.positions[beyond] == 0).all()
    empty = batch.group_index == -1
    assert empty.sum() == 3
    assert (batch.responses.last[empty] == -1).all()
    assert all((p.lengths[empty] == 0).all() for p in batch.prefixes.values())
    c = batch.comparisons
    assert c.mask.sum() == sum(len(g.comparisons) for g in groups[:5])
    assert not c.index[~c.mask].any() and not c.margin[~c.mask].any() and not c.tie[~c.mask].any()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_batch_without_groups_is_all_padding(micro_batches):
    _, buckets = random_data(0)
    batch = collate([], buckets, num_groups=4, micro_batches=micro_batches, views=VIEWS)
    assert (batch.group_index == -1).all() and not batch.comparisons.mask.any()
    assert (batch.responses.last == -1).all()
    full = collate(random_data(0)[0][:4], buckets, num_groups=4, micro_batches=micro_batches, views=VIEWS)
    assert jax.tree.structure(full) == jax.tree.structure(batch)
    assert [x.dtype for x in jax.tree.leaves(full)] == [x.dtype for x in jax.tree.leaves(batch)]


def test_groups_without_an_image_beside_groups_with_one():
    rng = np.random.default_rng(0)
    pictured = random_group(rng, 0)
    while pictured.tiles is None:
        pictured = random_group(rng, 0)
    plain = random_group(rng, 1, most_tiles=0)
    buckets = fit_buckets([shape_of(pictured), shape_of(plain)], 1, SIDE)
    batch = micro(collate([plain, pictured], buckets, num_groups=2, micro_batches=1, views=VIEWS), 0)
    assert batch.prefixes["proxy"].pixels is None
    assert (batch.prefixes["primary"].visual_index[0] == -1).all()
    found = recovered(batch)
    check_equal(pictured, found[0])
    check_equal(plain, found[1])
    # Without any image in the data there is no pixel array at all.
    buckets = fit_buckets([shape_of(plain)], 1, SIDE)
    text = collate([plain], buckets, num_groups=2, micro_batches=1, views=VIEWS)
    assert text.prefixes["primary"].pixels is None


def test_the_blank_view_shares_one_white_tile():
    groups, buckets = random_data(1)
    batch = collate(groups[:6], buckets, num_groups=6, micro_batches=3, views=BLANK)
    pixels = batch.prefixes["proxy"].pixels
    assert pixels.shape == (3, 1, 1, SIDE, SIDE, 3) and pixels.dtype == np.uint8 and (pixels == 255).all()
    assert batch.prefixes["primary"].pixels.shape[:2] == (3, 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_buckets_cover_the_data_with_few_shapes(seed, k):
    rng = np.random.default_rng(seed)
    groups, _ = random_data(seed)
    shapes = [shape_of(g) for g in groups]
    buckets = fit_buckets(iter(shapes), k, SIDE)
    assert 1 <= len(buckets.shapes) <= k and [s.cost for s in buckets.shapes] == sorted(s.cost for s in buckets.shapes)
    sizes = [size for s in buckets.shapes for size in (*s.prefixes.values(), s.rows[1])]
    assert all(size % 4 == 0 for size in sizes)
    assert all(map(buckets.shapes[-1].fits, shapes))
    seen = set()
    for _ in range(30):
        chosen = [groups[i] for i in rng.permutation(len(groups))[: rng.integers(1, 5)]]
        batch = collate(chosen, buckets, num_groups=4, micro_batches=1, views=VIEWS)
        seen.add(tuple(x.shape for x in jax.tree.leaves(batch)))
        shape = buckets.smallest(map(shape_of, chosen))
        assert all(shape.fits(shape_of(g)) for g in chosen)
        assert batch.responses.tokens.shape[2:] == shape.rows
        assert {b: p.tokens.shape[-1] for b, p in batch.prefixes.items()} == shape.prefixes
    assert len(seen) <= len(buckets.shapes)


def test_room_for_longer_responses_of_another_process():
    groups, buckets = random_data(2)
    short, long = (f(groups, key=lambda g: buckets.of(shape_of(g))) for f in (min, max))
    assert buckets.of(shape_of(short)) < buckets.of(shape_of(long))
    batch = collate([short], buckets, num_groups=1, micro_batches=1, views=VIEWS, room_for=[shape_of(long)])
    beside = collate([long], buckets, num_groups=1, micro_batches=1, views=VIEWS)
    assert [x.shape for x in jax.tree.leaves(batch)] == [x.shape for x in jax.tree.leaves(beside)]
    check_equal(short, recovered(micro(batch, 0))[short.index])


def test_a_group_that_no_bucket_fits_is_an_error():
    groups, _ = random_data(3)
    small, large = (f(groups, key=lambda g: sum(shape_of(g).responses)) for f in (min, max))
    buckets = fit_buckets([shape_of(small)], 1, SIDE)
    with pytest.raises(ValueError, match=r"larger than the largest bucket"):
        collate([large], buckets, num_groups=1, micro_batches=1, views=VIEWS)
    many = dataclasses.replace(small, responses=small.responses[:1] * (buckets.responses + 1))
    with pytest.raises(ValueError, match=rf"a group of {buckets.responses + 1} responses"):
        collate([many], buckets, num_groups=1, micro_batches=1, views=VIEWS)
    with pytest.raises(ValueError, match="no groups"):
        fit_buckets([], 2, SIDE)
