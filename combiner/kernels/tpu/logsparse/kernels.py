"""The kernels over the tiles of a sequence, forward and backward, and the gradient that joins them.

Forward, one kernel pools the queries of all spans of whole chunks. The next adds the keys and values of a chunk to the
spans that hold it, and attends from its positions to the spans that are complete: causal, all that they see. Otherwise
a first phase completes the spans, and keeps keys and values in vector memory.

Backward, the chunks come in reverse, so that when a chunk is reached all later queries have added to the gradients of
the spans that hold it. Only the gradients of the queries of spans are not complete before the last chunk: one more
kernel adds them. Queries are read twice forward, and once more backward, with their gradients; all else is read or
written once.

Letters: as in `arrays`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from combiner.kernels.tpu.arrays import Seeds, Tile, Tokens
from combiner.kernels.tpu.layout import tile_spec
from combiner.kernels.tpu.logsparse.attend import attend as attend_chunk
from combiner.kernels.tpu.logsparse.attend import attend_gradient
from combiner.kernels.tpu.logsparse.plan import SiblingPlan
from combiner.kernels.tpu.logsparse.spans import Chunk, Ids, Pooled, Sums, Tables, start, start_sums


def _zero(refs: Any) -> None:
    for ref in jax.tree.leaves(refs):
        ref[...] = jnp.zeros_like(ref)


def _for_each_chunk(plan: SiblingPlan, tile: Tile, ids: Ids | None, body: Any, *, reverse: bool = False) -> None:
    last = plan.tile_blocks - 1
    tile.for_each_block(lambda block: body(Chunk(plan, tile, ids, last - block if reverse else block)))


def _pool(plan: SiblingPlan, q: Any, ids: Any, table: Pooled) -> None:
    """Visits one tile, and adds its queries to the spans."""
    tile = Tile(plan, None, None, reverse=False)
    pl.when(tile.is_first)(lambda: start(plan, table))
    _for_each_chunk(plan, tile, ids, lambda chunk: chunk.add_pooled(tile.rows(q, chunk.block), table))


def _forward(
    plan: SiblingPlan, tokens: Tokens, ids: Any, seeds: Any, queries: Pooled, out: Any, k: Pooled, v: Sums, kept: Any
) -> None:
    """Visits one tile of the forward pass; `kept` are keys and values."""
    tile, tables = Tile(plan, None, seeds, reverse=False), Tables(queries, k, v)

    def initialise() -> None:
        start(plan, k)
        start_sums(v)

    pl.when((tile.phase == 0) & tile.is_first)(initialise)

    def add_to_spans(chunk: Chunk) -> None:
        keys, values = (tile.rows(ref, chunk.block) for ref in tokens[1:])
        if kept is not None:
            for ref, rows in zip(kept, (keys, values), strict=True):
                ref[tile.slice(chunk.block, whole=True), :] = rows
        if plan.span_levels:
            chunk.add_pooled(keys, k)
            chunk.add_expectation(chunk.query(queries, keys.dtype), keys, values, v)

    def attend(chunk: Chunk) -> None:
        q = tile.rows(tokens.q, chunk.block)
        x = Tokens(q, *(tile.rows(ref, chunk.block, kept=kept is not None) for ref in kept or tokens[1:]))
        out[tile.slice(chunk.block, whole=False), :] = attend_chunk(chunk, x, tables).astype(out.dtype)

    def both(chunk: Chunk) -> None:
        add_to_spans(chunk)
        attend(chunk)

    if plan.causal:
        _for_each_chunk(plan, tile, ids, both)
    else:
        tile.run_phases(*(lambda body=body: _for_each_chunk(plan, tile, ids, body) for body in (add_to_spans, attend)))


def _backward(
    plan: SiblingPlan, tokens: Tokens, ids: Any, seeds: Any, d_out: Any, tables: Tables, results: Any, scratch: Any
) -> None:
    """Visits one tile of the backward pass.

    `results` are the gradients of positions, and of the queries of spans. `scratch` are the gradients of the keys and
    values of spans and, if not causal, of positions through what they attend to; and keys and values.
    """
    (outs, d_queries), (sums, own, kept) = results, scratch
    tile = Tile(plan, None, seeds, reverse=plan.phases == 1)
    whole = plan.phases == 2
    pl.when((tile.phase == 0) & tile.is_first)(lambda: _zero((d_queries, sums)))

    def attend(chunk: Chunk) -> tuple[Tokens, Array, Array]:
        x = Tokens(*(tile.rows(ref, chunk.block) for ref in tokens))
        (dq, dk, dv), d_seen = attend_gradient(chunk, x, tile.rows(d_out, chunk.block), tables)
        if plan.span_levels:
            for table, rows in zip(sums, d_seen[1:], strict=True):
                chunk.add(table, rows, own=False)
        outs.q[tile.slice(chunk.block, whole=False), :] = (dq * plan.scale).astype(outs.q.dtype)
        return x, dk, dv

    def through_spans(chunk: Chunk, k: Array, v: Array, dk: Array, dv: Array) -> None:
        if plan.span_levels:
            d_k, d_v = (chunk.read(table, own=True) for table in sums)
            query = chunk.query(tables.q, k.dtype)
            d_query, more_k, more_v = chunk.expectation_gradient(query, k, v, tables.v, d_v)
            chunk.add(d_queries, d_query, own=True)
            dk += more_k + chunk.pooled_gradient(k, tables.k, d_k)
            dv += more_v
        here = tile.slice(chunk.block, whole=False)
        outs.k[here, :], outs.v[here, :] = dk.astype(outs.k.dtype), dv.astype(outs.v.dtype)

    def both(chunk: Chunk) -> None:
        x, dk, dv = attend(chunk)
        through_spans(chunk, x.k, x.v, dk, dv)

    def first(chunk: Chunk) -> None:
        x, *d = attend(chunk)
        here = tile.slice(chunk.block, whole=whole)
        for ref, rows in zip((*own, *(kept or ())), (*d, *(x[1:] if whole else ())), strict=True):
            ref[here, :] = rows

    def second(chunk: Chunk) -> None:
        k, v = (tile.rows(ref, chunk.block, kept=whole) for ref in kept or tokens[1:])
        dk, dv = (ref[tile.slice(chunk.block, whole=whole), :] for ref in own)
        through_spans(chunk, k, v, dk, dv)

    if plan.causal:
        _for_each_chunk(plan, tile, ids, both, reverse=True)
    else:
        tile.run_phases(*(lambda body=body: _for_each_chunk(plan, tile, ids, body) for body in (first, second)))


def _add_through_queries(plan: SiblingPlan, q: Any, ids: Any, table: Pooled, d_spans: Any, dq: Any, out: Any) -> None:
    """Visits one tile, and adds the gradients through the queries of spans."""
    tile = Tile(plan, None, None, reverse=False)

    def add(chunk: Chunk) -> None:
        through = chunk.pooled_gradient(tile.rows(q, chunk.block), table, chunk.read(d_spans, own=True))
        here = tile.slice(chunk.block, whole=False)
        out[here, :] = (dq[here, :].astype(jnp.float32) + through * plan.scale).astype(out.dtype)

    _for_each_chunk(plan, tile, ids, add)


class _Specs:
    """The block specs of a kernel over tiles, in order or in reverse."""

    def __init__(self, plan: SiblingPlan, phases: int, *, reverse: bool = False) -> None:
        self.plan, self.phases, self.reverse = plan, phases, reverse

    def tokens(self, *phases: int) -> pl.BlockSpec:
        """Returns the spec of an array of tiles that the given phases visit; before and after, the nearest stays."""
        plan, last = self.plan, self.plan.tiles - 1

        def number(phase: Any, step: Any) -> Any:
            step = last - step if self.reverse else step
            if self.phases == 2 and len(phases) == 1:
                step = jnp.where(phase == phases[0], step, 0 if phases[0] else last)
            return step

        return tile_spec(plan, number)

    def ids(self, ids: Ids | None) -> Ids | None:
        """Returns the specs of segment ids."""
        last = self.plan.tiles - 1

        def spec(x: Array) -> pl.BlockSpec:
            sides = x.shape[1:-2]
            shape = (None, *sides, self.plan.tile_blocks, x.shape[-1])
            zeros = (0,) * len(sides)
            return pl.BlockSpec(shape, lambda b, h, p, step, _: (b, *zeros, last - step if self.reverse else step, 0))

        return jax.tree.map(spec, ids)

    def table(self) -> pl.BlockSpec:
        """Returns the spec of a table of a whole sequence."""
        return pl.BlockSpec((None, None, *self.plan.span_table), lambda b, h, *_: (b, h, 0, 0, 0))


def _options(plan: SiblingPlan, name: str, *, phases: int = 1, flops: int = 0, arrays: int) -> dict[str, Any]:
    """Returns the options of a kernel: its grid, and its cost by FLOPs of a position and arrays of all positions."""
    positions, size = plan.batch * plan.lane_groups * plan.length, jnp.dtype(plan.dtype).itemsize
    parallel = 'parallel', 'parallel', 'arbitrary', 'arbitrary', 'arbitrary'
    return {
        'grid': (plan.batch, plan.lane_groups, phases, plan.tiles, 1),
        'interpret': plan.interpret,
        'name': f'{plan.name}_{name}',
        'compiler_params': pltpu.CompilerParams(dimension_semantics=parallel, vmem_limit_bytes=plan.memory),
        'cost_estimate': pl.CostEstimate(
            flops=flops * plan.batch * plan.heads * plan.length,
            transcendentals=positions * plan.keys if flops else 0,
            bytes_accessed=arrays * positions * plan.lanes * size,
        ),
    }


def _flops(plan: SiblingPlan, products: int) -> int:
    """Returns the FLOPs of a position for a number of products with all keys, and as many with nodes and spans."""
    return 2 * 2 * products * plan.keys * plan.head_width


def _table(plan: SiblingPlan) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((plan.batch, plan.lane_groups, *plan.span_table), jnp.float32)


def pool_queries(plan: SiblingPlan, q: Array, ids: Ids | None) -> Pooled:
    """Pools the queries of all spans of whole chunks."""
    if not plan.span_levels:
        return Pooled(*[jnp.zeros(_table(plan).shape, jnp.float32)] * 2)
    specs = _Specs(plan, 1)
    return pl.pallas_call(
        functools.partial(_pool, plan),
        in_specs=(specs.tokens(), specs.ids(ids)),
        out_specs=(Pooled(*[specs.table()] * 2),),
        out_shape=(Pooled(*[_table(plan)] * 2),),
        **_options(plan, 'pool', arrays=1),
    )(q, ids)[0]


def _kept(plan: SiblingPlan, dtype: Any) -> Any:
    return [pltpu.VMEM((plan.kept, plan.lanes), dtype)] * 2 if plan.kept else None


def _seeds(seeds: Seeds | None) -> Any:
    return jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), seeds)


def forward(plan: SiblingPlan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None) -> tuple[Array, Tables]:
    """Computes the attended values `[b, h, l, e]`, and the tables of spans."""
    specs, queries = _Specs(plan, plan.phases), pool_queries(plan, tokens.q, ids)
    out = jax.ShapeDtypeStruct(tokens.q.shape, tokens.q.dtype)
    out, k, v = pl.pallas_call(
        functools.partial(_forward, plan),
        in_specs=(
            Tokens(specs.tokens(1), specs.tokens(0), specs.tokens(0)),
            specs.ids(ids),
            _seeds(seeds),
            Pooled(*[specs.table()] * 2),
        ),
        out_specs=(specs.tokens(1), Pooled(*[specs.table()] * 2), Sums(*[specs.table()] * 3)),
        out_shape=(out, Pooled(*[_table(plan)] * 2), Sums(*[_table(plan)] * 3)),
        scratch_shapes=[_kept(plan, tokens.k.dtype)],
        **_options(plan, 'forward', phases=plan.phases, flops=_flops(plan, 2), arrays=4),
    )(tokens, ids, seeds, queries)
    return out, Tables(queries, k, v)


def backward(
    plan: SiblingPlan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None, d_out: Array, tables: Tables
) -> Tokens:
    """Computes the gradients of queries, keys and values."""
    specs = _Specs(plan, plan.phases, reverse=plan.phases == 1)
    own = None if plan.causal else [pltpu.VMEM((plan.kept or plan.tile, plan.lanes), jnp.float32)] * 2
    d, d_queries = pl.pallas_call(
        functools.partial(_backward, plan),
        in_specs=(
            Tokens(*[specs.tokens(0)] * 3),
            specs.ids(ids),
            _seeds(seeds),
            specs.tokens(0),
            jax.tree.map(lambda _: specs.table(), tables),
        ),
        out_specs=((Tokens(specs.tokens(0), specs.tokens(1), specs.tokens(1)), specs.table()),),
        out_shape=((Tokens(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tokens)), _table(plan)),),
        scratch_shapes=[([pltpu.VMEM(plan.span_table, jnp.float32)] * 2, own, _kept(plan, tokens.k.dtype))],
        **_options(plan, 'backward', phases=plan.phases, flops=_flops(plan, 5), arrays=7),
    )(tokens, ids, seeds, d_out, tables)[0]
    return d._replace(q=_through_queries(plan, tokens.q, ids, tables.q, d_queries, d.q)) if plan.span_levels else d


def _through_queries(
    plan: SiblingPlan, q: Array, ids: Ids | None, queries: Pooled, d_queries: Array, dq: Array
) -> Array:
    """Adds the gradients through the queries of spans."""
    specs = _Specs(plan, 1)
    tables = Pooled(*[specs.table()] * 2), specs.table()
    position = len(jax.tree.leaves((q, ids, queries, d_queries)))
    return pl.pallas_call(
        functools.partial(_add_through_queries, plan),
        in_specs=(specs.tokens(), specs.ids(ids), *tables, specs.tokens()),
        out_specs=(specs.tokens(),),
        out_shape=(jax.ShapeDtypeStruct(dq.shape, dq.dtype),),
        input_output_aliases={position: 0},
        **_options(plan, 'queries', arrays=3),
    )(q, ids, queries, d_queries, dq)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: SiblingPlan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None) -> Array:
    """Attends from all positions, with a gradient for the tokens."""
    return forward(plan, tokens, ids, seeds)[0]


def _attend_forward(plan, tokens, ids, seeds):
    out, tables = forward(plan, tokens, ids, seeds)
    return out, (tokens, ids, seeds, tables)


def _attend_backward(plan, residuals, d_out):
    tokens, ids, seeds, tables = residuals
    return backward(plan, tokens, ids, seeds, d_out, tables), None, None


attend.defvjp(_attend_forward, _attend_backward)
