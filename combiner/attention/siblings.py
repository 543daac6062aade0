"""The spans of `combiner_logsparse`: at every level `t`, the block of `2^t` positions next to a position's own.

Two neighbouring blocks are the siblings of each other. Left siblings have even numbers and are seen from the block
after them, right siblings have odd numbers and are seen from the block before.

Below 64 positions, a block's levels are one dense masked product of its queries with the 31 summaries of a side, and
one of the summaries' queries with the block's keys. Above, a block has at each level one span of a side, which it
either sees or is part of. A local expectation is summed over each block by itself, and then over the blocks.

Letters: as in `layout`; `s` spans, `u` levels beyond blocks, `x` features, values or sums.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.attention.folds import NOBODY, Lifted, along, finish, fold, join, lift, of_same
from combiner.attention.joint import dot, masked
from combiner.attention.layout import split
from combiner.attention.pooling import Pools
from combiner.attention.steps import visit
from combiner.attention.sums import Sums, over, weigh

LEFT, RIGHT = 0, 1


class Siblings(NamedTuple):
    """Summaries that the positions of a block may see; heads first, or (`turn`) blocks first.

    Attributes:
        key: summary keys.
        value: local expectations.
        labels: whose members they are of (see `folds`).
        uses: which positions see which, labels aside.
    """

    key: Float[Array, 'h m s d']
    value: Float[Array, 'h m s d']
    labels: Int[Array, 'm s'] | None
    uses: Bool[Array, '#m #c s']

    def turn(self) -> 'Siblings':
        """With heads and blocks exchanged."""
        return self._replace(key=self.key.swapaxes(0, 1), value=self.value.swapaxes(0, 1))

    def logits(self, q: Float[Array, 'h m c d'], labels: Int[Array, 'm c'] | None) -> Float[Array, 'h m c s']:
        """Of all queries, masked where a query does not see a summary."""
        return masked(dot('hmqd,hmsd->hmqs', q, self.key), _both(self.uses, of_same(labels, self.labels)))


def within_blocks(
    q: Float[Array, 'h m c d'],
    k: Float[Array, 'h m c d'],
    v: Float[Array, 'h m c d'],
    labels: Int[Array, 'm c'] | None,
    side: int,
    pools: Pools,
) -> Siblings:
    """The siblings of one side that are smaller than a block of at least 4, at levels 1 and up."""
    position = np.arange(q.shape[2])
    levels = range(1, len(position).bit_length() - 1)
    spans, found = lift(q, k, labels, pools), []
    for _ in levels:
        spans = fold(spans, 2, pools, last=side == LEFT)
        found.append(_of_side(spans, side))
    spans = join(found, jnp.concatenate)
    query, key = finish(spans, pools, q.dtype)
    level = np.concatenate([np.full(len(position) >> t + 1, t) for t in levels])
    number = np.concatenate([np.arange(side, len(position) >> t, 2) for t in levels])
    members = jnp.asarray(position >> level[:, None] == number[:, None])[None]
    value = weigh(query, k, v, _both(members, of_same(spans.labels, labels))).average().astype(v.dtype)
    return Siblings(key, value, spans.labels, jnp.asarray(position[:, None] >> level == number ^ 1)[None])


def beyond_blocks(
    q: Float[Array, 'p h d'],
    k: Float[Array, 'p h d'],
    v: Float[Array, 'p h d'],
    labels: Int[Array, 'm c'] | None,
    side: int,
    pools: Pools,
    *,
    block: int,
    batch: int,
    steps: int,
) -> Siblings:
    """The siblings of one side that consist of whole blocks: for each block one at every level. Blocks come first."""

    def pool(q, k, labels):
        spans = fold(lift(split(q[None], block), split(k[None], block), labels, pools), block, pools, last=last)
        return spans._replace(q=spans.q.swapaxes(0, 1), k=spans.k.swapaxes(0, 1))

    def look(k, v, labels, query, whose, is_part):
        mask = _both(is_part[..., None], of_same(whose, labels))
        sums = weigh(query.swapaxes(0, 1), split(k[None], block), split(v[None], block), mask)
        return jax.tree.map(lambda x: x.swapaxes(0, 1), sums)

    last = side == LEFT
    spans = _by_level(visit(pool, steps, batch, q, k, labels), batch, side, pools)
    query, key = (_blocks_first(x) for x in finish(spans, pools, q.dtype))
    whose = None if spans.labels is None else spans.labels.reshape(len(query), -1)
    blocks = len(query) // batch
    levels = np.arange(query.shape[2])
    number = np.arange(blocks)[:, None] >> levels
    sees = (number & 1 != side) & ((number ^ 1) << levels < blocks)
    sees, is_part = (jnp.tile(jnp.asarray(mask), (batch, 1)) for mask in (sees, number & 1 == side))
    sums = visit(look, steps, batch, k, v, labels, query, whose, is_part)
    return Siblings(key, _expectations(sums, batch).astype(v.dtype), whose, sees[:, None])


def _by_level(spans: Lifted, batch: int, side: int, pools: Pools) -> Lifted:
    """From blocks as spans to the spans of one side, for every block those it is part of or sees: `h b n u f`."""
    blocks = len(spans.q) // batch
    count = (blocks - 1).bit_length()
    labels = None if spans.labels is None else spans.labels[:, None]
    q, k, labels = (
        None if x is None else _in_rows(x, batch, 1 << count, fill)
        for x, fill in ((spans.q, pools.q.neutral(spans.q)), (spans.k, pools.k.neutral(spans.k)), (labels, NOBODY))
    )
    spans, found = Lifted(q[..., 0, :], k[..., 0, :], None if labels is None else labels[0, ..., 0]), []
    for level in range(count):
        spans = fold(spans, 2, pools, last=side == LEFT) if level else spans
        found.append(along(_of_side(spans, side), partial(_repeat, times=2 << level, length=blocks)))
    return join(found, jnp.stack)


def _expectations(sums: Sums, batch: int) -> Float[Array, 'm h u d']:
    """For every block and level, that of the span which the block is part of or sees, from the sums of all blocks."""
    blocks, levels = len(sums.values) // batch, sums.values.shape[2]
    fills = (jnp.finfo(sums.top.dtype).min / 2, 0, 0)
    sums = Sums(*(_in_rows(x, batch, 1 << levels, fill) for x, fill in zip(sums, fills, strict=True)))
    found = []
    for level in range(levels):
        pairs = (x[:, :, :, level].reshape(*x.shape[:2], -1, 2 << level, x.shape[-1]) for x in sums)
        average = over(Sums(*pairs), axis=3).average()
        found.append(_repeat(average, 2, times=2 << level, length=blocks))
    return _blocks_first(jnp.stack(found, axis=3))


def _of_side(spans: Lifted, side: int) -> Lifted:
    """Every other span."""
    return along(spans, lambda x, axis: jax.lax.slice_in_dim(x, side, None, 2, axis))


def _repeat(x: Shaped[Array, '...'], axis: int, *, times: int, length: int) -> Shaped[Array, '...']:
    """Every element so many times in a row, up to a length."""
    return jax.lax.slice_in_dim(jnp.repeat(x, times, axis), 0, length, axis=axis)


def _in_rows(x: Shaped[Array, 'm h *rest'], batch: int, count: int, fill: Any) -> Shaped[Array, 'h b n *rest']:
    """By head and sequence, with room for `count` blocks of each."""
    x = jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 2, 0)
    return jnp.pad(x, ((0, 0), (0, 0), (0, count - x.shape[2]), *((0, 0),) * (x.ndim - 3)), constant_values=fill)


def _blocks_first(x: Float[Array, 'h b n u d']) -> Float[Array, 'm h u d']:
    return jnp.moveaxis(x.reshape(x.shape[0], -1, *x.shape[3:]), 0, 1)


def _both(mask: Bool[Array, '...'], other: Bool[Array, '...'] | None) -> Bool[Array, '...']:
    return mask if other is None else mask & other
