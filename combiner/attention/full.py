"""Softmax attention: what every other mechanism approximates."""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner import costs, patterns
from combiner.attention.base import Attention
from combiner.attention.blockwise import attend_blockwise
from combiner.attention.joint import Drop, dot, joint_exp, masked
from combiner.attention.kernels import attend_by_library, attend_splash, choose
from combiner.attention.registry import register

IN_LINEAR_MEMORY = {'blockwise': attend_blockwise, 'cudnn': attend_by_library, 'splash': attend_splash}


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


def support_mask(
    length: int,
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
) -> Bool[Array, '#b #l l'] | None:
    """Which keys each query sees: the past (causal) that is valid and of its own segment; None for all."""
    masks = [None if valid is None else valid[:, None]]
    if causal:
        masks.append(jnp.tri(length, dtype=bool)[None])
    if segments is not None:
        masks.append(segments[:, :, None] == segments[:, None, :])
    masks = [mask for mask in masks if mask is not None]
    return functools.reduce(operator.and_, masks) if masks else None


@register('full')
class FullAttention(Attention):
    """Softmax attention, exact; `implementation` is a name of `kernels`, None for the best that the platform has.

    Dropout of weights takes the dense form, O(l²) memory.
    """

    implementation: str | None = None

    full_support = True
    packs = True

    def pattern(self, length: int) -> patterns.Pattern:
        return patterns.full(length, causal=self.causal)

    def cost(self, length: int) -> patterns.Cost:
        return costs.full(length, causal=self.causal)

    def attend(self, q, k, v, *, valid=None, segments=None, drop=None):
        masks = {'causal': self.causal, 'valid': valid, 'segments': segments}
        chosen = choose(self.implementation, q, dropping=drop is not None)
        if chosen == 'dense':
            return attend_full(q, k, v, support_mask(q.shape[1], **masks), drop=drop)
        return IN_LINEAR_MEMORY[chosen](q, k, v, **masks)

    def start(self, x, q, k, v, counts, capacity):
        room = ((0, 0), (0, capacity - q.shape[1]), (0, 0), (0, 0))
        return Cache(jnp.pad(k, room), jnp.pad(v, room))

    def step(self, cache, index, x, q, k, v):
        rows = jnp.arange(index.shape[0])
        cache = Cache(cache.k.at[rows, index].set(k), cache.v.at[rows, index].set(v))
        past = jnp.arange(cache.k.shape[1]) <= index[:, None, None]
        return cache, attend_full(q[:, None], *cache, past)[:, 0]
