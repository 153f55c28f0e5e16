"""All of a group at once: Plackett-Luce over what each response is known to beat."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mmrm_jax.objectives.base import Objective, Seen, Terms


def listwise() -> Objective:
    """-log of P(w is first among itself and all that it beats), for every response w that beats another.

    Of a full ranking this is the Plackett-Luce likelihood (Luce 1959; Plackett 1975); of a pair the Bradley-Terry loss;
    of a partial order each response's own factor of it. A target margin is added to the loser's reward, the largest
    where two responses are compared several times. The factor of a response is shared evenly by its comparisons; ties
    keep the pairwise loss.
    """

    def terms(seen: Seen) -> Terms:
        pairwise = seen.loss("primary")
        return Terms(_factors(seen, pairwise), {"primary": pairwise})

    return Objective("listwise", {"primary": "multimodal"}, "primary", terms)


def _factors(seen: Seen, pairwise: jax.Array) -> jax.Array:
    r, c = seen.rewards["primary"], seen.comparisons
    groups, most = r.shape
    (group, winner), (other, loser) = ((c.index[:, side] // most, c.index[:, side] % most) for side in (0, 1))
    counts = c.mask & ~c.tie & (group == other)
    times = jnp.zeros((groups, most, most)).at[group, winner, loser].add(counts.astype(r.dtype))
    lowest = jnp.full((groups, most, most), -jnp.inf)
    margin = lowest.at[group, winner, loser].max(jnp.where(counts, c.margin, -jnp.inf))
    beaten = times > 0
    margin = jnp.where(beaten, margin, 0.0)
    rivals = jax.nn.logsumexp(r[:, None, :] + margin, axis=2, where=beaten | jnp.eye(most, dtype=bool)[None])
    shares = jnp.maximum(jnp.sum(times, axis=2), 1.0)
    factor = ((rivals - r) / shares)[group, winner]
    return jnp.where(counts, factor, pairwise)
