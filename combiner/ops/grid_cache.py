"""Incremental decoding over both axes of a grid: O(columns + rows) work for a token, O(l) memory.

The span above row `r` in column `c` is first used in row `r`, and complete after `(r - 1, c)`: its summary is computed
then. The span of row `t` without column `c` is first used at `(t + 1, c)`, and is computed there. So each token
computes one summary of either kind, over at most a column or a row.

Letters: `b` batch, `l` length, `h` head, `d` head width, `n` grid rows, `c` columns, `f` features of a pooling, `k`
keys.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.ops import grid
from combiner.ops.blocks import KeyGroup, blocks_by_sequence, scale_queries
from combiner.ops.grid import BEFORE, Grid, Relation, make_grid, transpose_lines
from combiner.ops.pooling import Pool, Pools
from combiner.ops.softmax import PartialSoftmax, merge_partials, partial_softmax_one


class VerticalState(NamedTuple):
    """Vertical spans: encoded queries and keys of each column, reduced; summaries for this row and the next."""

    q: Float[Array, 'b h c f']
    k: Float[Array, 'b h c f']
    spans: KeyGroup


class HorizontalState(NamedTuple):
    """Horizontal spans: unscaled queries of this row and the last by parity; the summaries of all rows, by relation."""

    q: Float[Array, 'b h 2 c d']
    spans: tuple[KeyGroup, ...]


class Cache(NamedTuple):
    """Keys and values of all cells, and the states of the spans of a mechanism."""

    k: Float[Array, 'b h n c d']
    v: Float[Array, 'b h n c d']
    vertical: VerticalState | None
    horizontal: HorizontalState | None


def init_cache(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    counts: Int[Array, ' b'],
    capacity: int,
    *,
    columns: int,
    pools: Pools,
    vertical: bool = False,
    relations: Sequence[Relation] = (),
) -> Cache:
    """Returns the cache after the first `counts` positions of each sequence.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        counts: number of cached positions.
        capacity: maximum number of positions.
        columns: length of a grid row.
        pools: the pooling of the members of a span into its summary query and key.
        vertical: whether the mechanism has vertical spans.
        relations: the relations of the horizontal spans (see `horizontal_relations`); none without such spans.
    """
    batch, length = q.shape[:2]
    more = (-length % columns) + columns  # one row more: the next token may need the spans above it
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
    cells = make_grid(q, k, v, columns=columns, causal=True)

    def roomy(x: Float[Array, 'h m c d']) -> Float[Array, 'b h n c d']:
        x, rows = blocks_by_sequence(x, x.shape[1] // batch), -(-capacity // columns)
        return jnp.pad(x[:, :, :rows], ((0, 0), (0, 0), (0, max(0, rows - x.shape[2])), (0, 0), (0, 0)))

    spans = tuple(grid.summaries(cells.rows, relation, pools)[0] for relation in relations)
    return Cache(
        roomy(cells.rows.k),
        roomy(cells.rows.v),
        _vertical_state(cells, counts, pools) if vertical else None,
        HorizontalState(_by_parity(cells.rows.q, counts, -1), jax.tree.map(roomy, spans)) if spans else None,
    )


def _vertical_state(cells: Grid, counts: Int[Array, ' b'], pools: Pools) -> VerticalState:
    columns, rows = cells.rows.q.shape[2], cells.columns.q.shape[2]
    position = jnp.arange(columns)[:, None] + jnp.arange(rows) * columns
    there = (position < counts[:, None, None]).reshape(-1, rows)

    def reduced(pool: Pool, x: Float[Array, 'h k n d']) -> Float[Array, 'b h c f']:
        return blocks_by_sequence(pool.reduce(pool.encode_members(x, there), axis=-2), columns)

    spans = transpose_lines(grid.summaries(cells.columns, BEFORE, pools)[0], columns)
    spans = jax.tree.map(lambda x: _by_parity(x, counts, 1), spans)
    return VerticalState(reduced(pools.q, cells.columns.q), reduced(pools.k, cells.columns.k), spans)


def _by_parity(x: Float[Array, 'h m c d'], counts: Int[Array, ' b'], step: int) -> Float[Array, 'b h 2 c d']:
    """Returns the row of position `counts` and the row `step` further, the even row first."""
    rows = x.shape[1] // counts.shape[0]
    row = counts[:, None] // x.shape[2]
    kept = jnp.clip(row + step * ((jnp.arange(2) - row) % 2), 0, rows - 1)
    return jnp.take_along_axis(blocks_by_sequence(x, rows), kept[:, None, :, None, None], axis=2)


Mix = Callable[[PartialSoftmax, list[PartialSoftmax], list[PartialSoftmax]], Array]


def in_one_softmax(
    direct: PartialSoftmax, vertical: list[PartialSoftmax], horizontal: list[PartialSoftmax]
) -> Float[Array, '*queries d']:
    """Merges direct terms, vertical and horizontal spans into one softmax."""
    return merge_partials(direct, *vertical, *horizontal).normalize()


def decode_step(
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
    """Decodes one token of each sequence, at position `index`; O(columns + rows).

    Args:
        cache: of the earlier positions.
        index: the positions.
        q: queries, not scaled.
        k: keys.
        v: values.
        pools: as for `init_cache`.
        relations: as for `init_cache`.
        mix: function that merges the direct terms, the vertical and the horizontal spans.
    """
    one = partial(_decode_one, pools=pools, relations=relations, mix=mix)
    return jax.vmap(one)(cache, index, q, k, v)


def _decode_one(cache, index, q, k, v, pools, relations, mix):
    _, rows, columns, _ = cache.k.shape
    row, column = jnp.divmod(index, columns)
    cache = cache._replace(k=cache.k.at[:, row, column].set(k), v=cache.v.at[:, row, column].set(v))
    in_row = partial_softmax_one(scale_queries(q), cache.k[:, row], cache.v[:, row], jnp.arange(columns) <= column)
    in_column = partial_softmax_one(
        scale_queries(q), cache.k[:, :, column], cache.v[:, :, column], jnp.arange(rows) < row
    )
    vertical, horizontal = [], []
    if cache.vertical is not None:
        state, vertical = _decode_vertical(cache.vertical, cache, row, column, q, k, pools)
        cache = cache._replace(vertical=state)
    if cache.horizontal is not None:
        state, horizontal = _decode_horizontal(cache.horizontal, cache, row, column, q, pools, relations)
        cache = cache._replace(horizontal=state)
    return cache, mix(merge_partials(in_row, in_column), vertical, horizontal)[:, 0, 0].astype(v.dtype)


def _decode_vertical(vertical, cache, row, column, q, k, pools):
    """Attends to the vertical spans; computes the summary of the token's column for the next row."""
    _, rows, columns, _ = cache.k.shape
    here = jax.tree.map(lambda span: span[:, row % 2], vertical.spans)
    sums = partial_softmax_one(scale_queries(q), here.k, here.v, (jnp.arange(columns) != column) & (row > 0))

    encoded_q = pools.q.combine(vertical.q[:, column], pools.q.encode(q))
    encoded_k = pools.k.combine(vertical.k[:, column], pools.k.encode(k))
    local_q, up_to = scale_queries(pools.q.decode(encoded_q).astype(q.dtype)), jnp.arange(rows) <= row
    local_v = partial_softmax_one(local_q, cache.k[:, :, column], cache.v[:, :, column], up_to).normalize()[:, 0, 0]
    new = KeyGroup(pools.k.decode(encoded_k), local_v)
    spans = jax.tree.map(lambda held, one: _put(held, one, (row + 1) % 2, column), vertical.spans, new)
    return VerticalState(vertical.q.at[:, column].set(encoded_q), vertical.k.at[:, column].set(encoded_k), spans), [
        sums
    ]


def _decode_horizontal(horizontal, cache, row, column, q, pools, relations):
    """Attends to the horizontal spans; computes first the span of the row above, without the token's column."""
    _, rows, columns, _ = cache.k.shape
    recent = _put(horizontal.q, q, row % 2, column)
    last = (row - 1) % rows  # in row 0: the last row's slot, which is never read
    above_q, above_k, above_v = recent[:, 1 - row % 2], cache.k[:, last], cache.v[:, last]
    spans, sums = [], []
    for relation, span in zip(relations, horizontal.spans, strict=True):
        members = jnp.asarray(relation.matrix(columns))[column]
        value = partial_softmax_one(scale_queries(pools.q(above_q, members)), above_k, above_v, members).normalize()[
            :, 0, 0
        ]
        new = KeyGroup(pools.k(above_k, members), value)
        spans.append(jax.tree.map(lambda held, one: _put(held, one, last, column), span, new))
        visible = (jnp.arange(rows) < row) & members.any()
        sums.append(
            partial_softmax_one(scale_queries(q), spans[-1].k[:, :, column], spans[-1].v[:, :, column], visible)
        )
    return HorizontalState(recent, tuple(spans)), sums


def _put(held: Float[Array, 'h n c d'], one: Float[Array, 'h d'], row: Array, column: Array) -> Float[Array, 'h n c d']:
    return held.at[:, row, column].set(one.astype(held.dtype))
