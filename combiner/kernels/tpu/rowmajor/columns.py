"""Attention along the columns of a grid, to the summaries of other rows, with gradients.

The tables hold, for every column, the summaries of all rows: a position attends to those of its column.

Letters: as in `tile`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.rowmajor.rows import Pair, Sums
from combiner.kernels.tpu.rowmajor.tile import GridTile, by_head, get, partial_softmax, put
from combiner.kernels.tpu.tiles import COLUMNS_BY_COLUMNS, ROWS_BY_ROWS, product


def of_column(table: Any, number: Any) -> Array:
    """Returns the summaries of a column, of all sides."""
    return table[:, number].reshape(-1, table.shape[-1])


def attend(tile: GridTile, number: Any, q: Array, ids: Array | None, tables: Pair) -> tuple[Array, Array, Array]:
    """Attends from the positions of a column.

    Returns:
        the sums of weighted values, and in the lanes of each head the sum of the weights and the largest logit.
    """
    keys, values = (of_column(table, number) for table in tables)
    sums, totals, tops = [], [], []
    for head, one in enumerate(tiles.of_each_head(q, tile.plan.shared_by)):
        weights, total, top = partial_softmax(product(one, keys, ROWS_BY_ROWS), tile.visible(ids))
        weights = tile.drop_others(weights, number, head)
        sums.append(product(weights.astype(values.dtype), values))
        totals.append(total)
        tops.append(top)
    return tiles.own_lanes(sums), by_head(totals, q.shape[1]), by_head(tops, q.shape[1])


class Column(NamedTuple):
    """What the gradient of a column needs: scaled queries, the gradients of outputs, `put_sums`, and segment ids."""

    q: Array
    d_out: Array
    sums: Array
    ids: Array | None


def put_sums(sums: Sums, lanes: int) -> Float[Array, 'n e']:
    """Puts the sums of each head into its first two lanes."""
    is_delta = lax.broadcasted_iota(jnp.int32, (1, lanes), 1) % (lanes // len(sums.delta)) == 1
    return jnp.where(is_delta, by_head(sums.delta, lanes), by_head(sums.logarithm, lanes))


def gradient(tile: GridTile, number: Any, x: Column, tables: Pair, sums: Pair | None) -> Array:
    """Returns the gradient of the scaled queries of a column; adds those of summaries to `sums`, if given."""
    keys, values = (tile.written(of_column(table, number)) for table in tables)
    dq, dk, dv = [], 0.0, 0.0
    q_heads, d_heads = (tiles.of_each_head(rows, tile.plan.shared_by) for rows in (x.q, x.d_out))
    for head, (q, d_out) in enumerate(zip(q_heads, d_heads, strict=True)):
        lane = head * tile.plan.padded_width
        logarithm, delta = x.sums[:, lane : lane + 1], x.sums[:, lane + 1 : lane + 2]
        logits = jnp.where(tile.visible(x.ids), product(q, keys, ROWS_BY_ROWS), tiles.LOWEST)
        weights = jnp.exp(logits - logarithm)
        change = tile.drop_others(product(d_out, values, ROWS_BY_ROWS), number, head)
        d_logits = (weights * (change - delta)).astype(keys.dtype)
        dq.append(product(d_logits, keys))
        if sums is not None:
            dropped = tile.drop_others(weights, number, head).astype(values.dtype)
            dk += product(d_logits, q, COLUMNS_BY_COLUMNS)
            dv += product(dropped, d_out, COLUMNS_BY_COLUMNS)
    if sums is not None:
        for table, change in zip(sums, (dk, dv), strict=True):
            table[:, number] += jnp.asarray(change).reshape(tile.plan.sides, -1, tile.plan.lanes)
    return tiles.own_lanes(dq)


def write_summaries(tile: GridTile, number: Any, by_rows: Pair, tables: Pair) -> None:
    """Copies the summaries of a tile, for the positions of a column, into the tables."""
    for by_side, table in zip(by_rows, tables, strict=True):
        for side, refs in enumerate(by_side):
            table[side, number, tile.table_rows, :] = get(refs, tile.column(number)).astype(table.dtype)


def read_gradients(tile: GridTile, number: Any, sums: Pair, by_rows: Pair) -> None:
    """Copies the gradients of the summaries of a tile out of the tables."""
    for by_side, table in zip(by_rows, sums, strict=True):
        for side, refs in enumerate(by_side):
            put(refs, tile.column(number), table[side, number, tile.table_rows, :])
