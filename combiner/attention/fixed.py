"""Combiner-Fixed: own block directly, other blocks through one max-pooled summary each (Combiner, section 4.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner import patterns
from combiner.attention.base import Attention
from combiner.attention.blocks import Recent, Summary, merge, split, split_valid, summarise
from combiner.attention.joint import Drop, dot, joint_exp, masked
from combiner.attention.registry import register


def attend_combiner_fixed(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    block: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Equation (7) with `Ω_i^0` = own block (causal: up to `i`), one span per earlier (bidirectional: other) block.

    O(l·(block + l/block)) time and memory, least at `block = √l`. `block ≥ l` and `block = 1` are softmax
    attention. All blocks' summaries are one matrix `[b h n d]`, so that the span logits of all queries are
    one product with it.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        block: positions in a block; the last block may be partial.
        causal: whether a position sees only itself and what is before it.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the joint weights.
    """
    length = q.shape[1]
    inside = split_valid(valid, length, block, causal=causal)
    q, k, v = (split(x, block) for x in (q * q.shape[-1] ** -0.5, k, v))
    spans = summarise(q, k, v, inside)
    blocks = q.shape[2]

    own = dot('bhnqd,bhnkd->bhnqk', q, k)
    flat_q = q.reshape(*q.shape[:2], -1, q.shape[-1])
    far = dot('bhld,bhmd->bhlm', flat_q, spans.key).reshape(*own.shape[:-1], blocks)
    others = jnp.tri(blocks, k=-1, dtype=bool) if causal else ~jnp.eye(blocks, dtype=bool)
    others = others[:, None, :]
    if inside is not None:
        own = masked(own, inside[..., None, :])
        others = others & inside.any(-1)[..., None, None, :]
    if causal:
        own = masked(own, jnp.tri(block, dtype=bool))

    (own, far), total = joint_exp(own, masked(far, others), drop=drop)
    attended = dot('bhnqk,bhnkd->bhnqd', own.astype(v.dtype), v)
    flat_far = far.astype(v.dtype).reshape(*flat_q.shape[:-1], blocks)
    attended += dot('bhlm,bhmd->bhld', flat_far, spans.value).reshape(attended.shape)
    return merge((attended / total).astype(v.dtype), length)


class Cache(NamedTuple):
    """The open block, and the summaries of the closed ones, whose keys are dropped: O(block + l/block)."""

    recent: Recent
    spans: Summary


def _step(cache, index, q, k, v):
    """One token of one sequence; `q`, `k`, `v` are `[h, d]`, `q` already scaled."""
    block = cache.recent.k.shape[1]
    own, here = index // block, index % block
    recent = jax.tree.map(lambda held, new: held.at[:, here].set(new), cache.recent, Recent(q, k, v))
    inside = jnp.arange(block) <= here
    near = masked(dot('hd,hcd->hc', q, recent.k), inside)
    far = dot('hd,hnd->hn', q, cache.spans.key)
    (near, far), total = joint_exp(near, masked(far, jnp.arange(far.shape[-1]) < own))
    attended = dot('hc,hcd->hd', near.astype(v.dtype), recent.v)
    attended += dot('hn,hnd->hd', far.astype(v.dtype), cache.spans.value)
    open_span = summarise(recent.q, recent.k, recent.v, inside)  # final, and first seen, once the block is full
    spans = jax.tree.map(lambda closed, one: closed.at[:, own].set(one), cache.spans, open_span)
    return Cache(recent, spans), (attended / total).astype(v.dtype)


@register('combiner_fixed')
class CombinerFixedAttention(Attention):
    """Combiner-Fixed with blocks of `block` positions; None for the power of two that costs least."""

    block: int | None = None

    full_support = True

    def pattern(self, length: int) -> patterns.Pattern:
        return patterns.combiner_fixed(length, causal=self.causal, block=self._block(length))

    def cost(self, length: int) -> patterns.Cost:
        return patterns.combiner_fixed_cost(length, self._block(length), causal=self.causal)

    def attend(self, q, k, v, *, valid=None, drop=None):
        block = self._block(q.shape[1])
        return attend_combiner_fixed(q, k, v, block=block, causal=self.causal, valid=valid, drop=drop)

    def start(self, x, q, k, v, counts, capacity):
        block = self._block(capacity)
        q, k, v = (split(a, block) for a in (q * q.shape[-1] ** -0.5, k, v))
        room = ((0, 0), (0, 0), (0, -(-capacity // block) - q.shape[2]), (0, 0))
        spans = jax.tree.map(lambda a: jnp.pad(a, room), summarise(q, k, v))
        at = jnp.minimum(counts // block, q.shape[2] - 1)[:, None, None, None, None]
        return Cache(Recent(*(jnp.take_along_axis(a, at, axis=2)[:, :, 0] for a in (q, k, v))), spans)

    def step(self, cache, index, x, q, k, v):
        return jax.vmap(_step)(cache, index, q * q.shape[-1] ** -0.5, k, v)

    def _block(self, length):
        return self.size_or_cheapest(self.block, patterns.combiner_fixed_cost, length)
