"""Grids: attention along both axes, by direct terms in rows and columns and by spans along either; and its decoding.

A sequence fills the rows of a grid one after another; the last may be partial. Its cells lie in memory twice, by rows
and by columns, so that every product is a matrix product. `transpose_lines` brings the `PartialSoftmax` of columns and
rows together. Products that share an operand are computed separately: a copy of the operands would cost more than the
larger product saves.

Decoding takes O(columns + rows) work for a token, and O(l) memory. The span above row `r` in column `c` is first used
in row `r`, and complete after `(r - 1, c)`: its summary is computed then. The span of row `t` without column `c` is
first used at `(t + 1, c)`, and is computed there. So each token computes one summary of either kind, over at most a
column or a row.

Letters: `b` batch, `l` length, `h` head, `d` head width, `f` features of a pooling; `m` lines, which are the rows `b·n`
or the columns `b·c` of all grids, and `c` position in a line; in decoding, `n` rows and `c` columns.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.ops.blocks import (
    KeyGroup,
    Tokens,
    block_segment_ids,
    blocks_by_sequence,
    merge_blocks,
    own_mask,
    scale_queries,
    split_blocks,
    transpose_grid,
)
from combiner.ops.chunking import map_heads
from combiner.ops.pooling import AFTER, BEFORE, OTHERS, PLAIN, Pool, Pools, Relation
from combiner.ops.segments import same_segment
from combiner.ops.softmax import Drop, PartialSoftmax, merge_partials, partial_softmax, partial_softmax_one

Transposed = TypeVar('Transposed', PartialSoftmax, KeyGroup)


class Grid(NamedTuple):
    """The grids of a batch, by rows and by columns (`h m c d`), and how to attend over them."""

    rows: Tokens
    columns: Tokens
    causal: bool
    drop: Drop | None = None


def make_grid(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Grid:
    """Makes the grids of sequences."""
    batch, length = q.shape[:2]
    segment_ids = block_segment_ids(batch, length, columns, causal=causal, valid=valid, segments=segments)
    q, k, v = (split_blocks(x, columns) for x in (q, k, v))
    rows = q.shape[1] // batch
    column_q, column_k, column_v = (transpose_grid(x, rows) for x in (q, k, v))
    column_ids = None if segment_ids is None else transpose_ids(segment_ids, rows)
    by_column = Tokens(column_q, column_k, column_v, column_ids)
    return Grid(Tokens(q, k, v, segment_ids), by_column, causal, drop)


def map_grids(
    attend: Callable[[Grid], Float[Array, 'h m c d']],
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None,
) -> Float[Array, 'b l h d']:
    """Attends over grids of sequences by `attend`, whose result is by rows; on a CPU in steps (`chunking.map_heads`).

    All at once if heads differ in more than their input: in the parameters of `pools` or the random numbers of `drop`.
    """

    def attend_some(q: Array, k: Array, v: Array, valid: Array | None, segments: Array | None) -> Array:
        cells = make_grid(q, k, v, columns=columns, causal=causal, valid=valid, segments=segments, drop=drop)
        return merge_blocks(attend(cells).astype(v.dtype), q.shape[1])

    at_once = drop is not None or pools not in PLAIN.values()
    keys = max(columns, -(-q.shape[1] // columns))
    return map_heads(attend_some, q, k, v, valid, segments, keys=keys, at_once=at_once)


def transpose_lines(by_line: Transposed, size: int) -> Transposed:
    """Transposes from rows to columns or back; `size` is the length of the resulting lines."""
    return jax.tree.map(lambda x: transpose_grid(x, size), by_line)


def transpose_ids(segment_ids: Shaped[Array, 'm c'], size: int) -> Shaped[Array, 'k n']:
    """Transposes ids and masks of cells, as `transpose_lines`."""
    return segment_ids.reshape(-1, size, segment_ids.shape[1]).swapaxes(1, 2).reshape(-1, size)


def direct_in_row(grid: Grid) -> PartialSoftmax:
    """Computes the direct terms of the own row, the own position included, by rows."""
    return _direct(grid.rows, own_mask(grid.rows.q.shape[2], causal=grid.causal), grid.drop)


def direct_in_column(grid: Grid) -> PartialSoftmax:
    """Computes the direct terms of the own column, without the own position, by columns."""
    related = (BEFORE if grid.causal else OTHERS).matrix(grid.columns.q.shape[2])
    return _direct(grid.columns, jnp.asarray(related), grid.drop)


def _direct(lines: Tokens, mask: Bool[Array, 'c c'] | None, drop: Drop | None) -> PartialSoftmax:
    visible = same_segment(lines.segment_ids, lines.segment_ids, mask)
    return partial_softmax(scale_queries(lines.q), lines.k, lines.v, visible, drop)


def vertical_spans(grid: Grid, pools: Pools) -> PartialSoftmax:
    """Attends to the spans of all other columns, above and (bidirectional) below the own row, by rows."""
    rows, columns = grid.rows, grid.columns
    size = rows.q.shape[2]
    groups = []
    for relation in (BEFORE,) if grid.causal else (BEFORE, AFTER):
        spans, some = summaries(columns, relation, pools)
        visible = OTHERS.members(transpose_ids(some, size), size)
        by_row = transpose_lines(spans, size)
        groups.append(partial_softmax(scale_queries(rows.q), by_row.k, by_row.v, visible, grid.drop))
    return merge_partials(*groups)


def horizontal_spans(grid: Grid, pools: Pools, *, split: bool) -> PartialSoftmax:
    """Attends to the spans of all earlier (bidirectional: other) rows, without the own column, by columns.

    With `split`, the cells left of the column are one span, and the cells right of it another.
    """
    rows, columns = grid.rows, grid.columns
    size = columns.q.shape[2]
    groups = []
    for relation in horizontal_relations(split):
        spans, some = summaries(rows, relation, pools)
        visible = (BEFORE if grid.causal else OTHERS).members(transpose_ids(some, size), size)
        by_column = transpose_lines(spans, size)
        groups.append(partial_softmax(scale_queries(columns.q), by_column.k, by_column.v, visible, grid.drop))
    return merge_partials(*groups)


def horizontal_relations(split: bool) -> tuple[Relation, ...]:
    """Returns the relations of a horizontal span: all cells but the own column, or (`split`) the two sides of it."""
    return (BEFORE, AFTER) if split else (OTHERS,)


def summaries(lines: Tokens, relation: Relation, pools: Pools) -> tuple[KeyGroup, Bool[Array, 'm c']]:
    """Summarises the related cells of each cell of a line; returns also whether there are any.

    K_r = pool_j k_j        V_r = Σ_j softmax_j(Q_r·k_j/√d) v_j        Q_r = pool_j q_j
    """
    q, k, v, _ = lines
    inside = lines.inside
    members = relation.members(inside, q.shape[2])
    value = partial_softmax(scale_queries(relation.pool(pools.q, q, inside)), k, v, members).normalize().astype(v.dtype)
    some = jnp.broadcast_to(members.any(axis=-1), q.shape[1:3])
    return KeyGroup(relation.pool(pools.k, k, inside), value), some


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

    spans = tuple(summaries(cells.rows, relation, pools)[0] for relation in relations)
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

    spans = transpose_lines(summaries(cells.columns, BEFORE, pools)[0], columns)
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
    scaled, above = scale_queries(q), jnp.arange(rows) < row
    in_row = partial_softmax_one(scaled, cache.k[:, row], cache.v[:, row], jnp.arange(columns) <= column)
    in_column = partial_softmax_one(scaled, cache.k[:, :, column], cache.v[:, :, column], above)
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
    encoded_q, encoded_k = vertical.q.at[:, column].set(encoded_q), vertical.k.at[:, column].set(encoded_k)
    return VerticalState(encoded_q, encoded_k, spans), [sums]


def _decode_horizontal(horizontal, cache, row, column, q, pools, relations):
    """Attends to the horizontal spans; computes first the span of the row above, without the token's column."""
    _, rows, columns, _ = cache.k.shape
    recent = _put(horizontal.q, q, row % 2, column)
    last = (row - 1) % rows  # in row 0: the last row's slot, which is never read
    above_q, above_k, above_v = recent[:, 1 - row % 2], cache.k[:, last], cache.v[:, last]
    spans, sums = [], []
    for relation, span in zip(relations, horizontal.spans, strict=True):
        members = jnp.asarray(relation.matrix(columns))[column]
        local_q = scale_queries(pools.q(above_q, members))
        local_v = partial_softmax_one(local_q, above_k, above_v, members).normalize()[:, 0, 0]
        new = KeyGroup(pools.k(above_k, members), local_v)
        span = jax.tree.map(lambda held, one: _put(held, one, last, column), span, new)
        spans.append(span)
        visible = (jnp.arange(rows) < row) & members.any()
        sums.append(partial_softmax_one(scale_queries(q), span.k[:, :, column], span.v[:, :, column], visible))
    return HorizontalState(recent, tuple(spans)), sums


def _put(held: Float[Array, 'h n c d'], one: Float[Array, 'h d'], row: Array, column: Array) -> Float[Array, 'h n c d']:
    return held.at[:, row, column].set(one.astype(held.dtype))
