"""Summarises blocks on a GPU, pooled by maximum or mean, and attends to the own block and to the summaries.

A program summarises one block: it pools queries and keys, and then computes the local softmax and its mean of values,
so that q, k and v are read once. Backward, a program adds the gradients of one summary to those of its block.

Letters: as in `block_table`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from combiner.kernels.gpu import block_table
from combiner.kernels.gpu.block_table import LOWEST, Table
from combiner.kernels.gpu.programs import Tiles, run
from combiner.kernels.gpu.slices import Plan, Slice, loop, padded_width
from combiner.ops.segments import PADDING_ID


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_to_summaries(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    table_ids: list[Int[Array, 'b n'] | None],
    segment_ids: Int[Array, 'b l'] | None,
    dropout: Int[Array, 'b h 2'] | None,
    pool: str,
    plan: Plan,
) -> Float[Array, 'b l h d']:
    """Summarises blocks, and attends as `attend_block_and_tables` does.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        table_ids: of the summaries of each table; packed, the members of a summary are the positions of its id.
        segment_ids: of the positions; None if all are equal.
        dropout: see `slices.kept_weights`.
        pool: 'max' or 'mean'.
        plan: shapes and masks.
    """
    return _forward(q, k, v, table_ids, segment_ids, dropout, pool, plan)[0]


def _forward(q, k, v, table_ids, segment_ids, dropout, pool, plan):
    summaries = [_summarise(q, k, v, ids, segment_ids, pool, plan) for ids in table_ids]
    tables = [Table(key, value, ids) for (_, key, value, _), ids in zip(summaries, table_ids, strict=True)]
    out, residuals = block_table.forward(q, k, v, tables, segment_ids, dropout, plan)
    return out, (residuals, summaries)


def _backward(pool, plan, residuals, do):
    residuals, summaries = residuals
    q, k, v, tables, segment_ids, *_ = residuals
    *gradients, of_tables, _, _ = block_table.backward(plan, residuals, do)
    for table, (query, key, value, lse), of_table in zip(tables, summaries, of_tables, strict=True):
        vectors = query, key, value, of_table.k, of_table.v, lse
        inputs = q, k, v, segment_ids, table.ids, vectors, tuple(gradients)
        kernel = functools.partial(_gradients_kernel, pool=pool)
        gradients = run(kernel, _grid(q, plan), inputs, (q, k, v), _tiles(q, plan), plan, overwrites=3)
    return *gradients, [None] * len(tables), None, None


attend_to_summaries.defvjp(_forward, _backward)


def _summarise(q, k, v, ids, segment_ids, pool, plan):
    """Returns the queries, keys and values of the summaries of all blocks, and the log-sum-exps of their softmax."""
    batch, length, heads, width = q.shape
    count = -(-length // plan.block)
    pooled = jax.ShapeDtypeStruct((batch, count, heads, width), q.dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, count), jnp.float32)
    kernel = functools.partial(_summaries_kernel, pool=pool)
    return run(
        kernel, _grid(q, plan), (q, k, v, segment_ids, ids), (pooled, pooled, pooled, lse), _tiles(q, plan), plan
    )


def _grid(q, plan):
    return (-(-q.shape[1] // plan.block), q.shape[2], q.shape[0])


def _tiles(q: Array, plan: Plan) -> Tiles:
    """Returns tiles of 8 KiB, which spill no registers."""
    rows = min(64, 8192 // (padded_width(plan.width) * q.dtype.itemsize), pl.next_power_of_2(plan.block))
    return Tiles(1, max(16, rows))


class _Block(NamedTuple):
    """The block of a program, and its summary.

    Attributes:
        summary: the number and the segment id of the summary.
        span: the first position and the end.
        rows: function from a first position to the positions of a step, and which are members, `[· 1]`.
    """

    summary: Slice
    span: tuple[Any, Any]
    rows: Callable[[Any], tuple[Slice, Array]]


def _block(ids_ref: Any, table_ids_ref: Any, step: int, plan: Plan) -> _Block:
    number = pl.program_id(0)
    summary = Slice.of(table_ids_ref, number, 1, -(-plan.length // plan.block))
    end = jnp.minimum((number + 1) * plan.block, plan.length)

    def rows(first: Any) -> tuple[Slice, Array]:
        found = Slice.of(ids_ref, first, step, plan.length, aligned=plan.block % step == 0)
        if plan.block % step or plan.length % plan.block:
            found = found._replace(inside=found.at < end)  # no program stores in the block of another
        members = found.column.at < end
        if found.ids is not None:
            members &= found.column.ids != PADDING_ID
            if plan.packed:
                members &= found.column.ids == summary.ids[None]
        return found, members

    return _Block(summary, (number * plan.block, end), rows)


def _summaries_kernel(q_ref, k_ref, v_ref, ids_ref, table_ids_ref, *out_refs, pool, tiles, plan):
    """Summarises a block; zeros without members."""
    block = _block(ids_ref, table_ids_ref, tiles.step, plan)

    def add(first, carry):
        query, key, count = carry
        rows, members = block.rows(first)
        q, k = (rows.load(ref).astype(jnp.float32) for ref in (q_ref, k_ref))
        count += members.astype(jnp.float32).sum()
        if pool == 'max':
            tops = (jnp.where(members, x, LOWEST).max(axis=0) for x in (q, k))
            return *(jnp.maximum(before, top) for before, top in zip((query, key), tops, strict=True)), count
        sums = (jnp.where(members, x, 0).sum(axis=0) for x in (q, k))
        return *(before + total for before, total in zip((query, key), sums, strict=True)), count

    zeros = jnp.zeros(padded_width(plan.width), jnp.float32)
    identity = zeros + LOWEST if pool == 'max' else zeros
    query, key, count = loop(block.span, tiles.step, add, (identity, identity, jnp.float32(0)))
    if pool == 'mean':
        query, key = (total / jnp.maximum(count, 1) for total in (query, key))
    query, key = (jnp.where(count > 0, x, 0).astype(q_ref.dtype) for x in (query, key))

    def attend(first, carry):
        top, total, out = carry
        rows, members = block.rows(first)
        logits = _logits(query, rows.load(k_ref), members, plan)
        new_top = jnp.maximum(top, logits.max())
        weights, shrink = jnp.exp2(logits - new_top), jnp.exp2(top - new_top)
        values = (weights * rows.load(v_ref).astype(jnp.float32)).sum(axis=0)
        return new_top, total * shrink + weights.sum(), out * shrink + values

    nothing = jnp.float32(LOWEST / 2), jnp.float32(0), zeros
    top, total, out = loop(block.span, tiles.step, attend, nothing)
    total = jnp.where(total > 0, total, 1)
    for ref, x in zip(out_refs, (query, key, out / total, top + jnp.log2(total)), strict=True):
        block.summary.store(ref, x[None])


def _gradients_kernel(
    q_ref, k_ref, v_ref, ids_ref, table_ids_ref, summary_refs, added_refs, *out_refs, pool, tiles, plan
):
    """Adds the gradients of the summary of a block to those of its positions."""
    block = _block(ids_ref, table_ids_ref, tiles.step, plan)
    *vectors, lse_ref = summary_refs
    query, key, value, dkey, dvalue = (block.summary.load(ref)[0].astype(jnp.float32) for ref in vectors)
    lse, mean, scale = block.summary.load(lse_ref), (value * dvalue).sum(), plan.width**-0.5

    def softmax_gradients(rows, k, members):
        weights = jnp.exp2(_logits(query, k, members, plan) - lse)
        return weights, weights * ((rows.load(v_ref).astype(jnp.float32) * dvalue).sum(axis=1)[:, None] - mean)

    def chosen(x, pooled, members):
        return (members & (x == pooled) if pool == 'max' else members | (x != x)).astype(jnp.float32)

    def add(first, carry):
        dquery, queries, keys = carry
        rows, members = block.rows(first)
        q, k = (rows.load(ref).astype(jnp.float32) for ref in (q_ref, k_ref))
        _, change = softmax_gradients(rows, k, members)
        dquery += (change * k).sum(axis=0)
        return dquery, queries + chosen(q, query, members).sum(axis=0), keys + chosen(k, key, members).sum(axis=0)

    zeros = jnp.zeros(query.shape, jnp.float32)
    dquery, queries, keys = loop(block.span, tiles.step, add, (zeros, zeros, zeros))
    dquery, dkey = dquery * scale / jnp.maximum(queries, 1), dkey / jnp.maximum(keys, 1)

    def store(first, carry):
        rows, members = block.rows(first)
        q, k = (rows.load(ref).astype(jnp.float32) for ref in (q_ref, k_ref))
        weights, change = softmax_gradients(rows, k, members)
        dq = chosen(q, query, members) * dquery
        dk = chosen(k, key, members) * dkey + change * (query * scale)
        for out_ref, added_ref, more in zip(out_refs, added_refs, (dq, dk, weights * dvalue), strict=True):
            rows.store(out_ref, rows.load(added_ref).astype(jnp.float32) + more)
        return carry

    loop(block.span, tiles.step, store, jnp.int32(0))


def _logits(query, k, members, plan):
    """Returns the logits of the members `[· 1]`, for a query in any type."""
    products = (k.astype(jnp.float32) * query.astype(jnp.float32)).sum(axis=1)[:, None]
    return jnp.where(members, products * (math.log2(math.e) * plan.width**-0.5), LOWEST)
