"""The matrix product of a layer: the gradients of `jnp.dot`, whatever comes before the last axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrm_jax.models.layers import product


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 3, 5), (2, 1, 4, 5), (0, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_dot(shape: tuple[int, ...], dtype: str):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], shape, dtype), jax.random.normal(keys[1], (5, 6), dtype)
    cotangent = jax.random.normal(keys[2], (*shape[:-1], 6), dtype)
    results = [jax.vjp(f, x, kernel) for f in (product, jnp.dot)]
    (ours, backward), (expected, of_dot) = results
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(expected, np.float32))
    for mine, theirs, primal in zip(backward(cotangent), of_dot(cotangent), (x, kernel), strict=True):
        assert mine.shape == theirs.shape == primal.shape and mine.dtype == theirs.dtype == primal.dtype
        tolerance = 1e-5 if dtype == "float32" else 0.1
        np.testing.assert_allclose(*(np.asarray(g, np.float32) for g in (mine, theirs)), rtol=0, atol=tolerance)
