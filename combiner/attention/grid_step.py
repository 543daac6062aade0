"""Decoding one token over both axes of a grid; `grid_cache` says when each summary is computed.

Letters: `h` head, `d` head width, `n` grid rows, `c` columns, `k` keys.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.attention.grid_cache import Above, Beside, Cache
from combiner.attention.layout import Summary, scaled
from combiner.attention.pooling import Pools
from combiner.attention.relations import Relation
from combiner.attention.sums import Sums, look, together

Mix = Callable[[Sums, list[Sums], list[Sums]], Array]


def in_one_softmax(direct: Sums, above: list[Sums], beside: list[Sums]) -> Float[Array, '*queries d']:
    """Direct terms, vertical and horizontal spans, all in one softmax."""
    return together(direct, *above, *beside).average()


def step(
    cache: Cache,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    *,
    pools: Pools,
    relations: Sequence[Relation] = (),
    mix: Mix = in_one_softmax,
) -> tuple[Cache, Float[Array, 'b h d']]:
    """One token of each sequence, at position `index`; O(columns + rows).

    Args:
        cache: what was there.
        index: the positions.
        q: queries, not scaled.
        k: keys.
        v: values.
        pools: as for `grid_cache.start`.
        relations: as for `grid_cache.start`.
        mix: how the direct terms, the vertical and the horizontal spans come together.
    """
    one = partial(_step, pools=pools, relations=relations, mix=mix)
    return jax.vmap(one)(cache, index, q, k, v)


def _step(cache, index, q, k, v, pools, relations, mix):
    _, rows, columns, _ = cache.k.shape
    row, column = jnp.divmod(index, columns)
    cache = cache._replace(k=cache.k.at[:, row, column].set(k), v=cache.v.at[:, row, column].set(v))
    in_row = look(scaled(q), cache.k[:, row], cache.v[:, row], jnp.arange(columns) <= column)
    in_column = look(scaled(q), cache.k[:, :, column], cache.v[:, :, column], jnp.arange(rows) < row)
    above, beside = [], []
    if cache.above is not None:
        state, above = _step_above(cache.above, cache, row, column, q, k, pools)
        cache = cache._replace(above=state)
    if cache.beside is not None:
        state, beside = _step_beside(cache.beside, cache, row, column, q, pools, relations)
        cache = cache._replace(beside=state)
    return cache, mix(together(in_row, in_column), above, beside)[:, 0, 0].astype(v.dtype)


def _step_above(above, cache, row, column, q, k, pools):
    """The vertical spans; the token's column gets its summary for the next row."""
    _, rows, columns, _ = cache.k.shape
    key, value = (span[:, row % 2] for span in above.spans)
    sums = look(scaled(q), key, value, (jnp.arange(columns) != column) & (row > 0))

    lifted_q = pools.q.combine(above.q[:, column], pools.q.lift(q))
    lifted_k = pools.k.combine(above.k[:, column], pools.k.lift(k))
    local_q, up_to = scaled(pools.q.finish(lifted_q).astype(q.dtype)), jnp.arange(rows) <= row
    local_v = look(local_q, cache.k[:, :, column], cache.v[:, :, column], up_to).average()[:, 0, 0]
    new = Summary(pools.k.finish(lifted_k), local_v)
    spans = jax.tree.map(lambda held, one: _put(held, one, (row + 1) % 2, column), above.spans, new)
    return Above(above.q.at[:, column].set(lifted_q), above.k.at[:, column].set(lifted_k), spans), [sums]


def _step_beside(beside, cache, row, column, q, pools, relations):
    """The horizontal spans, with that of the row above, without the token's column, new."""
    _, rows, columns, _ = cache.k.shape
    recent = _put(beside.q, q, row % 2, column)
    last = (row - 1) % rows  # in row 0 the last row's place, which nothing ever reads
    above_q, above_k, above_v = recent[:, 1 - row % 2], cache.k[:, last], cache.v[:, last]
    spans, sums = [], []
    for relation, span in zip(relations, beside.spans, strict=True):
        members = jnp.asarray(relation.matrix(columns))[column]
        value = look(scaled(pools.q(above_q, members)), above_k, above_v, members).average()[:, 0, 0]
        new = Summary(pools.k(above_k, members), value)
        spans.append(jax.tree.map(lambda held, one: _put(held, one, last, column), span, new))
        seen = (jnp.arange(rows) < row) & members.any()
        sums.append(look(scaled(q), spans[-1].key[:, :, column], spans[-1].value[:, :, column], seen))
    return Beside(recent, tuple(spans)), sums


def _put(held: Float[Array, 'h n c d'], one: Float[Array, 'h d'], row: Array, column: Array) -> Float[Array, 'h n c d']:
    return held.at[:, row, column].set(one.astype(held.dtype))
