"""Attends to the own block and to tables of summaries in one fused kernel for GPUs, forward and backward.

Written in Pallas for Triton: of the supported versions of JAX it is the only backend that compiles matrix products for
A100 and H100 alike. The later of them deprecate it in favour of Mosaic GPU, which in the earlier serves no A100.

A program attends from a tile of queries, by an online softmax over the keys of their blocks and then over the tables,
and keeps the log-sum-exp of each query. The backward pass computes the weights again from it, in two kernels:

    _tables_kernel    a program computes the part of a chunk of queries in dk and dv of a tile of each table of a level
    _backward_kernel  a program computes, for a tile of positions, dk and dv from the queries of their blocks, and dq,
                      and adds what they get as members of summaries

The parts of the chunks are summed after it. No program adds to the result of another: gradients are deterministic.
Masks compare the blocks of a query and a key, so any block length is right; lengths that tiles divide take the fewest
steps. Logits and log-sum-exps are to the base of 2.

Letters: `b` batch, `l` length, `h` head, `g` key heads, `d` head width, `n` blocks of a sequence.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from combiner.kernels.gpu.parents import LOWEST, add_to_keys, add_to_queries
from combiner.kernels.gpu.programs import Tiles, run, token_grid
from combiner.kernels.gpu.slices import (
    Plan,
    Slice,
    kept_weights,
    loop,
    most_queries,
    own_keys,
    own_mask,
    own_queries,
    padded_width,
    queries_of,
    summaries_of,
    table_mask,
)

CHUNKS, SHORTEST_CHUNK = 8, 512  # of queries, for the gradients of tables
TILES = {  # by the bytes of a number and the head width: of the kernels in their order
    (2, 64): (Tiles(64, 64), Tiles(64, 32), Tiles(32, 64)),
    (2, 128): (Tiles(64, 64), Tiles(64, 32, 8), Tiles(32, 32)),
    (2, 256): (Tiles(64, 32, 8), Tiles(32, 32, 8), Tiles(32, 32, 8)),
    (4, 64): (Tiles(64, 32), Tiles(32, 32), Tiles(32, 32)),
    (4, 128): (Tiles(64, 32, 8), Tiles(32, 32, 8), Tiles(32, 32, 8)),
}


class Table(NamedTuple):
    """The summaries of a level.

    Attributes:
        k: keys.
        v: values.
        ids: segment ids, `PADDING_ID` for a summary to which no query attends; None if all are equal.
    """

    k: Float[Array, 'b n h d']
    v: Float[Array, 'b n h d']
    ids: Int[Array, 'b n'] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def attend_block_and_tables(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l g d'],
    v: Float[Array, 'b l g d'],
    tables: list[list[Table]],
    segment_ids: Int[Array, 'b l'] | None,
    dropout: Int[Array, 'b h 2'] | None,
    plan: Plan,
) -> Float[Array, 'b l h d']:
    """Attends from every query, in one softmax, to the keys of its block and to the summaries of the tables.

    Differentiable in q, k, v and the keys and values of the tables. A query without keys gets zeros.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        tables: summaries, for every level a table for each of `plan.relations`.
        segment_ids: of the positions; None if all are equal.
        dropout: see `slices.kept_weights`.
        plan: shapes and masks.
    """
    return forward(q, k, v, tables, segment_ids, dropout, plan)[0]


def forward(q, k, v, tables, segment_ids, dropout, plan):
    """Returns the result of `attend_block_and_tables` and what `backward` needs."""
    tiles, _, _ = _tiles(q, plan, grouped=k.shape != q.shape)
    lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    inputs = q, k, v, tables, segment_ids, dropout
    out, lse = run(_forward_kernel, token_grid(q, tiles), inputs, (q, lse), tiles, plan)
    return out, (*inputs, out, lse)


def backward(plan, residuals, do):
    """Returns the gradients of the arguments of `attend_block_and_tables`."""
    q, *_ = residuals
    delta = rows_of_products(do, residuals)
    of_tables = [
        [Table(dk.astype(q.dtype), dv.astype(q.dtype), None) for dk, dv in sides]
        for sides in table_gradients(plan, residuals, do, delta)
    ]
    return *position_gradients(plan, residuals, do, delta), of_tables, None, None


attend_block_and_tables.defvjp(forward, backward)


def rows_of_products(do, residuals):
    """Returns the mean, by the weights, of the gradients of every query's weights, `[b h l]`."""
    *_, out, _ = residuals
    return jnp.einsum('blhd,blhd->bhl', out, do, preferred_element_type=jnp.float32)


def position_gradients(plan, residuals, do, delta, parents=(), pool=''):
    """Returns the gradients of q, k and v, with what they get through `parents`, a list for each relation."""
    q, k, v, tables, segment_ids, dropout, _, lse = residuals
    _, tiles, _ = _tiles(q, plan)
    inputs = q, k, v, tables, segment_ids, dropout, lse, delta, do, list(parents)
    kernel = functools.partial(_backward_kernel, pool=pool)
    dq, *of_keys = run(kernel, token_grid(q, tiles), inputs, (q, q, q), tiles, plan)
    if k.shape != q.shape:  # of each query head of a key head
        of_keys = [x.reshape(*k.shape[:3], -1, k.shape[3]).sum(axis=3) for x in of_keys]
    return dq, *of_keys


def table_gradients(plan, residuals, do, delta):
    """Returns the gradients of the keys and values of the tables, in float32."""
    q, _, _, tables, segment_ids, dropout, _, lse = residuals
    of_queries = q, do, lse, delta, segment_ids, dropout
    return [_table_gradients(*of_queries, sides, level, plan) for level, sides in enumerate(tables)]


def _table_gradients(q, do, lse, delta, segment_ids, dropout, tables, level, plan):
    """Returns the gradients of the keys and values of the tables of a level, in float32."""
    _, _, tiles = _tiles(q, plan)
    batch, count, heads, _ = tables[0].k.shape
    reach = most_queries(tiles.rows, level, tiles.step, plan)
    chunk = -(-max(SHORTEST_CHUNK, -(-reach // CHUNKS)) // tiles.step) * tiles.step
    chunks = -(-reach // chunk)
    part = jax.ShapeDtypeStruct((chunks, *tables[0].k.shape), jnp.float32)
    kernel = functools.partial(_tables_kernel, level=level, chunk=chunk)
    inputs, outputs = (q, do, lse, delta, segment_ids, dropout, tables), tuple((part, part) for _ in tables)
    parts = run(kernel, (-(-count // tiles.rows), heads, batch, chunks), inputs, outputs, tiles, plan)
    return [(dk.sum(axis=0), dv.sum(axis=0)) for dk, dv in parts]


def _tiles(q: Array, plan: Plan, *, grouped: bool = False) -> tuple[Tiles, ...]:
    """Returns the largest tiles of each kernel with which it spills no registers, on A100 and H100.

    Several query heads of a key head are `grouped`.
    """
    attention, gradients, tables = TILES[q.dtype.itemsize, max(64, padded_width(q.shape[3]))]
    if grouped and plan.levels > 1 and padded_width(q.shape[3]) > 64:  # a program also finds its key head
        attention = attention._replace(step=min(32, attention.step))
    if len(plan.relations) > 1:  # a position has more parents
        gradients = gradients._replace(rows=min(32, gradients.rows))
    return attention, gradients, tables


def _forward_kernel(q_ref, k_ref, v_ref, tables, ids_ref, drop_ref, out_ref, lse_ref, *, tiles, plan):
    """Attends from a tile of queries."""
    queries = Slice.of(ids_ref, pl.program_id(0) * tiles.rows, tiles.rows, plan.length)
    q = queries.load(q_ref)

    def attend(carry, k, v, visible, kept):
        top, total, out = carry
        logits = jnp.where(visible, _dot(q, k.T) * _scale(plan), LOWEST)
        new_top = jnp.maximum(top, logits.max(axis=1))
        weights, shrink = jnp.exp2(logits - new_top[:, None]), jnp.exp2(top - new_top)
        total, out = total * shrink + weights.sum(axis=1), out * shrink[:, None]
        return new_top, total, out + _dot((weights * kept).astype(v.dtype), v)

    rows = jnp.full(tiles.rows, LOWEST / 2, jnp.float32), jnp.zeros(tiles.rows, jnp.float32)
    nothing = *rows, jnp.zeros(q.shape, jnp.float32)
    refs = k_ref, v_ref, ids_ref, tables, drop_ref
    top, total, out = _over_keys(attend, nothing, queries, *refs, tiles.step, plan)
    total = jnp.where(total == 0, 1, total)  # a NaN stays
    queries.store(out_ref, out / total[:, None])
    queries.store(lse_ref, top + jnp.log2(total))


def _backward_kernel(
    q_ref,
    k_ref,
    v_ref,
    tables,
    ids_ref,
    drop_ref,
    lse_ref,
    delta_ref,
    do_ref,
    parents,
    *gradient_refs,
    pool,
    tiles,
    plan,
):
    """Computes the gradients of a tile of positions: as keys and values of their blocks, then as queries."""
    dq_ref, dk_ref, dv_ref = gradient_refs
    tile = Slice.of(ids_ref, pl.program_id(0) * tiles.rows, tiles.rows, plan.length)
    k, v = tile.load(k_ref), tile.load(v_ref)
    zeros = jnp.zeros(k.shape, jnp.float32)

    def add_queries(first, carry):
        queries = Slice.of(ids_ref, first, tiles.step, plan.length, aligned=plan.aligned(tiles.step))
        q, do, lse, delta = (queries.load(ref) for ref in (q_ref, do_ref, lse_ref, delta_ref))
        visible, kept = own_mask(queries.row, tile.column, plan), kept_weights(drop_ref, queries.row, tile.column)
        return _add_key_gradients(carry, q, k, v, do, lse, delta, visible, kept, plan)

    dk, dv = loop(own_queries(tile, plan), tiles.step, add_queries, (zeros, zeros))
    dk *= plan.width**-0.5
    for one in parents:
        dk, dv = add_to_keys(one, tile, k, v, dk, dv, 0, pool, plan)
    tile.store(dk_ref, dk)
    tile.store(dv_ref, dv)

    q, do, lse, delta = (tile.load(ref) for ref in (q_ref, do_ref, lse_ref, delta_ref))

    def add_keys(dq, k, v, visible, kept):
        weights = _weights(_dot(q, k.T), lse[:, None], visible, plan)
        change = weights * (_dot(do, v.T) * kept - delta[:, None])
        return dq + _dot(change.astype(k.dtype), k)

    dq = _over_keys(add_keys, zeros, tile, k_ref, v_ref, ids_ref, tables, drop_ref, tiles.step, plan)
    dq *= plan.width**-0.5
    for one in parents:
        dq = add_to_queries(one, tile, q, dq, 0, pool, plan)
    tile.store(dq_ref, dq)


def _over_keys(body, carry, queries, k_ref, v_ref, ids_ref, tables, drop_ref, step, plan):
    """Returns `carry` after `carry = body(carry, k, v, visible, kept)` over all keys to which queries attend."""

    def own(first, carry):
        keys = Slice.of(ids_ref, first, step, plan.length, aligned=plan.aligned(step))
        visible = own_mask(queries.column, keys.row, plan)
        kept = kept_weights(drop_ref, queries.column, keys.row)
        return body(carry, keys.load(k_ref), keys.load(v_ref), visible, kept)

    def summaries(first, carry, table, relation, level, step, before):
        keys = Slice.of(table.ids, first, step, plan.count(level))
        visible = table_mask(queries.column, keys.row, relation, level, plan)
        kept = kept_weights(drop_ref, queries.column, keys.row, before)
        return body(carry, keys.load(table.k), keys.load(table.v), visible, kept)

    carry = loop(own_keys(queries, plan), step, own, carry)
    for level, sides in enumerate(tables):
        some = plan.step(step, level)
        for side, (table, relation) in enumerate(zip(sides, plan.relations, strict=True)):
            options = {'table': table, 'relation': relation, 'level': level, 'step': some}
            attend = functools.partial(summaries, **options, before=plan.before(level, side))
            carry = loop(summaries_of(queries, relation, level, some, plan), some, attend, carry)
    return carry


def _tables_kernel(
    q_ref, do_ref, lse_ref, delta_ref, ids_ref, drop_ref, tables, *gradient_refs, level, chunk, tiles, plan
):
    """Computes the part of a chunk of queries in the gradients of a tile of each table of a level."""
    for side, (table, relation, out_refs) in enumerate(zip(tables, plan.relations, gradient_refs, strict=True)):
        keys = Slice.of(table.ids, pl.program_id(0) * tiles.rows, tiles.rows, plan.count(level))
        k, v, before = keys.load(table.k), keys.load(table.v), plan.before(level, side)

        def add_queries(first, carry, *, keys=keys, k=k, v=v, relation=relation, before=before):
            queries = Slice.of(ids_ref, first, tiles.step, plan.length)
            q, do, lse, delta = (queries.load(ref) for ref in (q_ref, do_ref, lse_ref, delta_ref))
            visible = table_mask(queries.row, keys.column, relation, level, plan)
            kept = kept_weights(drop_ref, queries.row, keys.column, before)
            return _add_key_gradients(carry, q, k, v, do, lse, delta, visible, kept, plan)

        begin, end = queries_of(keys, relation, level, tiles.step, plan)
        begin += pl.program_id(3) * chunk
        zeros = jnp.zeros(k.shape, jnp.float32)
        dk, dv = loop((begin, jnp.minimum(begin + chunk, end)), tiles.step, add_queries, (zeros, zeros))
        for ref, x in zip(out_refs, (dk * plan.width**-0.5, dv), strict=True):
            keys.store(ref, x)


def _add_key_gradients(carry, q, k, v, do, lse, delta, visible, kept, plan):
    """Adds to dk (not scaled) and dv what some queries contribute; masks have keys first."""
    dk, dv = carry
    weights = _weights(_dot(k, q.T), lse[None], visible, plan)
    dv += _dot((weights * kept).astype(do.dtype), do)
    change = weights * (_dot(v, do.T) * kept - delta[None])
    return dk + _dot(change.astype(q.dtype), q), dv


def _weights(products, lse, visible, plan):
    """Returns the softmax weights, of products of queries and keys."""
    return jnp.exp2(jnp.where(visible, products * _scale(plan), LOWEST) - lse)


def _scale(plan):
    return math.log2(math.e) * plan.width**-0.5


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
