"""Attention to the own block and to summaries, in one pass over a sequence: a kernel forward and one backward.

The tiles of a sequence come in order, and the summaries of its blocks stay in vector memory (see `plan` for the phases
when not causal). Queries, keys and values are read once, and the output is written once.

Backward, the tiles come in reverse, and the gradients of the summaries stay in vector memory. When a tile is reached,
all later queries have added to the gradients of its summaries. The weights are computed again: the forward pass only
saves the summaries.

If the summaries are given, the kernels attend only, in one phase, and the gradients of the summaries are written too.

Letters: as in `arrays`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Ids, Seeds, Tables, Tile, Tokens
from combiner.kernels.tpu.layout import tile_spec
from combiner.kernels.tpu.plan import Plan
from combiner.kernels.tpu.summaries import Upper, for_each_upper, read_gradients, write_summaries
from combiner.kernels.tpu.tiles import COLUMNS_BY_COLUMNS, ROWS_BY_ROWS, product


def _zero(tile: Tile, refs: Any) -> None:
    """Fills references with zeros in the first step of a sequence and key head."""

    @pl.when((tile.phase == 0) & tile.is_first & (tile.repeat == 0))
    def _() -> None:
        for ref in jax.tree.leaves(refs):
            ref[...] = jnp.zeros_like(ref)


def _zeros(keys: list[Array]) -> list[Any]:
    return [0.0] * len(keys)


def _forward(
    plan: Plan, tokens: Tokens, ids: Any, seeds: Any, given: Any, out: Any, made: Any, kept: Tokens | None
) -> None:
    """Visits one tile of the forward pass; of the tables of summaries, `given` are read, or `made` are written."""
    tile = Tile(plan, ids, seeds, reverse=False)
    own_mask = tile.own_mask()
    _zero(tile, made)
    tables, kept = tile.own(given or made), kept and kept._replace(q=tile.own(kept.q))

    def summarise() -> None:
        x = Tokens(*(tile.rows(ref) for ref in tokens))
        write_summaries(plan, tile, Tokens(x.q, *map(tile.for_queries, x[1:])), tables)
        if kept is not None:
            tile.keep(kept, x)
        if plan.causal:
            write_upper()
        else:
            pl.when(tile.is_last)(write_upper)

    def write_upper() -> None:
        for_each_upper(plan, tile, Upper.write, tables, upwards=True)

    def attend(block: Any) -> None:
        q, k, v = (tile.rows(ref, block, kept=kept is not None) for ref in kept or tokens)
        k, v = map(tile.for_queries, (k, v))
        masks, parts = tile.masks(block, own_mask), []
        keys, values = tile.keys_and_values(block, k, v, tables)
        for one, head in enumerate(tiles.of_each_head(tiles.scaled(q, plan.scale, q.dtype), plan.shared_by)):
            weights, total = tiles.softmax([product(head, x, ROWS_BY_ROWS) for x in keys], masks)
            weights = tile.drop(weights, block, one)
            parts.append(sum(product(w.astype(v.dtype), x) for w, x in zip(weights, values, strict=True)) / total)
        out[tile.slice(block, whole=False), :] = tiles.own_lanes(parts).astype(out.dtype)

    if plan.given:
        tile.for_each_block(attend)
    else:
        tile.run_phases(summarise, lambda: tile.for_each_block(attend))


def _block_gradient(
    tile: Tile, block: Any, q: Array, d_o: Array, groups: tuple[list[Array], list[Array]], masks: list[Array | None]
) -> tuple[Array, list[Array], list[Array]]:
    """Returns the gradients of the queries of a block (scaled), and of each group of keys and values."""
    plan, (keys, values) = tile.plan, groups
    dq: list[Any] = []
    dk, dv = _zeros(keys), _zeros(keys)
    heads = tiles.of_each_head(tiles.scaled(q, plan.scale, q.dtype), plan.shared_by)
    for one, (head, d_head) in enumerate(zip(heads, tiles.of_each_head(d_o, plan.shared_by), strict=True)):
        weights, total = tiles.softmax([product(head, x, ROWS_BY_ROWS) for x in keys], masks)
        weights = [x / total for x in weights]
        change = tile.drop([product(d_head, x, ROWS_BY_ROWS) for x in values], block, one)
        d_logits = [x.astype(q.dtype) for x in tiles.softmax_gradient(weights, change)]
        weights = [x.astype(q.dtype) for x in tile.drop(weights, block, one)]
        dq.append(sum(product(x, key) for x, key in zip(d_logits, keys, strict=True)))
        for i, (x, w) in enumerate(zip(d_logits, weights, strict=True)):
            dk[i] += product(x, head, COLUMNS_BY_COLUMNS)
            dv[i] += product(w, d_head, COLUMNS_BY_COLUMNS)
    return tiles.own_lanes(dq), dk, dv


def _backward(
    plan: Plan,
    tokens: Tokens,
    ids: Any,
    seeds: Any,
    d_out: Any,
    tables: Tables,
    outs: Tokens,
    d_given: Any,
    sums: Any,
    own: Tokens,
    kept: Tokens | None,
    of_keys: Any,
) -> None:
    """Visits one tile of the backward pass.

    The gradients of the summaries are `sums`, or if the summaries are given the output `d_given`. `own` are those of
    queries (scaled), keys and values through their own blocks, `of_keys` those of keys and values from all query heads
    of a key head.
    """
    sums = d_given or sums
    tile = Tile(plan, ids, seeds, reverse=plan.phases == 1)
    own_mask, whole = tile.own_mask(), plan.phases == 2
    _zero(tile, sums)
    tables, sums, kept = tile.own(tables), tile.own(sums), kept and kept._replace(q=tile.own(kept.q))
    own = tile.own(own) if whole else own

    def attend(block: Any) -> None:
        q, k, v, d_o = (tile.rows(ref, block) for ref in (*tokens, d_out))
        k, v = map(tile.for_queries, (k, v))
        masks = tile.masks(block, own_mask)
        keys, values = tile.keys_and_values(block, k, v, tables)
        dq, dk, dv = _block_gradient(tile, block, q, d_o, (keys, values), masks)
        here = tile.slice(block, whole=whole)
        own.q[here, :], own.k[here, :], own.v[here, :] = dq, dk[0], dv[0]
        tile.add_to_seen(block, sums, dk[1:], dv[1:])

    def attend_all() -> None:
        tile.for_each_block(attend)
        if kept is not None:
            tile.keep(kept, tuple(tile.rows(ref) for ref in tokens))

    def write() -> None:
        through = Tokens(0.0, 0.0, 0.0) if plan.given else _through_summaries(tile, kept or tokens, tables, sums)
        dq, *d_keys = (ref[tile.slice(whole=whole), :] + d for ref, d in zip(own, through, strict=True))
        outs.q[...] = (dq * plan.scale).astype(outs.q.dtype)
        for out, total, change in zip(outs[1:], of_keys or (None, None), map(tile.for_keys, d_keys), strict=True):
            _write_sum(tile, out, total, change)

    tile.run_phases(attend_all, write)


def _through_summaries(tile: Tile, tokens: Tokens, tables: Tables, sums: Tables) -> Tokens:
    """Returns the gradients of the rows of the tile through the summaries of its blocks, which must be complete."""
    plan = tile.plan

    def read_upper() -> None:
        for_each_upper(plan, tile, lambda upper, i: upper.read_gradient(i, sums), tables, upwards=False)

    if plan.causal:
        read_upper()
    else:
        pl.when(tile.is_first)(read_upper)
    x = Tokens(*(tile.rows(ref, kept=plan.kept > 0) for ref in tokens))
    return read_gradients(plan, tile, Tokens(x.q, *map(tile.for_queries, x[1:])), sums)


def _write_sum(tile: Tile, out: Any, total: Any, change: Array) -> None:
    """Adds to `total`, and writes the sum with the last query head of a key head; without `total`, the one change."""
    if total is None:
        out[...] = change.astype(out.dtype)
        return
    total[...] = jnp.where(tile.repeat == 0, 0.0, total[...]) + change

    @pl.when(tile.repeat == tile.plan.repeats - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def _tables(plan: Plan, make: Any) -> Tables:
    """Returns tables of `make(shape)` for the shape of each."""
    of_levels = tuple(make(_repeated(plan, plan.table(level))) for level in range(plan.levels))
    return Tables(of_levels, of_levels, () if plan.given else of_levels[:-1])


def _repeated(plan: Plan, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape for all query heads of a key head."""
    return shape if plan.repeats == 1 else (plan.repeats, *shape)


def _specs(plan: Plan, ids: Ids | None, seeds: Seeds | None, *, reverse: bool) -> tuple[Any, ...]:
    """Returns the block specs of tokens that are read, of tokens that are written, of ids, of seeds and of tables.

    Those of tokens are for queries, keys and values.
    """
    last = plan.tiles - 1

    def at(step: Any) -> Any:
        return last - step if reverse else step

    # In the second phase the last tile that was read stays; in the first, the first that will be written.
    def read(phase: Any, step: Any) -> Any:
        return at(step) if plan.phases == 1 else jnp.where(phase == 0, step, last)

    def write(phase: Any, step: Any) -> Any:
        return at(step) if plan.phases == 1 else jnp.where(phase == 0, 0, step)

    def read_repeat(phase: Any, repeat: Any) -> Any:
        return repeat if plan.phases == 1 else jnp.where(phase == 0, repeat, plan.repeats - 1)

    def write_repeat(phase: Any, repeat: Any) -> Any:
        return repeat if plan.phases == 1 else jnp.where(phase == 0, 0, repeat)

    def whole(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b,) + (0,) * (x.ndim - 1))

    of_tokens = pl.BlockSpec((None, plan.tile_blocks, plan.block), lambda b, h, phase, step, repeat: (b, at(step), 0))
    members = (None, plan.sides, plan.tile_blocks, plan.block)
    of_blocks = pl.BlockSpec(members, lambda b, h, phase, step, repeat: (b, 0, at(step), 0))
    if ids and plan.shares_rows:  # a tile has less than a group of rows
        of_tokens = whole(ids.of_tokens)
    of_members = [
        whole(x) if level or plan.shares_rows else of_blocks for level, x in enumerate(ids.members if ids else ())
    ]
    of_ids = ids and Ids(of_tokens, jax.tree.map(whole, ids.of_summaries), tuple(of_members))
    of_seeds = seeds and Seeds(*[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2)
    tables = _tables(
        plan, lambda shape: pl.BlockSpec((None, None, *shape), lambda b, h, *_: (b, h) + (0,) * len(shape))
    )
    of_read = Tokens(tile_spec(plan, read, read_repeat), *[tile_spec(plan, read)] * 2)
    of_write = Tokens(tile_spec(plan, write, write_repeat), *[tile_spec(plan, write)] * 2)
    return of_read, of_write, of_ids, of_seeds, tables


def _options(plan: Plan, *, products: int, arrays: tuple[int, int], name: str) -> dict[str, Any]:
    """Returns the options of a kernel: its grid, and its cost by the matrix products and arrays of all positions.

    The arrays are as many of all query heads, and of all key heads.
    """
    logits = plan.batch * plan.heads * plan.length * (plan.block + plan.sides * plan.levels * plan.siblings)
    size = plan.batch * plan.lane_groups * plan.length * plan.lanes * jnp.dtype(plan.dtype).itemsize
    total = (arrays[0] * plan.repeats + arrays[1]) * size
    return {
        'grid': (plan.batch, plan.lane_groups, plan.phases, plan.tiles, plan.repeats),
        'interpret': plan.interpret,
        'name': f'{plan.name}_{name}',
        'compiler_params': pltpu.CompilerParams(
            dimension_semantics=('parallel',) * 2 + ('arbitrary',) * 3, vmem_limit_bytes=plan.memory
        ),
        'cost_estimate': pl.CostEstimate(
            flops=2 * products * logits * plan.head_width, transcendentals=logits, bytes_accessed=total
        ),
    }


def _kept(plan: Plan, dtype: Any) -> Tokens | None:
    if not plan.kept:
        return None
    keys = pltpu.VMEM((plan.kept, plan.lanes), dtype)
    return Tokens(pltpu.VMEM(_repeated(plan, (plan.kept, plan.lanes)), dtype), keys, keys)


def _arrays(plan: Plan, dtype: Any) -> Tables:
    """Returns the shapes of the tables of all sequences and heads."""
    return _tables(plan, lambda shape: jax.ShapeDtypeStruct((plan.batch, plan.lane_groups, *shape), dtype))


def forward(
    plan: Plan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None, given: Tables | None
) -> tuple[Array, Tables]:
    """Computes the attended values, in the layout of the tokens, and the summaries, unless they are given."""
    read, write, of_ids, of_seeds, of_tables = _specs(plan, ids, seeds, reverse=False)
    dtype = tokens.q.dtype
    out, made = pl.pallas_call(
        functools.partial(_forward, plan),
        in_specs=(read, of_ids, of_seeds, given and of_tables),
        out_specs=(write.q, None if given else of_tables),
        out_shape=(jax.ShapeDtypeStruct(tokens.q.shape, dtype), None if given else _arrays(plan, dtype)),
        scratch_shapes=[_kept(plan, dtype)],
        **_options(plan, products=2, arrays=(2, 2), name='forward'),
    )(tokens, ids, seeds, given)
    return out, given or made


def backward(
    plan: Plan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None, d_out: Array, tables: Tables
) -> tuple[Tokens, Tables | None]:
    """Computes the gradients of queries, keys and values, and of summaries that are given."""
    read, write, of_ids, of_seeds, of_tables = _specs(plan, ids, seeds, reverse=plan.phases == 1)
    sums = None if plan.given else _tables(plan, lambda shape: pltpu.VMEM(shape, jnp.float32))
    shape = (plan.tile, plan.lanes)
    own = Tokens(*[pltpu.VMEM(_repeated(plan, (plan.kept, plan.lanes)) if plan.kept else shape, jnp.float32)] * 3)
    of_keys = None if plan.repeats == 1 else (pltpu.VMEM(shape, jnp.float32),) * 2
    gradients = Tokens(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tokens))
    return pl.pallas_call(
        functools.partial(_backward, plan),
        in_specs=(read, of_ids, of_seeds, read.q, of_tables),
        out_specs=(write, of_tables if plan.given else None),
        out_shape=(gradients, _arrays(plan, jnp.float32) if plan.given else None),
        scratch_shapes=[sums, own, _kept(plan, tokens.q.dtype), of_keys],
        **_options(plan, products=5, arrays=(3, 4), name='backward'),
    )(tokens, ids, seeds, d_out, tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None, given: Tables | None = None) -> Array:
    """Attends from all positions, with a gradient for the tokens, and for the summaries if they are `given`."""
    return forward(plan, tokens, ids, seeds, given)[0]


def _attend_forward(plan, tokens, ids, seeds, given=None):
    out, tables = forward(plan, tokens, ids, seeds, given)
    return out, (tokens, ids, seeds, tables)


def _attend_backward(plan, residuals, d_out):
    tokens, ids, seeds, tables = residuals
    gradients, d_given = backward(plan, tokens, ids, seeds, d_out, tables)
    return gradients, None, None, jax.tree.map(lambda d, x: d.astype(x.dtype), d_given, tables) if d_given else None


attend.defvjp(_attend_forward, _attend_backward)
