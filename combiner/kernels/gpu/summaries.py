"""Summarises blocks on a GPU, pooled by maximum or mean, and attends to the own block and to the summaries.

A program summarises one block: it pools queries and keys, and then computes the local softmax and its mean of values,
so that q, k and v are read once. Backward, a program computes what the members of a block need from its summary; the
kernel of the positions adds it to their gradients. A level of summaries is made of the level below in the same way: a
row of summaries is then the block.

Letters: as in `block_table`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from combiner.kernels.gpu import block_table
from combiner.kernels.gpu.block_table import Table
from combiner.kernels.gpu.parents import (
    LOWEST,
    Parents,
    add_to_keys,
    add_to_queries,
    local_logits,
    members_of,
    pooled_here,
    weights_and_changes,
)
from combiner.kernels.gpu.programs import Tiles, run, token_grid
from combiner.kernels.gpu.slices import Plan, Slice, loop, padded_width


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_to_summaries(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l g d'],
    v: Float[Array, 'b l g d'],
    table_ids: list[list[Int[Array, 'b _'] | None]],
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
        table_ids: of the summaries of each table; packed, the members of a summary are the children of its id.
        segment_ids: of the positions; None if all are equal.
        dropout: see `slices.kept_weights`.
        pool: 'max' or 'mean'; 'max' with several levels.
        plan: shapes and masks.
    """
    return _forward(q, k, v, table_ids, segment_ids, dropout, pool, plan)[0]


class _Summaries(NamedTuple):
    """Queries, keys and values of the summaries of a level, their segment ids and the log-sum-exps of their softmax."""

    q: Array
    k: Array
    v: Array
    ids: Array | None
    lse: Array | None = None


def _forward(q, k, v, table_ids, segment_ids, dropout, pool, plan):
    levels = [_summarise(_Summaries(q, k, v, segment_ids), table_ids[0], 0, pool, plan)]
    for level in range(1, plan.levels):
        pairs = zip(levels[-1], table_ids[level], strict=True)
        levels.append([one for below, ids in pairs for one in _summarise(below, [ids], level, pool, plan)])
    tables = [[Table(one.k, one.v, one.ids) for one in sides] for sides in levels]
    out, residuals = block_table.forward(q, k, v, tables, segment_ids, dropout, plan)
    return out, (residuals, levels)


def _backward(pool, plan, residuals, do):
    residuals, levels = residuals
    q, k, v, tables, segment_ids, *_ = residuals
    delta = block_table.rows_of_products(do, residuals)
    of_tables = block_table.table_gradients(plan, residuals, do, delta)
    of_tables = [[(None, dk, dv) for dk, dv in sides] for sides in of_tables]
    for level in range(plan.levels - 1, 0, -1):  # what lower levels get is added before it is passed on
        for side, below in enumerate(levels[level - 1]):
            _, *added = of_tables[level - 1][side]
            above = [(levels[level][side], of_tables[level][side])]
            parents = _parents(below, above, level, pool, plan)
            of_tables[level - 1][side] = _add_gradients(below, parents, added, level, pool, plan)
    above = list(zip(levels[0], of_tables[0], strict=True))
    parents = _parents(_Summaries(q, k, v, segment_ids), above, 0, pool, plan)
    gradients = block_table.position_gradients(plan, residuals, do, delta, parents, pool)
    return *gradients, [[None] * len(sides) for sides in tables], None, None


attend_to_summaries.defvjp(_forward, _backward)


def _summarise(children, table_ids, level, pool, plan):
    """Returns the summaries of a level, one table for each of `table_ids`."""
    batch, _, heads, width = children.q.shape
    pooled = jax.ShapeDtypeStruct((batch, plan.count(level), heads, width), children.q.dtype)
    lse = jax.ShapeDtypeStruct((batch, heads, plan.count(level)), jnp.float32)
    kernel = functools.partial(_summaries_kernel, pool=pool, level=level)
    q, k, v, ids, _ = children
    outputs = tuple((pooled, pooled, pooled, lse) for _ in table_ids)
    inputs, tiles = (q, k, v, ids, table_ids), _tiles(q, plan)
    found = run(kernel, _grid(q, level, plan), inputs, outputs, tiles, plan)
    return [_Summaries(q, k, v, ids, lse) for (q, k, v, lse), ids in zip(found, table_ids, strict=True)]


def _parents(children, above, level, pool, plan):
    """Returns the `Parents` of a level, for each table.

    Args:
        children: positions, or summaries of the level below.
        above: the tables of summaries of these children, each with its gradients; the one of queries may be None.
        level: of the summaries.
        pool: see `attend_to_summaries`.
        plan: see `attend_to_summaries`.
    """
    q, k, v, ids, _ = children
    kernel = functools.partial(_parents_kernel, pool=pool, level=level)
    vector, number = (jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (above[0][0].q, above[0][0].lse))
    outputs = tuple((vector, vector, number) for _ in above)
    tiles = _tiles(q, plan, share=2 if len(above) > 1 or level else 1)
    found = run(kernel, _grid(q, level, plan), (q, k, v, ids, above), outputs, tiles, plan)
    return [
        Parents(one.q, one.k, dq, dk, dv, one.lse, mean, one.ids)
        for (one, (_, _, dv)), (dq, dk, mean) in zip(above, found, strict=True)
    ]


def _add_gradients(children, parents, added, level, pool, plan):
    """Returns the gradients of summaries that have parents, in float32; `added` to those of keys and values."""
    q, k, v, ids, _ = children
    tiles = Tiles(16, 16)  # spill no registers
    kernel = functools.partial(_children_kernel, pool=pool, level=level)
    gradient = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    return run(kernel, token_grid(q, tiles), (q, k, v, ids, parents, added), (gradient,) * 3, tiles, plan)


def _grid(q, level, plan):
    return (plan.count(level), q.shape[2], q.shape[0])


def _tiles(q: Array, plan: Plan, share: int = 1) -> Tiles:
    """Returns tiles that spill no registers: 8 KiB, or a share of it where a program holds more vectors."""
    size = padded_width(plan.width) * q.dtype.itemsize * share
    rows = max(16, min(64, 8192 // size, pl.next_power_of_2(plan.block)))
    return Tiles(1, rows, warps=4 if rows * size <= 8192 else 8)


class _Block(NamedTuple):
    """The block of a program, and its summary; with several levels, also a row of summaries and theirs.

    Attributes:
        summary: the number and the segment id of the summary.
        span: the first position and the end.
        rows: function from a first position to the positions of a step, and which are members, `[· 1]`.
    """

    summary: Slice
    span: tuple[Any, Any]
    rows: Callable[[Any], tuple[Slice, Array]]


def _block(ids_ref: Any, table_ids_ref: Any, step: int, level: int, plan: Plan) -> _Block:
    number, count = pl.program_id(0), plan.count(level - 1)
    summary = Slice.of(table_ids_ref, number, 1, plan.count(level))
    end = jnp.minimum((number + 1) * plan.block, count)

    def rows(first: Any) -> tuple[Slice, Array]:
        found = Slice.of(ids_ref, first, step, count, aligned=plan.block % step == 0)
        return found, members_of(found, summary.ids, end, plan)

    return _Block(summary, (number * plan.block, end), rows)


def _summaries_kernel(q_ref, k_ref, v_ref, ids_ref, table_ids_refs, *out_refs, pool, level, tiles, plan):
    """Summarises a block for every table; zeros without members."""
    for table_ids_ref, refs in zip(table_ids_refs, out_refs, strict=True):
        block = _block(ids_ref, table_ids_ref, tiles.step, level, plan)
        query, key = _pool(q_ref, k_ref, block, pool, tiles.step, plan)
        for ref, x in zip(refs, (query, key, *_mean_value(query, k_ref, v_ref, block, tiles.step, plan)), strict=True):
            block.summary.store(ref, x[None])


def _pool(q_ref, k_ref, block, pool, step, plan):
    """Returns the query and the key of the summary of a block."""

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
    query, key, count = loop(block.span, step, add, (identity, identity, jnp.float32(0)))
    if pool == 'mean':
        query, key = (total / jnp.maximum(count, 1) for total in (query, key))
    return (jnp.where(count > 0, x, 0).astype(q_ref.dtype) for x in (query, key))


def _mean_value(query, k_ref, v_ref, block, step, plan):
    """Returns the value of the summary of a block, and the log-sum-exp of the weights."""

    def attend(first, carry):
        top, total, out = carry
        rows, members = block.rows(first)
        logits = local_logits(query, rows.load(k_ref), members, plan)
        new_top = jnp.maximum(top, logits.max())
        weights, shrink = jnp.exp2(logits - new_top), jnp.exp2(top - new_top)
        values = (weights * rows.load(v_ref).astype(jnp.float32)).sum(axis=0)
        return new_top, total * shrink + weights.sum(), out * shrink + values

    nothing = jnp.float32(LOWEST / 2), jnp.float32(0), jnp.zeros(query.shape, jnp.float32)
    top, total, out = loop(block.span, step, attend, nothing)
    total = jnp.where(total == 0, 1, total)  # a NaN stays
    return out / total, top + jnp.log2(total)


def _parents_kernel(q_ref, k_ref, v_ref, ids_ref, above_refs, *out_refs, pool, level, tiles, plan):
    """Computes what the members of the summary of a block need, for each table; see `Parents`."""
    for (refs, gradient_refs), to in zip(above_refs, out_refs, strict=True):
        block = _block(ids_ref, refs.ids, tiles.step, level, plan)
        for ref, x in zip(
            to, _gradients(q_ref, k_ref, v_ref, refs, gradient_refs, block, pool, tiles, plan), strict=True
        ):
            block.summary.store(ref, x[None])


def _gradients(q_ref, k_ref, v_ref, refs, gradient_refs, block, pool, tiles, plan):
    """Returns `dq`, `dk` and `mean` of `Parents`, for one summary."""
    query, key, value = (block.summary.load(ref)[0].astype(jnp.float32) for ref in refs[:3])
    dq_ref, *value_refs = gradient_refs
    dkey, dvalue = (block.summary.load(ref)[0] for ref in value_refs)
    lse, mean = block.summary.load(refs.lse), (value * dvalue).sum()

    def add(first, carry):
        changes, queries, keys = carry
        rows, members = block.rows(first)
        q, k, v = (rows.load(ref) for ref in (q_ref, k_ref, v_ref))
        _, change = weights_and_changes(query, k, v, dvalue, lse, mean, members, plan)
        changes += (change * k.astype(jnp.float32)).sum(axis=0)
        counts = (pooled_here(x, pooled, members, pool).sum(axis=0) for x, pooled in ((q, query), (k, key)))
        return changes, *(before + more for before, more in zip((queries, keys), counts, strict=True))

    zeros = jnp.zeros(query.shape, jnp.float32)
    changes, queries, keys = loop(block.span, tiles.step, add, (zeros, zeros, zeros))
    dquery = changes * plan.width**-0.5 + (0 if dq_ref is None else block.summary.load(dq_ref)[0])
    return dquery / jnp.maximum(queries, 1), dkey / jnp.maximum(keys, 1), mean


def _children_kernel(q_ref, k_ref, v_ref, ids_ref, parents, added_refs, *out_refs, pool, level, tiles, plan):
    """Computes the gradients of a tile of summaries: those given, and what they get as members of their parents."""
    dq_ref, dk_ref, dv_ref = out_refs
    tile = Slice.of(ids_ref, pl.program_id(0) * tiles.rows, tiles.rows, plan.count(level - 1))
    q, k, v = (tile.load(ref) for ref in (q_ref, k_ref, v_ref))
    dk, dv = (tile.load(ref) for ref in added_refs)
    dq = jnp.zeros(q.shape, jnp.float32)
    for one in parents:
        dk, dv = add_to_keys(one, tile, k, v, dk, dv, level, pool, plan)
        dq = add_to_queries(one, tile, q, dq, level, pool, plan)
    for ref, x in zip((dq_ref, dk_ref, dv_ref), (dq, dk, dv), strict=True):
        tile.store(ref, x)
