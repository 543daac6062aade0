"""Grids: attention along both axes, by direct terms in rows and columns and by spans along either.

A sequence fills the rows of a grid one after another; the last may be partial. Its cells lie in memory twice, by rows
and by columns, so that every product is a matrix product. `transpose_lines` brings the `PartialSoftmax` of columns and
rows together. Products that share an operand are computed separately: a copy of the operands would cost more than the
larger product saves.

A `Relation` defines to which positions of its line (a row or a column) a position attends: those before it, after it,
or all others. Sums over them (see `pooling`) are products with a triangle of ones; maxima have their own derivatives.

Letters: `b` batch, `l` length, `h` head, `d` head width, `f` features of a pooling; `m` lines, which are the rows `b·n`
or the columns `b·c` of all grids, and `c` position in a line; `*n` lines.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from combiner.ops.blocks import KeyGroup, block_segment_ids, merge_blocks, scale_queries, split_blocks, transpose_grid
from combiner.ops.chunking import map_heads
from combiner.ops.pooling import PLAIN, Pool, Pools
from combiner.ops.segments import PADDING_ID
from combiner.ops.softmax import Drop, PartialSoftmax, einsum, merge_partials, partial_softmax

Transposed = TypeVar('Transposed', PartialSoftmax, KeyGroup)


class Lines(NamedTuple):
    """All rows or all columns: queries (not scaled), keys, values, and which cells are no padding (None for all)."""

    q: Float[Array, 'h m c d']
    k: Float[Array, 'h m c d']
    v: Float[Array, 'h m c d']
    inside: Bool[Array, 'm c'] | None


class Grid(NamedTuple):
    """The grids of a batch, and how to attend over them."""

    rows: Lines
    columns: Lines
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
    drop: Drop | None = None,
) -> Grid:
    """Makes the grids of sequences."""
    batch, length = q.shape[:2]
    segment_ids = block_segment_ids(batch, length, columns, causal=causal, valid=valid, segments=None)
    inside = None if segment_ids is None else segment_ids != PADDING_ID
    q, k, v = (split_blocks(x, columns) for x in (q, k, v))
    rows = q.shape[1] // batch
    transposed = None if inside is None else transpose_ids(inside, rows)
    by_column = Lines(*(transpose_grid(x, rows) for x in (q, k, v)), inside=transposed)
    return Grid(Lines(q, k, v, inside), by_column, causal, drop)


def map_grids(
    attend: Callable[[Grid], Float[Array, 'h m c d']],
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    pools: Pools,
    valid: Bool[Array, 'b l'] | None,
    drop: Drop | None,
) -> Float[Array, 'b l h d']:
    """Attends over grids of sequences by `attend`, whose result is by rows; on a CPU in steps (`chunking.map_heads`).

    All at once if heads differ in more than their input: in the parameters of `pools` or the random numbers of `drop`.
    """

    def attend_some(q: Array, k: Array, v: Array, valid: Array | None) -> Array:
        cells = make_grid(q, k, v, columns=columns, causal=causal, valid=valid, drop=drop)
        return merge_blocks(attend(cells).astype(v.dtype), q.shape[1])

    at_once = drop is not None or pools not in PLAIN.values()
    keys = max(columns, -(-q.shape[1] // columns))
    return map_heads(attend_some, q, k, v, valid, keys=keys, at_once=at_once)


def transpose_lines(by_line: Transposed, size: int) -> Transposed:
    """Transposes from rows to columns or back; `size` is the length of the resulting lines."""
    return jax.tree.map(lambda x: transpose_grid(x, size), by_line)


def transpose_ids(segment_ids: Shaped[Array, 'm c'], size: int) -> Shaped[Array, 'k n']:
    """Transposes ids and masks of cells, as `transpose_lines`."""
    return segment_ids.reshape(-1, size, segment_ids.shape[1]).swapaxes(1, 2).reshape(-1, size)


class Relation(NamedTuple):
    """The positions of its line to which a position attends.

    Attributes:
        matrix: for lines of a given length, whether the position of the row attends to the position of the column.
        maximum: the maximum over the related positions of each position of `[*n, c, f]`; the lowest number if none.
    """

    matrix: Callable[[int], Bool[np.ndarray, 'c c']]
    maximum: Callable[[Float[Array, '*n c f']], Float[Array, '*n c f']]

    def members(self, inside: Bool[Array, 'm c'] | None, size: int) -> Bool[Array, '#m c c']:
        """Returns to which positions of its line each position is related, only those `inside`."""
        related = jnp.asarray(self.matrix(size)[None])
        return related if inside is None else related & inside[:, None, :]

    def pool(
        self, pool: Pool, x: Float[Array, 'h m c d'], inside: Bool[Array, 'm c'] | None
    ) -> Float[Array, 'h m c d']:
        """Pools the related members of every position; zeros where there is no member."""
        features = pool.encode_members(x, inside)
        if pool.maximum:
            features = self.maximum(features)
        else:
            features = einsum('ij,...jf->...if', jnp.asarray(self.matrix(x.shape[2]), features.dtype), features)
        return pool.decode_or_zero(features, self.members(inside, x.shape[2]).any(axis=-1)).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _running_maximum(reverse: bool, x: Float[Array, '*n c f']) -> Float[Array, '*n c f']:
    """Returns the maximum over the positions before (in reverse: after) each position."""

    def step(top: Array, at: Array) -> tuple[Array, Array]:
        return jnp.maximum(top, _at(x, at)), top

    lowest = jnp.full_like(x[..., 0, :], jnp.finfo(x.dtype).min)
    _, tops = jax.lax.scan(step, lowest, jnp.arange(x.shape[-2]), reverse=reverse)
    return jnp.moveaxis(tops, 0, -2)


@_running_maximum.defjvp
def _running_maximum_tangent(reverse, primals, tangents):
    """Shares the derivative evenly between a position and an equal maximum before it, as JAX does."""
    (x,), (tangent,) = primals, tangents
    tops = _running_maximum(reverse, x)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(change: Array, at: Array) -> tuple[Array, Array]:
        new, top = _at(x, at), _at(tops, at)
        share = jnp.where(new > top, 1, jnp.where(new == top, 0.5, 0)).astype(change.dtype)
        return change + share * (_at(tangent, at).astype(change.dtype) - change), change.astype(x.dtype)

    nothing = jnp.zeros(x[..., 0, :].shape, jnp.promote_types(x.dtype, jnp.float32))
    _, changes = jax.lax.scan(step, nothing, jnp.arange(x.shape[-2]), reverse=reverse)
    return tops, jnp.moveaxis(changes, 0, -2)


@jax.custom_jvp
def _maximum_of_others(x: Float[Array, '*n c f']) -> Float[Array, '*n c f']:
    """Returns the maximum over all other positions: the first or, for the only position of the first, the second."""
    first, second, alone = _two_highest(x)
    return jnp.where((x == first) & alone, second, first)


def _two_highest(x):
    """Returns the highest number, the next lower one, and whether only one position holds the first."""
    first = x.max(axis=-2, keepdims=True)
    second = jnp.where(x == first, jnp.finfo(x.dtype).min, x).max(axis=-2, keepdims=True)
    return first, second, (x == first).sum(axis=-2, keepdims=True) == 1


@_maximum_of_others.defjvp
def _maximum_of_others_tangent(primals, tangents):
    """Shares the derivative evenly among positions of an equal maximum, as JAX does."""
    (x,), (tangent,) = primals, tangents
    first, second, alone = _two_highest(x)
    tangent = tangent.astype(jnp.promote_types(x.dtype, jnp.float32))

    def total(terms: Array) -> Array:
        return terms.sum(axis=-2, keepdims=True)

    is_first, is_second = x == first, (x == second) & (second < first)
    held = total(is_first)
    of_first = total(jnp.where(is_first, tangent, 0))
    of_second = total(jnp.where(is_second, tangent, 0)) / jnp.maximum(total(is_second), 1)
    of_tied = of_first / jnp.maximum(held - 1, 1)
    own = jnp.where(alone, 0, 1 / jnp.maximum(held - 1, 1)).astype(tangent.dtype)
    change = jnp.where(is_first, jnp.where(alone, of_second, of_tied), of_first / held)
    change -= own * jnp.where(is_first, tangent, 0)
    return _maximum_of_others(x), change.astype(x.dtype)


def _at(x: Float[Array, '*n c f'], at: Array) -> Float[Array, '*n f']:
    return jax.lax.dynamic_index_in_dim(x, at, axis=-2, keepdims=False)


BEFORE = Relation(lambda size: np.tri(size, k=-1, dtype=bool), partial(_running_maximum, False))
AFTER = Relation(lambda size: np.tri(size, k=-1, dtype=bool).T, partial(_running_maximum, True))
OTHERS = Relation(lambda size: ~np.eye(size, dtype=bool), _maximum_of_others)


def direct_in_row(grid: Grid) -> PartialSoftmax:
    """Computes the direct terms of the own row, the own position included, by rows."""
    rows = grid.rows
    mask = None if rows.inside is None else rows.inside[:, None, :]
    if grid.causal:
        up_to = jnp.tri(rows.q.shape[2], dtype=bool)[None]
        mask = up_to if mask is None else mask & up_to
    return partial_softmax(scale_queries(rows.q), rows.k, rows.v, mask, grid.drop)


def direct_in_column(grid: Grid) -> PartialSoftmax:
    """Computes the direct terms of the own column, without the own position, by columns."""
    columns = grid.columns
    visible = (BEFORE if grid.causal else OTHERS).members(columns.inside, columns.q.shape[2])
    return partial_softmax(scale_queries(columns.q), columns.k, columns.v, visible, grid.drop)


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


def summaries(lines: Lines, relation: Relation, pools: Pools) -> tuple[KeyGroup, Bool[Array, 'm c']]:
    """Summarises the related cells of each cell of a line; returns also whether there are any.

    K_r = pool_j k_j        V_r = Σ_j softmax_j(Q_r·k_j/√d) v_j        Q_r = pool_j q_j
    """
    q, k, v, inside = lines
    members = relation.members(inside, q.shape[2])
    value = partial_softmax(scale_queries(relation.pool(pools.q, q, inside)), k, v, members).normalize().astype(v.dtype)
    some = jnp.broadcast_to(members.any(axis=-1), q.shape[1:3])
    return KeyGroup(relation.pool(pools.k, k, inside), value), some
