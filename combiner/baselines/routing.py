"""Sparse routing attention: k-means clusters of equal size, attention within each (Roy et al. 2021)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.attention.centroids import Routed, directions, similarity
from combiner.attention.joint import Drop, dot, joint_exp, masked
from combiner.attention.registry import register


def choose(
    similarity: Float[Array, 'b l h g'], size: int, valid: Bool[Array, 'b l'] | None = None
) -> Int[Array, 'b h g w']:
    """The positions of the `size` tokens most similar to each centroid, in order; padding comes last of all."""
    if valid is not None:
        similarity = masked(similarity, valid[:, :, None, None])
    nearest = jnp.argsort(jnp.moveaxis(similarity, 1, 3), axis=-1, descending=True)  # XLA shards no top_k
    return jnp.sort(nearest[..., :size], axis=-1)


def attend_routing(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    members: Int[Array, 'b h g w'],
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Softmax attention within each of `g` sets of `w` positions; a position in several of them gets the mean.

        A(i) = mean_{g: i ∈ S_g} Σ_{j ∈ S_g} softmax_j(q_i·k_j/√d) v_j        A(i) = v_i where i is in none

    O(g·w²) time and memory: O(l^1.5) for `g = w = √l`.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        members: positions of each set, ascending.
        causal: whether a position sees only itself and what is before it.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the weights.
    """
    batch, length, heads, width = q.shape
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * width**-0.5, k, v))

    def by_set(x: Array) -> Array:
        flat = members.reshape(batch, heads, -1, 1)
        return jnp.take_along_axis(x, flat, axis=2).reshape(*members.shape, x.shape[-1])

    routed_q, routed_k, routed_v = map(by_set, (q, k, v))
    logits = dot('bhgqd,bhgkd->bhgqk', routed_q, routed_k)
    if causal:
        logits = masked(logits, jnp.tri(members.shape[-1], dtype=bool))
    if valid is not None:
        logits = masked(logits, by_set(valid[:, None, :, None])[..., None, :, 0])
    (weights,), total = joint_exp(logits, drop=drop)
    attended = dot('bhgqk,bhgkd->bhgqd', weights.astype(v.dtype), routed_v) / total
    summed, count = (by_position(x, members, length) for x in (attended, jnp.ones_like(attended[..., :1])))
    mean = jnp.where(count > 0, summed / jnp.maximum(count, 1), v)
    return jnp.moveaxis(mean, 1, 2).astype(v.dtype)


def by_position(x: Float[Array, 'b h g w d'], members: Int[Array, 'b h g w'], length: int) -> Float[Array, 'b h l d']:
    """For each position the sum over the sets that it is in."""
    empty = jnp.zeros((length, x.shape[-1]), x.dtype)
    # Mapped: where batch and heads are indices of the scatter too, XLA gathers them from all devices.
    add = jax.vmap(jax.vmap(lambda x, members: empty.at[members].add(x)))
    return add(x, members)


@register('routing')
class RoutingAttention(Routed):
    """Routing attention: each centroid takes the `⌈length / clusters⌉` tokens nearest to it, by query and key together.

    Not causal in the strict sense, as published: a position attends only to those before it, but whether it is in a
    cluster depends on later tokens, which may crowd it out. So likelihoods of a causal model come out slightly too
    good, and decoding, which knows no later token, differs from the parallel form: it chooses among the tokens so
    far. A padded row has clusters of the padded length.
    """

    looks_ahead = True

    def attend_from(self, x, q, k, v, *, valid=None, drop=None):
        del x
        scores = similarity(directions(q, k), self.centroids.value)
        members = choose(scores, -(-q.shape[1] // self.number), valid)
        return attend_routing(q, k, v, members, causal=self.causal, valid=valid, drop=drop)
