"""Summaries of blocks, and of rows of summaries, in vector memory, with their gradients.

Letters: as in `tiles`.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Tables, Tile, Tokens
from combiner.kernels.tpu.plan import TABLE_ROWS, Plan
from combiner.kernels.tpu.tiles import COLUMNS_BY_COLUMNS, ROWS_BY_ROWS, product


def summarise(plan: Plan, x: Tokens, column: Array | None, by_span: Array) -> Tokens:
    """Returns the summaries of spans: queries (not scaled), keys and values `[m, e]`.

    Args:
        plan: the sizes.
        x: the rows of all spans.
        column: int `[t, 1]`, not zero for members; None for all.
        by_span: bool `[m, t]`, the members of each span.
    """
    spans = by_span.shape[0]
    query, key = (tiles.pool(rows, column, spans, plan.pool).astype(rows.dtype) for rows in x[:2])
    values = expectation(plan, tiles.scaled(query, plan.scale, query.dtype), x.k, x.v, by_span)
    return Tokens(query, key, values.astype(x.v.dtype))


def expectation(plan: Plan, query: Array, k: Array, v: Array, by_span: Array) -> Array:
    """Returns the local expectations `[m, e]` of spans, for their (scaled) queries."""
    values = []
    for head in tiles.of_each_head(query, plan.shared_by):
        (weights,), total = tiles.softmax([product(head, k, ROWS_BY_ROWS)], [by_span])
        values.append(product((weights / total).astype(v.dtype), v))
    return tiles.own_lanes(values)


def summary_gradient(plan: Plan, x: Tokens, column: Array | None, by_span: Array, d: Tokens) -> Tokens:
    """Returns the gradients of the rows of spans, in float32; of queries, all gradients are of scaled ones."""
    spans = by_span.shape[0]
    query = tiles.scaled(tiles.pool(x.q, column, spans, plan.pool).astype(x.q.dtype), plan.scale, x.q.dtype)
    d_query, dk, dv = expectation_gradient(plan, query, x.k, x.v, by_span, d.v)
    dq = tiles.pool_gradient(d_query + d.q, x.q, column, spans, plan.pool)
    return Tokens(dq, dk + tiles.pool_gradient(d.k, x.k, column, spans, plan.pool), dv)


def expectation_gradient(plan: Plan, query: Array, k: Array, v: Array, by_span: Array, d: Array) -> list[Any]:
    """Returns the gradients of the (scaled) queries of spans, and of the keys and values of rows."""
    d_query, dk, dv = [], 0.0, 0.0
    d_values = tiles.of_each_head(d.astype(v.dtype), plan.shared_by)
    for head, d_head in zip(tiles.of_each_head(query, plan.shared_by), d_values, strict=True):
        (weights,), total = tiles.softmax([product(head, k, ROWS_BY_ROWS)], [by_span])
        weights = weights / total
        (d_logits,) = tiles.softmax_gradient([weights], [product(d_head, v, ROWS_BY_ROWS)])
        d_logits = d_logits.astype(k.dtype)
        d_query.append(product(d_logits, k))
        dk += product(d_logits, head, COLUMNS_BY_COLUMNS)
        dv += product(weights.astype(k.dtype), d_head, COLUMNS_BY_COLUMNS)
    return [tiles.own_lanes(d_query), dk, dv]


def write_summaries(plan: Plan, tile: Tile, x: Tokens, tables: Tables) -> None:
    """Writes the summaries of the blocks of a tile into the tables."""
    for side in range(plan.sides):
        of_blocks = summarise(plan, x, *tile.members(side))
        for table, rows in zip((tables.q, tables.k, tables.v), of_blocks, strict=True):
            if table:
                tile.write_summaries(table[0], side, rows)


def read_gradients(plan: Plan, tile: Tile, x: Tokens, sums: Tables) -> Tokens:
    """Returns the gradients of the rows of a tile through the summaries of its blocks."""
    found = []
    for side in range(plan.sides):
        d_query = tile.read_summaries(sums.q[0], side) if sums.q else 0.0
        d = Tokens(d_query, *(tile.read_summaries(table[0], side) for table in (sums.k, sums.v)))
        found.append(summary_gradient(plan, x, *tile.members(side), d))
    return found[0] if len(found) == 1 else Tokens(*(one + other for one, other in zip(*found, strict=True)))


class Upper:
    """The summaries of one level above that of blocks; each is of a row of the level below."""

    def __init__(self, plan: Plan, tile: Tile, tables: Tables, level: int, side: int) -> None:
        self.plan, self.tile, self.tables, self.level, self.side = plan, tile, tables, level, side

    def _children(self, number: Any) -> tuple[Any, Tokens, Array | None, Array]:
        """Returns the rows of the children of a summary, these children, and which of them are members."""
        plan, below = self.plan, self.level - 1
        rows = pl.ds(pl.multiple_of(number * plan.siblings, 8), plan.siblings)
        x = Tokens(*(table[below][self.side, rows, :] for table in (self.tables.q, self.tables.k, self.tables.v)))
        if self.tile.ids is None:
            return rows, x, None, jnp.ones((1, plan.siblings), jnp.int32) != 0
        members = self.tile.ids.members[self.level][self.side, pl.ds(number, 1), :]
        return rows, x, tiles.column(members), members != 0

    def write(self, number: Any) -> None:
        """Writes one summary."""
        _, x, column, by_span = self._children(number)
        one = summarise(self.plan, x, column, by_span)
        for table, row in zip((self.tables.q, self.tables.k, self.tables.v), one, strict=True):
            if self.level < len(table):
                group, here = self._group(number)
                held = table[self.level][self.side, group, :]
                table[self.level][self.side, group, :] = jnp.where(here, row, held)

    def read_gradient(self, number: Any, sums: Tables) -> None:
        """Adds the gradients through one summary to those of its children."""
        rows, x, column, by_span = self._children(number)
        group, here = self._group(number)

        def of_summary(table: tuple[Any, ...]) -> Any:
            if self.level >= len(table):
                return 0.0
            return jnp.where(here, table[self.level][self.side, group, :], 0.0).sum(axis=0, keepdims=True)

        d = Tokens(*(of_summary(table) for table in (sums.q, sums.k, sums.v)))
        changes = summary_gradient(self.plan, x, column, by_span, d)
        for table, change in zip((sums.q, sums.k, sums.v), changes, strict=True):
            table[self.level - 1][self.side, rows, :] += change

    def _group(self, number: Any) -> tuple[Any, Array]:
        """Returns the whole rows of a register that hold a summary, and which of them it is."""
        start = number // TABLE_ROWS * TABLE_ROWS
        here = lax.broadcasted_iota(jnp.int32, (TABLE_ROWS, 1), 0) == number - start
        return pl.ds(pl.multiple_of(start, TABLE_ROWS), TABLE_ROWS), here


def for_each_upper(plan: Plan, tile: Tile, body: Any, tables: Tables, *, upwards: bool) -> None:
    """Runs `body(upper, number)` for summaries above those of blocks, one level after the other.

    Causal, for those that the tile finishes: no other is seen by a block of the tile or, backward, of a later one.
    Otherwise for all, once.
    """
    levels = range(1, plan.levels)
    for level in levels if upwards else reversed(levels):
        first, end = tile.finished(level) if plan.causal else (0, plan.table_rows(level - 1))
        for side in range(plan.sides):
            upper = Upper(plan, tile, tables, level, side)
            lax.fori_loop(first, end, lambda i, _, upper=upper: body(upper, i), None)
