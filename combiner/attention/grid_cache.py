"""What decoding over both axes of a grid remembers: O(l) in all.

The span above row `r` in column `c` is first seen from row `r`, and complete once `(r - 1, c)` is there: its summary is
computed then. The span of row `t` without column `c` is first seen from `(t + 1, c)`, and is computed there. So each
token computes one summary of either kind, over at most a column or a row: O(columns + rows) work (see `grid_step`).

Letters: `b` batch, `l` length, `h` head, `d` head width, `n` grid rows, `c` columns, `f` features of a pooling.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.attention import grid
from combiner.attention.grid_layout import Grid, lay_out, turn
from combiner.attention.layout import Summary, by_sequence
from combiner.attention.pooling import Pool, Pools
from combiner.attention.relations import BEFORE, Relation


class Above(NamedTuple):
    """Vertical spans: each column's lifted queries and keys, reduced; summaries for this row and the next by parity."""

    q: Float[Array, 'b h c f']
    k: Float[Array, 'b h c f']
    spans: Summary


class Beside(NamedTuple):
    """Horizontal spans: unscaled queries of this row and the last by parity; the summaries of all rows, by relation."""

    q: Float[Array, 'b h 2 c d']
    spans: tuple[Summary, ...]


class Cache(NamedTuple):
    """Keys and values of all cells, and what the spans of a mechanism need."""

    k: Float[Array, 'b h n c d']
    v: Float[Array, 'b h n c d']
    above: Above | None
    beside: Beside | None


def start(
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
    """The cache after the first `counts` positions of each sequence.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        counts: how many positions are there.
        capacity: for how many there must be room.
        columns: length of a grid row.
        pools: how the members of a span become its summary query and key.
        vertical: whether the mechanism has vertical spans.
        relations: what of a row the horizontal spans hold, as seen from a column; none without such spans.
    """
    batch, length = q.shape[:2]
    more = (-length % columns) + columns  # one row more: the spans above it are those that the next token may need
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q, k, v))
    cells = lay_out(q, k, v, columns=columns, causal=True)

    def roomy(x: Float[Array, 'h m c d']) -> Float[Array, 'b h n c d']:
        x, rows = by_sequence(x, x.shape[1] // batch), -(-capacity // columns)
        return jnp.pad(x[:, :, :rows], ((0, 0), (0, 0), (0, max(0, rows - x.shape[2])), (0, 0), (0, 0)))

    spans = tuple(grid.summaries(cells.rows, relation, pools)[0] for relation in relations)
    return Cache(
        roomy(cells.rows.k),
        roomy(cells.rows.v),
        _above(cells, counts, pools) if vertical else None,
        Beside(_by_parity(cells.rows.q, counts, -1), jax.tree.map(roomy, spans)) if spans else None,
    )


def _above(cells: Grid, counts: Int[Array, ' b'], pools: Pools) -> Above:
    columns, rows = cells.rows.q.shape[2], cells.columns.q.shape[2]
    position = jnp.arange(columns)[:, None] + jnp.arange(rows) * columns
    there = (position < counts[:, None, None]).reshape(-1, rows)

    def reduced(pool: Pool, x: Float[Array, 'h k n d']) -> Float[Array, 'b h c f']:
        return by_sequence(pool.reduce(pool.lifted(x, there), axis=-2), columns)

    spans = turn(grid.summaries(cells.columns, BEFORE, pools)[0], columns)
    spans = jax.tree.map(lambda x: _by_parity(x, counts, 1), spans)
    return Above(reduced(pools.q, cells.columns.q), reduced(pools.k, cells.columns.k), spans)


def _by_parity(x: Float[Array, 'h m c d'], counts: Int[Array, ' b'], step: int) -> Float[Array, 'b h 2 c d']:
    """The row of position `counts` and the one that is `step` further, the even one first."""
    rows = x.shape[1] // counts.shape[0]
    row = counts[:, None] // x.shape[2]
    kept = jnp.clip(row + step * ((jnp.arange(2) - row) % 2), 0, rows - 1)
    return jnp.take_along_axis(by_sequence(x, rows), kept[:, None, :, None, None], axis=2)
