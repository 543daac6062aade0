"""Dense softmax attention: what every other mechanism approximates."""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner import costs, patterns
from combiner.attention.base import Attention
from combiner.attention.joint import Drop, dot, joint_exp, masked
from combiner.attention.registry import register


class Cache(NamedTuple):
    """All keys and values so far."""

    k: Float[Array, 'b l h d']
    v: Float[Array, 'b l h d']


def attend_full(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b m h d'],
    v: Float[Array, 'b m h d'],
    mask: Bool[Array, '#b #l m'] | None,
    *,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """`softmax(q·k/√d) v` (Vaswani et al. 2017), O(l·m) time and memory.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        mask: which keys each query sees; a query that sees none gets zeros.
        drop: dropout of the weights.
    """
    logits = dot('blhd,bmhd->bhlm', q * q.shape[-1] ** -0.5, k)
    (weights,), total = joint_exp(masked(logits, None if mask is None else mask[:, None]), drop=drop)
    attended = dot('bhlm,bmhd->bhld', weights.astype(v.dtype), v) / total
    return jnp.moveaxis(attended, 1, 2).astype(v.dtype)


@register('full')
class FullAttention(Attention):
    """Dense softmax attention."""

    full_support = True
    packs = True

    def pattern(self, length: int) -> patterns.Pattern:
        return patterns.full(length, causal=self.causal)

    def cost(self, length: int) -> patterns.Cost:
        return costs.full(length, causal=self.causal)

    def attend(self, q, k, v, *, valid=None, segments=None, drop=None):
        masks = [None if valid is None else valid[:, None]]
        if self.causal:
            masks.append(jnp.tri(q.shape[1], dtype=bool)[None])
        if segments is not None:
            masks.append(segments[:, :, None] == segments[:, None, :])
        masks = [mask for mask in masks if mask is not None]
        return attend_full(q, k, v, functools.reduce(operator.and_, masks) if masks else None, drop=drop)

    def start(self, x, q, k, v, counts, capacity):
        room = ((0, 0), (0, capacity - q.shape[1]), (0, 0), (0, 0))
        return Cache(jnp.pad(k, room), jnp.pad(v, room))

    def step(self, cache, index, x, q, k, v):
        rows = jnp.arange(index.shape[0])
        cache = Cache(cache.k.at[rows, index].set(k), cache.v.at[rows, index].set(v))
        past = jnp.arange(cache.k.shape[1]) <= index[:, None, None]
        return cache, attend_full(q[:, None], *cache, past)[:, 0]
