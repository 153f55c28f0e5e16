"""Rows of responses: nothing overlaps, nothing is cut, and little is padding."""

import numpy as np
import pytest

from mmrm_jax.data.packing import cost, pack, row_length


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
