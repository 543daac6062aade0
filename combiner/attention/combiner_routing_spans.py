"""The summaries of what blocks of a cluster hold, and who sees them.

Letters: `h` head, `b` batch, `l` length, `d` head width, `n` blocks, `c` place in a block, `t` stretches of
consecutive positions, `s` summaries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.attention.combiner_routing_places import Places, take
from combiner.attention.joint import dot, masked, softmax
from combiner.attention.layout import Summary, scaled
from combiner.attention.pooling import Pools


def prefixes(
    q: Float[Array, 'h b n c d'],
    k: Float[Array, 'h b n c d'],
    v: Float[Array, 'h b n c d'],
    filled: Bool[Array, 'h b n c'],
    *,
    pools: Pools,
) -> Summary:
    """The summary of every beginning of a block: that at `c` is of the tokens up to `c`; zeros in an empty block.

    O(c) time and memory for each token, as its span has at most `c` members.
    """
    some = jnp.broadcast_to(filled[..., :1], filled.shape)

    def scan(pool, x):
        features = jax.lax.associative_scan(pool.combine, pool.lifted(x, filled), axis=3)
        return pool.finished(features, some).astype(x.dtype)

    logits = masked(dot('hbncd,hbnkd->hbnck', scaled(scan(pools.q, q)), k), filled[..., None, :])
    local = softmax(masked(logits, jnp.tri(k.shape[3], dtype=bool))).astype(v.dtype)
    return Summary(scan(pools.k, k), dot('hbnck,hbnkd->hbncd', local, v).astype(v.dtype))


class Seen(NamedTuple):
    """Summaries, and which of them each position of a stretch sees."""

    key: Float[Array, 'h b t s d']
    value: Float[Array, 'h b t s d']
    seen: Bool[Array, 'h b t c s']

    def logits(self, q: Float[Array, 'h b l d']) -> Float[Array, 'h b l s']:
        """How much each position wants of each summary of its stretch."""
        logits = masked(dot('hbtcd,hbtsd->hbtcs', self._stretches(q), self.key), self.seen)
        return logits.reshape(*q.shape[:2], -1, logits.shape[-1])[:, :, : q.shape[2]]

    def read(self, weights: Float[Array, 'h b l s']) -> Float[Array, 'h b l d']:
        """The weighted sums of the summaries' values."""
        values = dot('hbtcs,hbtsd->hbtcd', self._stretches(weights.astype(self.value.dtype)), self.value)
        return values.reshape(*weights.shape[:2], -1, values.shape[-1])[:, :, : weights.shape[2]]

    def _stretches(self, x):
        return stretches(x, self.seen.shape[3])


def stretches(x: Array, size: int, fill: int = 0) -> Array:
    """Cuts axis 2 into stretches of `size`, padding the last."""
    room = [(0, 0)] * x.ndim
    room[2] = (0, -x.shape[2] % size)
    x = jnp.pad(x, room, constant_values=fill)
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def closed(spans: Summary, where: Places, length: int) -> Seen:
    """The summaries of whole blocks, in the order in which they fill up, for the positions after that."""
    size = spans.key.shape[3]
    ends = where.at[..., size - 1 :: size]
    first = jnp.argsort(ends, axis=-1)[..., : max(1, length // size)]
    key, value = (take(x[:, :, :, -1], first)[:, :, None] for x in spans)
    return Seen(key, value, (take(ends, first)[..., None, :] < jnp.arange(length)[:, None])[:, :, None])


def others(spans: Summary, where: Places, size: int) -> Seen:
    """The summaries of all blocks `[h b n d]`, for the positions of other blocks."""
    blocks = spans.key.shape[2]
    own = where.slot[..., None] // size == jnp.arange(blocks)
    some = where.at[..., None, ::size] < where.slot.shape[-1]
    return Seen(spans.key[:, :, None], spans.value[:, :, None], (some & ~own)[:, :, None])


def still_open(spans: Summary, where: Places, clusters: Int[Array, 'h b l'], number: int) -> Seen:
    """The summaries of what unfinished blocks hold, for the positions between one token of a block and its next.

    A position needs that of the last token before it in each other cluster. Such a token either lies in the same
    stretch of `number` positions, or was the last of its cluster when the stretch began: `2·number` candidates for a
    whole stretch, so that no position needs a gather of its own.
    """
    length, size = clusters.shape[-1], spans.key.shape[3]
    key, value = (take(x.reshape(*x.shape[:2], -1, x.shape[-1]), where.slot) for x in spans)
    unfinished = (clusters < number) & (where.slot % size != size - 1)
    here = jnp.arange(length)[None, None]
    until = jnp.where(unfinished, where.following, 0)  # seen after `here` and before `until`

    labels = stretches(clusters, number, fill=number)
    held = labels[..., None] == jnp.arange(number)
    places_ = stretches(here, number)
    latest = jnp.where(held, places_[..., None], -1).max(axis=3)
    before = jnp.pad(jax.lax.cummax(latest, axis=2)[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=-1)

    def candidates(x: Array) -> Array:
        at_start = take(x, jnp.maximum(before, 0).reshape(*before.shape[:2], -1))
        return jnp.concatenate([stretches(x, number), at_start.reshape(*before.shape, *x.shape[3:])], axis=3)

    of = jnp.concatenate([jnp.broadcast_to(places_, labels.shape), before], axis=3)[..., None, :]
    now = places_[..., None]
    seen = (of >= 0) & (of < now) & (now < candidates(until)[..., None, :])
    return Seen(candidates(key), candidates(value), seen)
