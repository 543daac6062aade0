"""The spans of `combiner_logsparse` that consist of whole blocks.

A block has at each level one span of a side, which it either sees or is part of. A local expectation is summed over
each block by itself, and then over the blocks: so a block's keys and values are read once for all levels.

Letters: as in `layout`, and `u` levels beyond blocks.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from combiner.attention.folds import NOBODY, Lifted, along, finish, fold, join, lift, of_same
from combiner.attention.layout import split, split_all
from combiner.attention.pooling import Pools
from combiner.attention.siblings import LEFT, Siblings, of_side
from combiner.attention.steps import Steps, visit
from combiner.attention.sums import Sums, over, weigh


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
    steps: Steps,
) -> Siblings:
    """The siblings of one side that consist of whole blocks: for each block one at every level. Blocks come first."""

    def pool(q, k, labels):
        q, k = split_all(block, q, k)
        spans = fold(lift(q, k, labels, pools), block, pools, last=last)
        return spans._replace(q=spans.q.swapaxes(0, 1), k=spans.k.swapaxes(0, 1))

    def look(k, v, labels, query, whose, is_part):
        mask = of_same(whose, labels, is_part[..., None])
        sums = weigh(query.swapaxes(0, 1), split(k[None], block), split(v[None], block), mask)
        return jax.tree.map(lambda x: x.swapaxes(0, 1), sums)

    last = side == LEFT
    spans = _by_level(visit(pool, steps, batch, q, k, labels), batch, side, pools)
    query, key = (_blocks_first(x) for x in finish(spans, pools, q.dtype))
    whose = None if spans.labels is None else spans.labels.reshape(len(query), -1)
    blocks = len(query) // batch
    levels = np.arange(query.shape[2])
    number = np.arange(blocks)[:, None] >> levels
    is_part = jnp.tile(jnp.asarray(number & 1 == side), (batch, 1))
    sums = visit(look, steps, batch, k, v, labels, query, whose, is_part)
    return Siblings(key, _expectations(sums, batch).astype(v.dtype), whose, ~is_part[:, None])


def _by_level(spans: Lifted, batch: int, side: int, pools: Pools) -> Lifted:
    """From blocks as spans to the spans of one side, for every block those it is part of or sees: `h b n u f`."""
    blocks = len(spans.q) // batch
    count = (blocks - 1).bit_length()
    q, k = (_in_rows(x, batch, 1 << count, p.neutral(x))[..., 0, :] for x, p in zip(spans[:2], pools, strict=True))
    labels = spans.labels
    if labels is not None:
        labels = _in_rows(labels[:, None], batch, 1 << count, NOBODY)[0, ..., 0]
    spans, found = Lifted(q, k, labels), []
    for level in range(count):
        spans = fold(spans, 2, pools, last=side == LEFT) if level else spans
        found.append(along(of_side(spans, side), partial(_repeat, times=2 << level, length=blocks)))
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


def _repeat(x: Shaped[Array, '...'], axis: int, *, times: int, length: int) -> Shaped[Array, '...']:
    """Every element so many times in a row, up to a length."""
    return jax.lax.slice_in_dim(jnp.repeat(x, times, axis), 0, length, axis=axis)


def _in_rows(x: Shaped[Array, 'm h *rest'], batch: int, count: int, fill: Any) -> Shaped[Array, 'h b n *rest']:
    """By head and sequence, with room for `count` blocks of each."""
    x = jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 2, 0)
    return jnp.pad(x, ((0, 0), (0, 0), (0, count - x.shape[2]), *((0, 0),) * (x.ndim - 3)), constant_values=fill)


def _blocks_first(x: Float[Array, 'h b n u d']) -> Float[Array, 'm h u d']:
    return jnp.moveaxis(x.reshape(x.shape[0], -1, *x.shape[3:]), 0, 1)
