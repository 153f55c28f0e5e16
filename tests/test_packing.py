"""Rows of responses: nothing overlaps, nothing is cut, and little is padding."""

import numpy as np
import pytest

from mmrm_jax.data.packing import cost, fit_rows, pack, row_length


def test_the_longest_goes_first_into_the_emptiest_row():
    assert pack((3, 5, 2, 4), 2) == [(1, 4), (0, 0), (0, 5), (1, 0)]
    assert row_length((3, 5, 2, 4), 2) == 7
    assert row_length((3, 5, 2, 4), 1) == 14 and row_length((3, 5, 2, 4), 9) == 5
    assert pack((), 3) == [] and row_length((), 3) == 0


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_token_once(seed):
    rng = np.random.default_rng(seed)
    lengths = tuple(map(int, rng.integers(1, 60, rng.integers(1, 12))))
    for rows in range(1, 14):
        places = pack(lengths, rows)
        taken = np.zeros((rows, sum(lengths)), int)
        for (row, start), n in zip(places, lengths):
            taken[row, start : start + n] += 1
        assert taken.max() == 1 and taken.sum() == sum(lengths)
        assert row_length(lengths, rows) == taken.any(0).sum()  # rows are filled from their beginning
        # Graham's bound: at most 4/3 - 1/(3 rows) of the best, which is at least either of these.
        assert row_length(lengths, rows) <= (4 / 3 - 1 / (3 * rows)) * 2 * max(max(lengths), -(-sum(lengths) // rows))


def test_cost_weighs_long_rows_against_padding():
    assert cost((2, 512)) == 1024 * 1.5 and cost((1, 1024)) == 1024 * 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_group_fits_and_more_shapes_cost_less(seed, k):
    rng = np.random.default_rng(seed)
    groups = [tuple(map(int, rng.integers(5, 190, rng.integers(1, 7)))) for _ in range(80)]
    rows = fit_rows(groups, k, 4)
    assert 1 <= len(rows) <= k and list(rows) == sorted(rows, key=cost)

    def cheapest(shapes, lengths):
        return min(cost(r) for r in shapes if row_length(lengths, r[0]) <= r[1])  # raises where none fits

    one, many = (sum(cheapest(shapes, g) for g in groups) for shapes in (fit_rows(groups, 1, 4), rows))
    assert many <= one
    assert k == 1 or many < one


def test_pairs_of_a_long_and_a_short_response_share_a_row():
    rng = np.random.default_rng(0)
    groups = [(int(a), int(b)) for a, b in zip(rng.integers(120, 190, 300), rng.integers(20, 60, 300))]
    (rows,) = fit_rows(groups, 1, 4)
    assert rows[0] == 1
    tokens = sum(map(sum, groups))
    packed, padded = rows[0] * rows[1] * len(groups), 2 * max(map(max, groups)) * len(groups)
    assert packed < 0.7 * padded and tokens > 0.75 * packed


def test_best_of_n_keeps_rows_short():
    """Few long rows would have every token look past many that are not of its response."""
    rng = np.random.default_rng(0)
    groups = [tuple(map(int, rng.integers(30, 61, 64))) for _ in range(20)]
    ((rows, length),) = fit_rows(groups, 1, 4)
    assert length <= 256
    assert sum(map(sum, groups)) / (len(groups) * rows * length) > 0.85
