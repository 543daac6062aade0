"""What attention over both axes of a grid is made of: direct terms in rows and columns, and spans along either.

`Sums` by rows and by columns meet by `turn` (see `grid_layout`, and the letters there). Products that share an operand
stay apart: XLA's CPU back end ran those of 64 queries and 64 keys at 126 GFLOP/s (2 cores), of 128 queries and 64 keys
at 165, which a copy of the operands costs again, of 64 queries and 128 keys at 51.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

from combiner.attention.grid_layout import Grid, Lines, turn, turn_labels
from combiner.attention.layout import Summary, scaled
from combiner.attention.pooling import Pools
from combiner.attention.relations import AFTER, BEFORE, OTHERS, Relation
from combiner.attention.sums import Sums, together, weigh


def near_in_row(grid: Grid) -> Sums:
    """Direct terms of the own row, oneself included, by rows."""
    rows = grid.rows
    mask = None if rows.inside is None else rows.inside[:, None, :]
    if grid.causal:
        up_to = jnp.tri(rows.q.shape[2], dtype=bool)[None]
        mask = up_to if mask is None else mask & up_to
    return weigh(scaled(rows.q), rows.k, rows.v, mask, grid.drop)


def near_in_column(grid: Grid) -> Sums:
    """Direct terms of the own column, without oneself, by columns."""
    columns = grid.columns
    seen = (BEFORE if grid.causal else OTHERS).members(columns.inside, columns.q.shape[2])
    return weigh(scaled(columns.q), columns.k, columns.v, seen, grid.drop)


def vertical(grid: Grid, pools: Pools) -> Sums:
    """The spans of all other columns, above and (bidirectional) below the own row, by rows."""
    rows, columns = grid.rows, grid.columns
    size = rows.q.shape[2]
    groups = []
    for relation in (BEFORE,) if grid.causal else (BEFORE, AFTER):
        spans, some = summaries(columns, relation, pools)
        seen = OTHERS.members(turn_labels(some, size), size)
        groups.append(weigh(scaled(rows.q), *turn(spans, size), seen, grid.drop))
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
        seen = (BEFORE if grid.causal else OTHERS).members(turn_labels(some, size), size)
        groups.append(weigh(scaled(columns.q), *turn(spans, size), seen, grid.drop))
    return together(*groups)


def beside(split: bool) -> tuple[Relation, ...]:
    """What of its row a horizontal span holds, as seen from a column: all but the column, or (`split`) in two parts."""
    return (BEFORE, AFTER) if split else (OTHERS,)


def summaries(lines: Lines, relation: Relation, pools: Pools) -> tuple[Summary, Bool[Array, 'm c']]:
    """The summaries of what each cell sees of its line, and whether it sees anything.

    K_r = pool_j k_j        V_r = Σ_j softmax_j(Q_r·k_j/√d) v_j        Q_r = pool_j q_j
    """
    q, k, v, inside = lines
    members = relation.members(inside, q.shape[2])
    value = weigh(scaled(relation.pool(pools.q, q, inside)), k, v, members).average().astype(v.dtype)
    some = jnp.broadcast_to(members.any(axis=-1), q.shape[1:3])
    return Summary(relation.pool(pools.k, k, inside), value), some
