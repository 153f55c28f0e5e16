"""A Llama-family decoder that runs a shared prefix once and N responses beside it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mmrm_jax.config import DecoderConfig
from mmrm_jax.models.attention import attention, response_attention
from mmrm_jax.models.layers import UNROLLED, Linear, Norm, apply_layers, param, stack_layers
from mmrm_jax.models.rope import rope_frequencies, rope_tables, rotate
from mmrm_jax.sharding import by_group, constrain, on_one_cpu


class DecoderLayer(nnx.Module):
    """RMS norm, grouped-query attention with RoPE, RMS norm, SwiGLU; q/k norm runs over each head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        c = config
        heads, kv = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
        self.norm1 = Norm(c.width, eps=c.norm_eps, rms=True, rngs=rngs)
        self.q = Linear((c.width, heads), ("embed", "heads"), bias=c.qkv_bias, rngs=rngs)
        self.k = Linear((c.width, kv), ("embed", "kv_heads"), bias=c.qkv_bias, rngs=rngs)
        self.v = Linear((c.width, kv), ("embed", "kv_heads"), bias=c.qkv_bias, rngs=rngs)
        self.q_norm = Norm(c.head_width, eps=c.norm_eps, rms=True, rngs=rngs) if c.qk_norm else None
        self.k_norm = Norm(c.head_width, eps=c.norm_eps, rms=True, rngs=rngs) if c.qk_norm else None
        self.o = Linear((heads, c.width), ("heads", "embed"), bias=c.o_bias, rngs=rngs)
        self.norm2 = Norm(c.width, eps=c.norm_eps, rms=True, rngs=rngs)
        self.gate = Linear((c.width, c.mlp_width), ("embed", "mlp"), bias=False, rngs=rngs)
        self.up = Linear((c.width, c.mlp_width), ("embed", "mlp"), bias=False, rngs=rngs)
        self.down = Linear((c.mlp_width, c.width), ("mlp", "embed"), bias=False, rngs=rngs)
        self.head_width = c.head_width

    def queries(self, x: Float[Array, "*B S D"], rope: tuple) -> Float[Array, "*B S H E"]:
        q = self._heads(self.q(self.norm1(x)))
        return rotate(q if self.q_norm is None else self.q_norm(q), rope)

    def keys_values(
        self, x: Float[Array, "*B S D"], rope: tuple
    ) -> tuple[Float[Array, "*B S J E"], Float[Array, "*B S J E"]]:
        x = self.norm1(x)
        k = self._heads(self.k(x))
        return rotate(k if self.k_norm is None else self.k_norm(k), rope), self._heads(self.v(x))

    def _heads(self, x: Float[Array, "*B S HE"]) -> Float[Array, "*B S H E"]:
        return x.reshape(*x.shape[:-1], -1, self.head_width)

    def read(self, x: Float[Array, "G P D"], k: Array, v: Array, rope: tuple) -> Float[Array, "G P D"]:
        """A prefix after the layer; `k` and `v` are its own."""
        return by_group(self.finish(x, attention(self.queries(x, rope), k, v, causal=True)))

    def answer(
        self, x: Float[Array, "G K L D"], positions: Array, k: Array, v: Array, prefix_lengths: Array, rope: tuple
    ) -> Float[Array, "G K L D"]:
        """Responses after the layer; `k` and `v` are those of their group's prefix."""
        own_k, own_v = self.keys_values(x, rope)
        attended = response_attention(self.queries(x, rope), own_k, own_v, positions, k, v, prefix_lengths)
        return by_group(self.finish(x, attended))

    def finish(self, x: Float[Array, "*B S D"], attended: Float[Array, "*B S H E"]) -> Float[Array, "*B S D"]:
        x = x + self.o(attended.reshape(*attended.shape[:-2], -1))
        y = self.norm2(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: Float[Array, "vocab D"], tokens: Int[Array, "*B S"], dtype: jnp.dtype) -> Float[Array, "*B S D"]:
    """Rows of an embedding table in `dtype`. Their gradients are summed in the table's own: a frequent token has
    thousands, and a sum in bfloat16 stops growing at 256 times what is added."""
    return constrain(table.astype(dtype), "vocab", "looked_up")[tokens]


def _look_up_forward(table: Array, tokens: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return look_up(table, tokens, dtype), (table, tokens)


def _look_up_backward(dtype: jnp.dtype, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, tokens = saved
    summed = jnp.zeros_like(table).at[tokens].add(gradient.astype(table.dtype))
    return constrain(summed, "vocab", "looked_up"), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class Decoder(nnx.Module):
    """Token embeddings, layers and final norm. The LM head is not part of a reward model."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.embedding = param(rngs, (config.vocab_size, config.width), ("vocab", "columns"))
        self.layers = stack_layers(lambda r: DecoderLayer(config, r), config.num_layers, rngs)
        self.norm = Norm(config.width, eps=config.norm_eps, rms=True, rngs=rngs)
        self.config = config

    @jax.named_scope("embedding")
    def embed(self, tokens: Int[Array, "*B S"], dtype: jnp.dtype) -> Float[Array, "*B S D"]:
        """FSDP's part of the table is gathered; the columns that "tensor" splits are joined after the look-up."""
        return by_group(look_up(self.embedding[...], tokens, dtype))

    @jax.named_scope("decoder")
    def __call__(
        self,
        prefix: Float[Array, "G P D"],
        prefix_lengths: Int[Array, " G"],
        responses: Float[Array, "G K L D"],
        positions: Int[Array, "G K L"],
        *,
        whole: bool = True,
    ) -> tuple[Float[Array, "G P D"], Float[Array, "G K L D"]]:
        """Final hidden states of both streams; `positions` are those of `types.Responses`.

        Those of the prefix have no meaning without `whole`: its last layer is then computed as far as responses see it.

        Equal at every valid position to an ordinary causal forward over [prefix, response], with response
        positions continuing after the group's own prefix length. What padding positions return has no meaning.

        Where RoPE depends on the length (dynamic NTK, LongRoPE), a group goes by its longest conversation, since the
        shared prefix can have one rotation only. It is what the Hugging Face code gives the group's conversations as
        one batch padded to the longest; alone, a shorter one would get another rotation only where the longest passes
        the scaling's threshold. More padding and other groups change nothing.
        """
        c = self.config
        frequencies = rope_frequencies(c, prefix_lengths + 1 + jnp.max(positions, axis=(1, 2)))
        prefix_rope = rope_tables(c, frequencies, jnp.arange(prefix.shape[1])[None])
        response_rope = rope_tables(c, frequencies, prefix_lengths[:, None, None] + positions)

        def step(layer: DecoderLayer, carry: tuple[Array, Array], last: Array | None) -> tuple[tuple, None]:
            prefix, responses = carry
            k, v = layer.keys_values(prefix, prefix_rope)
            responses = layer.answer(responses, positions, k, v, prefix_lengths, response_rope)

            def read(prefix: Array) -> Array:
                return layer.read(prefix, k, v, prefix_rope)

            prefix = read(prefix) if last is None else jax.lax.cond(last, lambda x: x, read, prefix)
            return (prefix, responses), None

        skips = not whole and c.num_layers > UNROLLED and on_one_cpu()
        last = jnp.arange(c.num_layers) == c.num_layers - 1 if skips else None
        carry = prefix, responses
        (prefix, responses), _ = apply_layers(self.layers, c.num_layers, step, carry, last, remat=c.remat)
        return self.norm(prefix), self.norm(responses)

    def keys_values(self, prefix: Float[Array, "G P D"]) -> tuple[Float[Array, "layers G P J E"], ...]:
        """What responses see of a prefix in every layer: `answer` takes it, now or later.

        Where RoPE looks at the length of a conversation (see `rope.fixed`), it has no place here.
        """
        c = self.config
        rope = rope_tables(c, self._frequencies(), jnp.arange(prefix.shape[1])[None])

        def step(layer: DecoderLayer, x: Array) -> tuple[Array, tuple[Array, Array]]:
            k, v = layer.keys_values(x, rope)
            return layer.read(x, k, v, rope), (k, v)

        return apply_layers(self.layers, c.num_layers, step, prefix)[1]

    def _frequencies(self) -> Float[Array, "1 half"]:
        """Those of short conversations."""
        return rope_frequencies(self.config, jnp.zeros(1, jnp.int32))

    def answer(
        self,
        responses: Float[Array, "G K L D"],
        positions: Int[Array, "G K L"],
        keys: Float[Array, "layers G P J E"],
        values: Float[Array, "layers G P J E"],
        prefix_lengths: Int[Array, " G"],
    ) -> Float[Array, "G K L D"]:
        """Final hidden states of responses to prefixes that were read before: those that `__call__` gives."""
        c = self.config
        rope = rope_tables(c, self._frequencies(), prefix_lengths[:, None, None] + positions)

        def step(layer: DecoderLayer, x: Array, k: Array, v: Array) -> tuple[Array, None]:
            return layer.answer(x, positions, k, v, prefix_lengths, rope), None

        return self.norm(apply_layers(self.layers, c.num_layers, step, responses, keys, values)[0])
