"""Attends to the own block and to tables of summaries in one fused kernel for GPUs, forward and backward.

Written in Pallas for Triton: of the supported versions of JAX it is the only backend that compiles matrix products for
A100 and H100 alike. The later of them deprecate it in favour of Mosaic GPU, which in the earlier serves no A100.

A program attends from a tile of queries, by an online softmax over the keys of their blocks and then over the tables,
and keeps the log-sum-exp of each query. The backward pass computes the weights again from it, in two kernels:

    _backward_kernel  a program computes, for a tile of positions, dk and dv from the queries of their blocks, and dq
    _tables_kernel    a program computes the part of a chunk of queries in dk and dv of a tile of a table

The parts of the chunks are summed after it. No program adds to the result of another: gradients are deterministic.
Masks compare the blocks of a query and a key, so any block length is right; lengths that tiles divide take the fewest
steps. Logits and log-sum-exps are to the base of 2.

Letters: `b` batch, `l` length, `h` head, `d` head width, `n` blocks of a sequence; in a kernel `t` queries, `s` keys.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from combiner.ops.segments import PADDING_ID

WIDTHS = (32, 64, 128, 256)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
CHUNKS, SHORTEST_CHUNK = 8, 512  # the gradients of tables: of queries, in parallel
LOWEST = float(np.finfo(np.float32).min)  # a masked logit; a query without keys has a maximum of half of it


class Table(NamedTuple):
    """A summary of each block of a sequence, and which blocks attend to it.

    Attributes:
        k: keys.
        v: values.
        ids: segment ids, `PADDING_ID` for a summary to which no query attends; None if all are equal.
        relation: whether a query attends to the summaries of 'earlier', 'later' or all 'other' blocks.
    """

    k: Float[Array, 'b n h d']
    v: Float[Array, 'b n h d']
    ids: Int[Array, 'b n'] | None
    relation: str


class Tiles(NamedTuple):
    """The tile sizes of a kernel, powers of two, and the warps and pipeline stages of its programs.

    Attributes:
        rows: positions of a program, or summaries.
        step: keys of a step of its loops, or queries.
        warps: of 32 threads.
        stages: steps whose loads are under way at once.
    """

    rows: int
    step: int
    warps: int = 4
    stages: int = 2


class Plan(NamedTuple):
    """What is known of the shapes and masks when a kernel is traced.

    Attributes:
        block: positions in a block.
        length: of the sequences.
        causal: whether a position attends to itself and earlier positions of its block only.
        packed: whether queries attend only to summaries of their segment; if not, ids only mark padding.
        relations: of the tables.
        interpret: whether to run the kernels as plain operations, where there is no GPU.
    """

    block: int
    length: int
    causal: bool
    packed: bool
    relations: tuple[str, ...]
    interpret: bool

    def aligned(self, size: int) -> bool:
        """Returns whether slices of `size` positions of a tile's blocks start at multiples of it."""
        return self.block % size == 0 or size % self.block == 0


def attend_block_and_tables(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    tables: Sequence[Table],
    segment_ids: Int[Array, 'b l'] | None = None,
    *,
    block: int,
    causal: bool,
    packed: bool = False,
    interpret: bool = False,
) -> Float[Array, 'b l h d']:
    """Attends from every query, in one softmax, to the keys of its block and to the summaries of the tables.

    Differentiable in q, k, v and the keys and values of the tables. A query without keys gets zeros.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        tables: summaries of blocks.
        segment_ids: of the positions; None if all are equal.
        block: positions in a block; the last block may be partial.
        causal: whether a position attends to itself and earlier positions of its block only.
        packed: whether queries attend only to summaries of their segment; if not, ids only mark padding.
        interpret: whether to run the kernels as plain operations, where there is no GPU.
    """
    plan = Plan(block, q.shape[1], causal, packed, tuple(table.relation for table in tables), interpret)
    summaries = tuple((table.k, table.v) for table in tables)
    return _attend(q, k, v, summaries, tuple(table.ids for table in tables), segment_ids, plan)


def forward_tiles(width: int, itemsize: int) -> Tiles:
    """Returns the tiles of the forward kernel, for a head width and the bytes of a number."""
    return Tiles(64, 64 if width < 256 else 32)


def backward_tiles(width: int, itemsize: int) -> Tiles:
    """Returns the tiles of the gradients of positions."""
    return Tiles(64, 32)


def tables_tiles(width: int, itemsize: int) -> Tiles:
    """Returns the tiles of the gradients of tables."""
    return Tiles(32, 32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, tables, table_ids, segment_ids, plan):
    return _forward(q, k, v, tables, table_ids, segment_ids, plan)[0]


def _forward(q, k, v, tables, table_ids, segment_ids, plan):
    tiles = forward_tiles(q.shape[3], q.dtype.itemsize)
    lse = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    inputs = q, k, v, segment_ids, tables, table_ids
    out, lse = _call(_forward_kernel, _token_grid(q, tiles), inputs, (q, lse), tiles, plan)
    return out, (q, k, v, tables, table_ids, segment_ids, out, lse)


def _backward(plan, residuals, do):
    q, k, v, tables, table_ids, segment_ids, out, lse = residuals
    tiles = backward_tiles(q.shape[3], q.dtype.itemsize)
    inputs = q, k, v, segment_ids, tables, table_ids, out, do, lse
    dq, dk, dv, delta = _call(_backward_kernel, _token_grid(q, tiles), inputs, (q, k, v, lse), tiles, plan)
    of_queries = q, do, lse, delta, segment_ids
    of_tables = zip(tables, table_ids, plan.relations, strict=True)
    return dq, dk, dv, tuple(_table_gradients(*of_queries, *table, plan) for table in of_tables), None, None


_attend.defvjp(_forward, _backward)


def _table_gradients(q, do, lse, delta, segment_ids, table, ids, relation, plan):
    """Returns the gradients of the keys and values of a table."""
    tiles = tables_tiles(q.shape[3], q.dtype.itemsize)
    batch, count, heads, _ = table[0].shape
    chunk = -(-max(SHORTEST_CHUNK, -(-plan.length // CHUNKS)) // tiles.step) * tiles.step
    chunks = -(-plan.length // chunk)
    part = jax.ShapeDtypeStruct((chunks, *table[0].shape), jnp.float32)
    kernel = functools.partial(_tables_kernel, relation=relation, chunk=chunk)
    inputs = q, do, lse, delta, segment_ids, table, ids
    parts = _call(kernel, (-(-count // tiles.rows), heads, batch, chunks), inputs, (part, part), tiles, plan)
    return tuple(part.sum(axis=0).astype(x.dtype) for part, x in zip(parts, table, strict=True))


def _token_grid(q: Array, tiles: Tiles) -> tuple[int, ...]:
    return (-(-q.shape[1] // tiles.rows), q.shape[2], q.shape[0])


def _call(kernel: Any, grid: tuple[int, ...], inputs: Any, outputs: Any, tiles: Tiles, plan: Plan) -> Any:
    """Runs a kernel over a grid `(tiles, heads, batch[, chunks])`; a program gets its head of every array."""
    of_program = {
        2: ((None, -1), lambda i, h, b, *c: (b, 0)),  # ids
        3: ((None, None, -1), lambda i, h, b, *c: (b, h, 0)),  # log-sum-exps
        4: ((None, -1, None, -1), lambda i, h, b, *c: (b, 0, h, 0)),
        5: ((None, None, -1, None, -1), lambda i, h, b, c: (c, b, 0, h, 0)),  # parts of chunks
    }

    def spec(x: Any) -> pl.BlockSpec:
        taken, index = of_program[x.ndim]
        return pl.BlockSpec(tuple(size and whole for size, whole in zip(taken, x.shape, strict=True)), index)

    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles, plan=plan),
        grid=grid,
        in_specs=jax.tree.map(spec, inputs),
        out_specs=jax.tree.map(spec, outputs),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=plan.interpret,
    )(*inputs)


def _forward_kernel(q_ref, k_ref, v_ref, ids_ref, tables, table_ids, out_ref, lse_ref, *, tiles, plan):
    """Attends from a tile of queries."""
    queries = _slice(ids_ref, pl.program_id(0) * tiles.rows, tiles.rows, plan.length)
    q = queries.load(q_ref)
    scale = math.log2(math.e) * q.shape[1] ** -0.5

    def attend(carry, k, v, visible):
        top, total, out = carry
        logits = jnp.where(visible, _dot(q, k.T) * scale, LOWEST)
        new_top = jnp.maximum(top, logits.max(axis=1))
        weights, shrink = jnp.exp2(logits - new_top[:, None]), jnp.exp2(top - new_top)
        total, out = total * shrink + weights.sum(axis=1), out * shrink[:, None]
        return new_top, total, out + _dot(weights.astype(v.dtype), v)

    def attend_own(first, carry):
        keys = _slice(ids_ref, first, tiles.step, plan.length, aligned=plan.aligned(tiles.step))
        return attend(carry, keys.load(k_ref), keys.load(v_ref), _own_mask(queries.column, keys.row, plan))

    def attend_table(first, carry, table, ids, relation):
        keys = _slice(ids, first, tiles.step, table[0].shape[0])
        visible = _table_mask(queries.column, keys.row, relation, plan)
        return attend(carry, keys.load(table[0]), keys.load(table[1]), visible)

    nothing = jnp.full(tiles.rows, LOWEST / 2), jnp.zeros(tiles.rows), jnp.zeros(q.shape, jnp.float32)
    carry = _loop(_own_keys(queries, plan), tiles.step, attend_own, nothing)
    for table, ids, relation in zip(tables, table_ids, plan.relations, strict=True):
        span = _summaries(queries, table[0].shape[0], relation, tiles.step, plan)
        carry = _loop(span, tiles.step, functools.partial(attend_table, table=table, ids=ids, relation=relation), carry)
    top, total, out = carry
    total = jnp.where(total > 0, total, 1)
    queries.store(out_ref, out / total[:, None])
    queries.store(lse_ref, top + jnp.log2(total))


def _backward_kernel(
    q_ref, k_ref, v_ref, ids_ref, tables, table_ids, out_ref, do_ref, lse_ref, *gradient_refs, tiles, plan
):
    """Computes the gradients of a tile of positions: as keys and values of their blocks, then as queries."""
    dq_ref, dk_ref, dv_ref, delta_ref = gradient_refs
    tile = _slice(ids_ref, pl.program_id(0) * tiles.rows, tiles.rows, plan.length)
    k, v = tile.load(k_ref), tile.load(v_ref)
    zeros, scale = jnp.zeros(k.shape, jnp.float32), k.shape[1] ** -0.5

    def add_queries(first, carry):
        queries = _slice(ids_ref, first, tiles.step, plan.length, aligned=plan.aligned(tiles.step))
        q, do = queries.load(q_ref), queries.load(do_ref)
        lse, delta = queries.load(lse_ref), _delta(queries.load(out_ref), do)
        visible = _own_mask(queries.row, tile.column, plan)
        return _add_key_gradients(carry, q, k, v, do, lse, delta, visible)

    dk, dv = _loop(_own_queries(tile, plan), tiles.step, add_queries, (zeros, zeros))
    tile.store(dk_ref, dk * scale)
    tile.store(dv_ref, dv)

    q, do = tile.load(q_ref), tile.load(do_ref)
    lse, delta = tile.load(lse_ref), _delta(tile.load(out_ref), do)
    tile.store(delta_ref, delta)

    def add_keys(dq, k, v, visible):
        weights = _weights(_dot(q, k.T), lse[:, None], visible, k.shape[1])
        change = weights * (_dot(do, v.T) - delta[:, None])
        return dq + _dot(change.astype(k.dtype), k)

    def add_own(first, dq):
        keys = _slice(ids_ref, first, tiles.step, plan.length, aligned=plan.aligned(tiles.step))
        return add_keys(dq, keys.load(k_ref), keys.load(v_ref), _own_mask(tile.column, keys.row, plan))

    def add_table(first, dq, table, ids, relation):
        keys = _slice(ids, first, tiles.step, table[0].shape[0])
        visible = _table_mask(tile.column, keys.row, relation, plan)
        return add_keys(dq, keys.load(table[0]), keys.load(table[1]), visible)

    dq = _loop(_own_keys(tile, plan), tiles.step, add_own, zeros)
    for table, ids, relation in zip(tables, table_ids, plan.relations, strict=True):
        span = _summaries(tile, table[0].shape[0], relation, tiles.step, plan)
        dq = _loop(span, tiles.step, functools.partial(add_table, table=table, ids=ids, relation=relation), dq)
    tile.store(dq_ref, dq * scale)


def _tables_kernel(
    q_ref, do_ref, lse_ref, delta_ref, ids_ref, table, table_ids_ref, dk_ref, dv_ref, *, relation, chunk, tiles, plan
):
    """Computes the part of a chunk of queries in the gradients of a tile of a table."""
    keys = _slice(table_ids_ref, pl.program_id(0) * tiles.rows, tiles.rows, table[0].shape[0])
    k, v = keys.load(table[0]), keys.load(table[1])
    zeros = jnp.zeros(k.shape, jnp.float32)

    def add_queries(first, carry):
        queries = _slice(ids_ref, first, tiles.step, plan.length)
        q, do, lse, delta = (queries.load(ref) for ref in (q_ref, do_ref, lse_ref, delta_ref))
        visible = _table_mask(queries.row, keys.column, relation, plan)
        return _add_key_gradients(carry, q, k, v, do, lse, delta, visible)

    begin = pl.program_id(3) * chunk
    span = begin, jnp.minimum(begin + chunk, plan.length)
    span = _queries_of_summaries(keys, *span, relation, tiles.step, plan)
    dk, dv = _loop(span, tiles.step, add_queries, (zeros, zeros))
    keys.store(dk_ref, dk * k.shape[1] ** -0.5)
    keys.store(dv_ref, dv)


def _add_key_gradients(carry, q, k, v, do, lse, delta, visible):
    """Adds to dk (not scaled) and dv what some queries contribute; `visible` is `[s t]`."""
    dk, dv = carry
    weights = _weights(_dot(k, q.T), lse[None], visible, k.shape[1])
    dv += _dot(weights.astype(do.dtype), do)
    change = weights * (_dot(v, do.T) - delta[None])
    return dk + _dot(change.astype(q.dtype), q), dv


def _weights(products, lse, visible, width):
    """Returns the softmax weights of products of queries and keys."""
    return jnp.exp2(jnp.where(visible, products * (math.log2(math.e) * width**-0.5), LOWEST) - lse)


def _delta(out, do):
    """Returns the mean of the gradients of a query's weights."""
    return (out.astype(jnp.float32) * do.astype(jnp.float32)).sum(axis=1)


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


class _Slice(NamedTuple):
    """Positions, or summaries, which a program holds.

    Attributes:
        start: the first.
        at: their numbers.
        inside: which of them exist; None if all do.
        ids: their segment ids; None if all are equal.
    """

    start: Any
    at: Any
    inside: Any
    ids: Any

    @property
    def column(self) -> '_Slice':
        """Returns it with arrays of shape `[· 1]`."""
        return jax.tree.map(lambda x: x[:, None] if x.ndim else x, self)

    @property
    def row(self) -> '_Slice':
        """Returns it with arrays of shape `[1 ·]`."""
        return jax.tree.map(lambda x: x[None] if x.ndim else x, self)

    def load(self, ref: Any) -> Array:
        """Loads their numbers or vectors; zeros for what does not exist."""
        return _load(ref, self.start, self.at.size, self.inside)

    def store(self, ref: Any, x: Array) -> None:
        """Stores their numbers or vectors."""
        triton.store(_part(ref, self.start, self.at.size), x.astype(ref.dtype), mask=_mask(ref, self.inside))


def _slice(ids_ref: Any, start: Any, size: int, count: int, *, aligned: bool = True) -> _Slice:
    """Returns `size` of `count` positions, or summaries, with their ids.

    Args:
        ids_ref: the ids of all; None if all are equal.
        start: the first.
        size: how many, a power of two.
        count: how many exist.
        aligned: whether `start` is a multiple of `size`.
    """
    at = start + jnp.arange(size, dtype=jnp.int32)
    inside = None if aligned and count % size == 0 else at < count
    return _Slice(jnp.int32(start), at, inside, None if ids_ref is None else _load(ids_ref, start, size, inside))


def _load(ref, start, size, inside):
    return triton.load(_part(ref, start, size), mask=_mask(ref, inside), other=None if inside is None else 0)


def _part(ref, start, size):
    return ref.at[(pl.ds(start, size), *(slice(None),) * (ref.ndim - 1))]


def _mask(ref, inside):
    return inside if inside is None or ref.ndim == 1 else inside[:, None]


def _own_mask(queries: _Slice, keys: _Slice, plan: Plan) -> Array:
    """Returns which queries attend to which positions of their blocks."""
    visible = _block_of(queries.at, plan) == _block_of(keys.at, plan)
    if plan.causal:
        visible &= keys.at <= queries.at  # of queries that exist: then the key exists
    elif keys.inside is not None:
        visible &= keys.inside
    return visible if keys.ids is None else visible & (queries.ids == keys.ids)


def _table_mask(queries: _Slice, keys: _Slice, relation: str, plan: Plan) -> Array:
    """Returns which queries attend to which summaries."""
    block = _block_of(queries.at, plan)
    visible = {'earlier': jnp.less, 'later': jnp.greater, 'other': jnp.not_equal}[relation](keys.at, block)
    if keys.inside is not None and relation != 'earlier':
        visible &= keys.inside
    if keys.ids is not None:
        visible &= keys.ids != PADDING_ID
        if plan.packed:
            visible &= queries.ids == keys.ids
    return visible


def _own_keys(tile: _Slice, plan: Plan) -> tuple[Any, Any]:
    """Returns the first and the end of the positions to which a tile attends directly."""
    last = _last(tile, plan)
    return _round_down(tile.start, plan.block), last + 1 if plan.causal else _end_of_block(last, plan)


def _own_queries(tile: _Slice, plan: Plan) -> tuple[Any, Any]:
    """Returns the first and the end of the positions that attend to a tile directly."""
    return tile.start if plan.causal else _round_down(tile.start, plan.block), _end_of_block(_last(tile, plan), plan)


def _summaries(tile: _Slice, count: int, relation: str, step: int, plan: Plan) -> tuple[Any, Any]:
    """Returns the first and the end of the summaries to which a tile attends, the first a multiple of `step`."""
    if relation == 'earlier':
        return 0, _block_of(_last(tile, plan), plan)
    return _round_down(_block_of(tile.start, plan) + 1, step) if relation == 'later' else 0, count


def _queries_of_summaries(tile: _Slice, begin: Any, end: Any, relation: str, step: int, plan: Plan) -> tuple[Any, Any]:
    """Returns the queries from `begin` to `end` that may attend to a tile of summaries, the first at a step."""
    if relation == 'earlier':
        return jnp.maximum(begin, _round_down((tile.start + 1) * plan.block, step)), end
    return begin, jnp.minimum(end, (tile.start + tile.at.size - 1) * plan.block) if relation == 'later' else end


def _last(tile, plan):
    return jnp.minimum(tile.start + tile.at.size, plan.length) - 1


def _end_of_block(position, plan):
    return jnp.minimum((_block_of(position, plan) + 1) * plan.block, plan.length)


def _block_of(position, plan):
    return lax.div(position, jnp.full_like(position, plan.block))


def _round_down(number, step):
    return number - lax.rem(number, jnp.full_like(number, step))


def _loop(span: tuple[Any, Any], step: int, body: Any, carry: Any) -> Any:
    """Returns `carry` after `body(first, carry)` for every `step` of a span."""
    begin, end = span
    count = lax.div(jnp.int32(end - begin + step - 1), jnp.int32(step))
    return lax.fori_loop(jnp.int32(0), count, lambda i, carry: body(begin + i * step, carry), carry)
