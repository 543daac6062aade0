"""Sparse routing attention: k-means clusters of equal size, attention within each (Roy et al. 2021)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.baselines.local import attend_local
from combiner.core.mechanism import Count
from combiner.core.registry import register
from combiner.core.routed import Routed, directions, similarity
from combiner.ops.softmax import Drop, einsum, mask_logits, unnormalized_softmax
from combiner.patterns import check_positive


def choose(
    similarity: Float[Array, 'b l h g'], size: int, valid: Bool[Array, 'b l'] | None = None
) -> Int[Array, 'b h g w']:
    """Returns the positions of the `size` tokens most similar to each centroid, in order; padding comes last."""
    if valid is not None:
        similarity = mask_logits(similarity, valid[:, :, None, None])
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
    """Attends by softmax within each of `g` sets of `w` positions; a position in several of them gets the mean.

        A(i) = mean_{g: i ∈ S_g} Σ_{j ∈ S_g} softmax_j(q_i·k_j/√d) v_j        A(i) = v_i where i is in none

    O(g·w²) time and memory: O(l^1.5) for `g = w = √l`.

    Args:
        members: positions of each set, ascending.
        q, k, v, causal, valid, drop: see `core.mechanism`.
    """
    batch, length, heads, width = q.shape
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q * width**-0.5, k, v))

    def by_set(x: Array) -> Array:
        flat = members.reshape(batch, heads, -1, 1)
        return jnp.take_along_axis(x, flat, axis=2).reshape(*members.shape, x.shape[-1])

    routed_q, routed_k, routed_v = map(by_set, (q, k, v))
    logits = einsum('bhgqd,bhgkd->bhgqk', routed_q, routed_k)
    if causal:
        logits = mask_logits(logits, jnp.tri(members.shape[-1], dtype=bool))
    if valid is not None:
        logits = mask_logits(logits, by_set(valid[:, None, :, None])[..., None, :, 0])
    (weights,), total = unnormalized_softmax(logits, drop=drop)
    attended = einsum('bhgqk,bhgkd->bhgqd', weights.astype(v.dtype), routed_v) / total
    summed, count = (by_position(x, members, length) for x in (attended, jnp.ones_like(attended[..., :1])))
    mean = jnp.where(count > 0, summed / jnp.maximum(count, 1), v)
    return jnp.moveaxis(mean, 1, 2).astype(v.dtype)


def by_position(x: Float[Array, 'b h g w d'], members: Int[Array, 'b h g w'], length: int) -> Float[Array, 'b h l d']:
    """Returns for each position the sum over its sets."""
    empty = jnp.zeros((length, x.shape[-1]), x.dtype)
    # Mapped: with batch and heads as indices of the scatter, XLA would gather them from all devices.
    add = jax.vmap(jax.vmap(lambda x, members: empty.at[members].add(x)))
    return add(x, members)


@register('routing')
class Routing(Routed):
    """Routing attention: each centroid takes the `window` tokens nearest to it, by query and key together.

    Not strictly causal, as published: a position attends only to earlier ones, but its being in a cluster depends on
    later tokens, which may take its place. So likelihoods of a causal model are slightly too good, and decoding, which
    has no later token, differs from the parallel form: it chooses among the tokens so far. A padded row has clusters of
    the padded length.

    In the paper some heads attend locally instead: here `local_heads`, each position to its block and to the block
    before (bidirectional: and after) it, as the authors set it. These heads have no centroids and do not use the
    future. They are spread evenly, so that devices that share the heads hold both kinds: the last of all, or if heads
    and local heads have a common divisor, the last of each of that many groups.

    Attributes:
        window: tokens of a cluster, the authors' `sparsity_cluster_attention_window`; None for `⌈length / clusters⌉`.
            With more, clusters overlap; with fewer, some tokens are in none.
        local_heads: number of heads that attend locally.
        block: positions in a block of a local head, the authors' `query_shape` and `memory_flange`.
    """

    window: int | None = None
    local_heads: Count = 0
    block: int = 64

    uses_future = True

    def routing_heads(self, heads: int) -> int:
        """Returns the number of heads that route.

        Raises:
            ValueError: no head would route, or `local_heads` is negative.
        """
        if not 0 <= self.local_heads < heads:
            raise ValueError(
                f'local_heads={self.local_heads} must be at least 0 and leave one of {heads} heads to route; '
                "where none is to, use 'local'"
            )
        return heads - self.local_heads

    def attend(self, q, k, v, context):
        """Attends with the heads of either kind separately, and restores their order."""
        centroids, valid, drop = self.own_variables(context)['centroids'], context.valid, context.drop
        routing, local = zip(*map(self._kinds, (q, k, v)), strict=True)
        scores = similarity(directions(*routing[:2]), centroids)
        window = -(-q.shape[1] // self.number) if self.window is None else self.window
        check_positive(window=window)
        members = choose(scores, window, valid)
        attended = attend_routing(*routing, members=members, causal=self.causal, valid=valid, drop=drop)
        if not self.local_heads:
            return attended
        near = attend_local(*local, block=self.block, overlap=self.block, causal=self.causal, valid=valid, drop=drop)
        kinds = [self._by_group(kind, q.shape[2]) for kind in (attended, near)]
        return jnp.concatenate(kinds, axis=3).reshape(v.shape)

    def update_state(self, q, k, context):
        """Moves the centroids by the heads that route."""
        return super().update_state(self._kinds(q)[0], self._kinds(k)[0], context)

    def _kinds(self, x: Float[Array, 'b l h d']) -> list[Array]:
        """Returns the heads that route, and the heads that attend locally."""
        heads = x.shape[2]
        grouped = self._by_group(x, heads)
        kinds = jnp.split(grouped, [grouped.shape[3] * self.routing_heads(heads) // heads], axis=3)
        return [kind.reshape(*x.shape[:2], -1, x.shape[3]) for kind in kinds]

    def _by_group(self, x: Float[Array, 'b l k d'], heads: int) -> Float[Array, 'b l n g d']:
        """Splits all of the heads, or those of one kind, into the `n` equal groups that all of them have."""
        return x.reshape(*x.shape[:2], math.gcd(heads, self.local_heads), -1, x.shape[3])
