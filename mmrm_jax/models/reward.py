"""The reward model: InternVL with a linear score head read at each response's last token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mmrm_jax.config import ModelConfig
from mmrm_jax.models.internvl import InternVL
from mmrm_jax.models.layers import param
from mmrm_jax.types import Prefix, Responses


class RewardModel(InternVL):
    """r(image, prompt, response): an InternVL whose LM head is replaced by a linear score.

    Parameters live under `vision`, `projector`, `decoder` and `score`; the head starts as N(0, 1/(width+1)).
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        width = config.decoder.width
        self.score = param(rngs, (width,), ("norm",), nnx.initializers.normal((width + 1) ** -0.5))

    def rewards(
        self,
        prefix: Prefix,
        responses: Responses,
        dtype: jnp.dtype = jnp.dtype("float32"),
        keys: Key[Array, " G_or_1"] | None = None,
    ) -> Float[Array, "G N"]:
        """Rewards in float32, read at each response's last token; a padding response's is meaningless."""
        return self.score_of(self.pooled(prefix, responses, dtype, keys))

    def pooled(
        self, prefix: Prefix, responses: Responses, dtype: jnp.dtype, keys: Key[Array, " G_or_1"] | None = None
    ) -> Float[Array, "G N D"]:
        """The final hidden state of each response's last token in float32: what the score is read from."""
        _, hidden = self(prefix, responses, dtype, keys, whole=False)
        return _at_last(hidden, responses)

    def rewards_after(
        self, read: Float[Array, "G 2 layers P J E"], prefix_lengths: Int[Array, " G"], responses: Responses
    ) -> Float[Array, "G N"]:
        """`rewards` of responses to prefixes that `read_prefix` read before, in the dtype in which it did."""
        keys, values = jnp.moveaxis(read, 0, 2)
        embedded = self.decoder.embed(responses.tokens, read.dtype)
        hidden = self.decoder.answer(embedded, responses.positions, keys, values, prefix_lengths)
        return self.score_of(_at_last(hidden, responses))

    def score_of(self, pooled: Float[Array, "G N D"]) -> Float[Array, "G N"]:
        """Rewards from pooled hidden states, in whole float32 on accelerators, too, whose default is less."""
        with jax.named_scope("score"):
            return jnp.matmul(pooled, self.score[...], precision="highest")


@jax.named_scope("score")
def _at_last(hidden: Float[Array, "G K L D"], responses: Responses) -> Float[Array, "G N D"]:
    """The hidden state of each response's last token in float32."""
    rows = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
    return jnp.take_along_axis(rows, jnp.maximum(responses.last, 0)[..., None], axis=1).astype(jnp.float32)
