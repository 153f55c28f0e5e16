"""Attention by plain array code, and random cases to compare it with; as a script, on whatever device JAX finds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmrm_jax.data.packing import pack, row_length
from mmrm_jax.models.attention import attention, best_kernel, response_attention

Arrays = tuple[jax.Array, ...]

# (groups, length, heads, kv_heads, width, causal): below, at and above a block of 128, even and odd; heads that share
# keys and not, as wide as a kernel likes them and not; one group and several.
SEQUENCES = [
    (1, 1, 1, 1, 8, True),
    (2, 37, 4, 2, 24, True),
    (2, 37, 4, 2, 24, False),
    (1, 128, 2, 1, 64, False),
    (1, 257, 3, 3, 7, False),
    (2, 300, 2, 2, 16, True),
]
# (lengths of each group's responses, rows, prefix, heads, kv_heads, width): one response and many, which share rows;
# more tokens than a CPU takes at a time, in parts that are full and in parts that are not.
RESPONSES = [
    ([(1,)], 1, 1, 1, 1, 8),
    ([(5, 9, 3), (4,)], 2, 37, 4, 2, 24),
    ([(50, 70, 64, 31), (9, 30)], 2, 200, 2, 1, 16),
    ([(120, 90, 110, 130, 80, 70), (20,)], 6, 40, 2, 1, 8),
    ([(300, 200, 280)], 3, 20, 2, 2, 8),
    ([(80, 70, 90, 60, 85)], 5, 20, 2, 1, 8),
]


def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray) -> jax.Array:
    """q [G, T, H, E], k and v [G, S, J, E], mask [G, T, S]: all scores at once, in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("gthe,gshe->ghts", q, k, precision="highest") / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("ghts,gshe->gthe", weights, v, precision="highest")


@dataclasses.dataclass(frozen=True)
class Case:
    """What attention is differentiated by; the weights of the sum that is; what it gives, called as `run(*arrays)`."""

    arrays: Arrays
    weights: jax.Array
    want: Callable[..., jax.Array]

    def errors(self, run: Callable[..., jax.Array]) -> list[float]:
        """The largest difference of the result and of each gradient, relative to its largest entry if above 1."""
        found, want = (self._pullback(f) for f in (run, self.want))
        return [float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in zip(found, want, strict=True)]

    def _pullback(self, run: Callable[..., jax.Array]) -> list[np.ndarray]:
        def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = run(*arrays).reshape(self.weights.shape)
            return jnp.sum(out.astype(jnp.float32) * self.weights), out

        grads, out = jax.jit(jax.grad(total, argnums=tuple(range(len(self.arrays))), has_aux=True))(*self.arrays)
        return [np.asarray(x, np.float32) for x in (out, *grads)]


def draw(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


def sequence(
    groups: int, length: int, heads: int, kv_heads: int, width: int, causal: bool, dtype: str = "float32"
) -> Case:
    """q, k, v of whole sequences."""
    rng = np.random.default_rng(length)
    q, k, v = (draw(rng, groups, length, h, width, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    mask = np.ones((groups, length, length), bool)
    want = functools.partial(plain, mask=np.tril(mask) if causal else mask)
    return Case((q, k, v), draw(rng, *q.shape), want)


def responses(
    lengths: Sequence[tuple[int, ...]],
    rows: int,
    prefix: int,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: str = "float32",
) -> tuple[Case, Callable[..., Arrays]]:
    """q, k, v, prefix_k, prefix_v; and what makes all arguments of them.

    The fullest row has three tokens of padding. The first group's prefix is full; that of the last, if there are
    several, is empty: a padding group.
    """
    groups, rng = len(lengths), np.random.default_rng(prefix)
    length = max(row_length(n, rows) for n in lengths) + 3
    own = np.tile(np.arange(rows * length), (groups, 1))  # of which response a token is: padding stands alone
    positions = np.zeros((groups, rows, length), np.int32)
    for g, counts in enumerate(lengths):
        for (row, start), count in zip(pack(counts, rows), counts, strict=True):
            positions[g, row, start : start + count] = np.arange(count)
            own[g, row * length + start : row * length + start + count] = row * length + start
    valid = np.linspace(prefix, 0, groups).astype(np.int32)
    mask = np.tril(own[:, :, None] == own[:, None])
    seen = np.broadcast_to((np.arange(prefix) < valid[:, None])[:, None], (groups, rows * length, prefix))
    mask = np.concatenate([seen, mask], axis=2)
    q, k, v = (draw(rng, groups, rows, length, h, width, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    prefix_k, prefix_v = (draw(rng, groups, prefix, kv_heads, width, dtype=dtype) for _ in range(2))

    def want(q: jax.Array, k: jax.Array, v: jax.Array, prefix_k: jax.Array, prefix_v: jax.Array) -> jax.Array:
        q, k, v = (x.reshape(groups, rows * length, -1, width) for x in (q, k, v))
        return plain(q, jnp.concatenate([prefix_k, k], 1), jnp.concatenate([prefix_v, v], 1), mask)

    def arguments(q: jax.Array, k: jax.Array, v: jax.Array, prefix_k: jax.Array, prefix_v: jax.Array) -> Arrays:
        return q, k, v, jnp.asarray(positions), prefix_k, prefix_v, jnp.asarray(valid)

    weights = draw(rng, groups, rows * length, heads, width)
    return Case((q, k, v, prefix_k, prefix_v), weights, want), arguments


def main() -> None:
    """The device's kernels, in bfloat16, which is what they are for: a rounding is 2**-9 and several add up."""
    device = jax.devices()[0]
    print(device.device_kind, best_kernel(jnp.dtype("bfloat16"), 64))
    for shape in SEQUENCES:
        errors = sequence(*shape, dtype="bfloat16").errors(functools.partial(attention, causal=shape[-1]))
        print(shape, best_kernel(jnp.dtype("bfloat16"), shape[4]), errors)
        assert max(errors) < 0.03
    for shape in RESPONSES:
        case, arguments = responses(*shape, dtype="bfloat16")
        errors = case.errors(lambda *x, arguments=arguments: response_attention(*arguments(*x)))
        print(shape, errors)
        assert max(errors) < 0.03


if __name__ == "__main__":
    main()
