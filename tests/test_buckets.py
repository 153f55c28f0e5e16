"""The shapes of batches: every group fits one, and little is padding."""

from collections.abc import Sequence

import numpy as np
import pytest

from mmrm_jax.data.buckets import BatchShape, GroupShape, fit_buckets


def shape(responses: Sequence[int], prefix: int = 5, tiles: int = 0) -> GroupShape:
    return GroupShape({"primary": prefix}, tuple(map(int, responses)), tiles, 1)


def test_groups_get_the_cheapest_shape_that_fits():
    shapes = [shape((8, 7), prefix=9, tiles=2)] * 50 + [shape((40, 9))] * 50
    buckets = fit_buckets(shapes, 2, 28)
    assert buckets.shapes == (BatchShape({"primary": 12}, (2, 8), 2), BatchShape({"primary": 12}, (1, 52), 2))
    assert (buckets.responses, buckets.comparisons, buckets.image_size) == (2, 1, 28)
    assert [buckets.of(s) for s in shapes] == [0] * 50 + [1] * 50
    assert buckets.smallest(shapes) is buckets.shapes[1] and buckets.smallest([]) is buckets.shapes[0]


def test_tiles_and_prefixes_divide_the_data_too():
    shapes = [shape((30, 30), prefix=20 + 256 * t, tiles=t) for t in (1, 7, 13)] * 20
    buckets = fit_buckets(shapes, 3, 448)
    assert [s.tiles for s in buckets.shapes] == [1, 7, 13]
    assert [s.prefixes["primary"] for s in buckets.shapes] == [276, 1812, 3348]
    assert buckets.padding(shapes) == 0


@pytest.mark.parametrize("seed", range(5))
def test_every_group_fits_and_more_shapes_waste_less(seed):
    rng = np.random.default_rng(seed)
    tiles = rng.integers(1, 5, 200)
    lengths = [rng.integers(5, 190, rng.integers(1, 7)) for _ in tiles]
    shapes = [shape(n, int(40 * t + rng.integers(5, 60)), int(t)) for n, t in zip(lengths, tiles)]
    found = [fit_buckets(shapes, k, 28) for k in (1, 2, 4, 8, 16)]
    assert [len(b.shapes) for b in found] == [1, 2, 4, 8, 16]
    for buckets in found:
        assert all(buckets.shapes[buckets.of(s)].fits(s) for s in shapes)  # raises where none fits
        assert all(map(buckets.shapes[-1].fits, shapes))
    wastes = [b.padding(shapes) for b in found]
    assert wastes == sorted(wastes, reverse=True) and wastes[-1] < 0.6 * wastes[0]


def test_no_more_shapes_than_there_are_sizes():
    buckets = fit_buckets([shape((7,))] * 9 + [shape((8,))], 5, 28)
    assert len(buckets.shapes) == 1  # both are padded to 8


def test_pairs_of_a_long_and_a_short_response_share_a_row():
    rng = np.random.default_rng(0)
    groups = [shape((a, b)) for a, b in zip(rng.integers(120, 190, 300), rng.integers(20, 60, 300))]
    (only,) = fit_buckets(groups, 1, 28).shapes
    assert only.rows[0] == 1
    tokens = sum(sum(s.responses) for s in groups)
    packed, padded = only.rows[1] * len(groups), 2 * max(max(s.responses) for s in groups) * len(groups)
    assert packed < 0.7 * padded and tokens > 0.75 * packed


def test_best_of_n_keeps_rows_short():
    """Few long rows would have every token look past many that are not of its response."""
    rng = np.random.default_rng(0)
    groups = [shape(rng.integers(30, 61, 64)) for _ in range(20)]
    ((rows, length),) = [s.rows for s in fit_buckets(groups, 1, 28).shapes]
    assert length <= 256
    assert sum(sum(s.responses) for s in groups) / (len(groups) * rows * length) > 0.85


def test_thousands_of_groups_of_feedback_waste_little():
    """Four answers to a photo: lengths as log-normal as those of VLFeedback, photos of three shapes."""
    rng = np.random.default_rng(0)
    tiles = rng.choice([5, 9, 13], 5000, p=[0.1, 0.3, 0.6])
    prompts = np.exp(rng.normal(3.3, 0.5, 5000))
    answers = np.exp(rng.normal(4.3, 0.5, 5000)[:, None] + rng.normal(0, 0.4, (5000, 4)))
    shapes = [shape(np.ceil(a), int(p + 256 * t), int(t)) for a, p, t in zip(answers, prompts, tiles)]
    assert fit_buckets(shapes, 8, 448).padding(shapes) < 0.15


def test_nothing_to_fit():
    with pytest.raises(ValueError, match="no groups"):
        fit_buckets([], 2, 28)
