"""What attention over both axes of a grid is made of: direct terms in rows and columns, and spans along either.

A sequence fills the rows of a grid one after another; the last may be partial. Its cells lie in memory twice, by rows
and by columns, so that every product is one of matrices. `Sums` of either layout meet by `turn`. Products
that share an operand stay apart: XLA's CPU back end ran those of 64 queries and 64 keys at 126 GFLOP/s (2 cores), of
128 queries and 64 keys at 165, which a copy of the operands costs again, of 64 queries and 128 keys at 51.

Letters: `b` batch, `l` length, `h` head, `d` head width; `m` lines, which are the rows `b·n` or the columns `b·c` of
all grids, and `c` position in a line.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner.attention.joint import Drop
from combiner.attention.layout import Summary, split, split_valid, transpose_grid
from combiner.attention.pooling import Pools
from combiner.attention.relations import AFTER, BEFORE, OTHERS, Relation
from combiner.attention.sums import Sums, together, weigh

Turned = TypeVar('Turned', Sums, Summary)


class Lines(NamedTuple):
    """All rows or all columns: queries (scaled), keys, values, and which cells are no padding (None for all)."""

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


def lay_out(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Grid:
    """The grids of sequences; `q` is not scaled."""
    batch, length = q.shape[:2]
    inside = split_valid(valid, batch, length, columns, causal=causal)
    q, k, v = (split(x, columns) for x in (q * q.shape[-1] ** -0.5, k, v))
    rows = q.shape[1] // batch
    turned = None if inside is None else _turn_labels(inside, rows)
    by_column = Lines(*(transpose_grid(x, rows) for x in (q, k, v)), inside=turned)
    return Grid(Lines(q, k, v, inside), by_column, causal, drop)


def near_in_row(grid: Grid) -> Sums:
    """Direct terms of the own row, oneself included, by rows."""
    rows = grid.rows
    mask = None if rows.inside is None else rows.inside[:, None, :]
    if grid.causal:
        up_to = jnp.tri(rows.q.shape[2], dtype=bool)[None]
        mask = up_to if mask is None else mask & up_to
    return weigh(rows.q, rows.k, rows.v, mask, grid.drop)


def near_in_column(grid: Grid) -> Sums:
    """Direct terms of the own column, without oneself, by columns."""
    columns = grid.columns
    seen = (BEFORE if grid.causal else OTHERS).members(columns.inside, columns.q.shape[2])
    return weigh(columns.q, columns.k, columns.v, seen, grid.drop)


def vertical(grid: Grid, pools: Pools) -> Sums:
    """The spans of all other columns, above and (bidirectional) below the own row, by rows."""
    rows, columns = grid.rows, grid.columns
    size = rows.q.shape[2]
    groups = []
    for relation in (BEFORE,) if grid.causal else (BEFORE, AFTER):
        spans, some = summaries(columns, relation, pools)
        seen = OTHERS.members(_turn_labels(some, size), size)
        groups.append(weigh(rows.q, *turn(spans, size), seen, grid.drop))
    return together(*groups)


def horizontal(grid: Grid, pools: Pools, *, split: bool) -> Sums:
    """The spans of all earlier (bidirectional: other) rows, without the own column, by columns.

    With `split`, what is left of the column is one span, and what is right of it another.
    """
    rows, columns = grid.rows, grid.columns
    size = columns.q.shape[2]
    groups = []
    for relation in beside(split):
        spans, some = summaries(rows, relation, pools)
        seen = (BEFORE if grid.causal else OTHERS).members(_turn_labels(some, size), size)
        groups.append(weigh(columns.q, *turn(spans, size), seen, grid.drop))
    return together(*groups)


def beside(split: bool) -> tuple[Relation, ...]:
    """What of its row a horizontal span holds, as seen from a column: all but the column, or (`split`) in two parts."""
    return (BEFORE, AFTER) if split else (OTHERS,)


def turn(by_line: Turned, size: int) -> Turned:
    """From rows to columns or back; `size` is the length of the lines that come out."""
    return jax.tree.map(lambda x: transpose_grid(x, size), by_line)


def summaries(lines: Lines, relation: Relation, pools: Pools) -> tuple[Summary, Bool[Array, 'm c']]:
    """The summaries of what each cell sees of its line, and whether it sees anything.

    K_r = pool_j k_j        V_r = Σ_j softmax_j(Q_r·k_j) v_j        Q_r = pool_j q_j
    """
    q, k, v, inside = lines
    members = relation.members(inside, q.shape[2])
    value = weigh(relation.pool(pools.q, q, inside), k, v, members).average().astype(v.dtype)
    some = jnp.broadcast_to(members.any(axis=-1), q.shape[1:3])
    return Summary(relation.pool(pools.k, k, inside), value), some


def _turn_labels(labels: Bool[Array, 'm c'], size: int) -> Bool[Array, 'k n']:
    return labels.reshape(-1, size, labels.shape[1]).swapaxes(1, 2).reshape(-1, size)
