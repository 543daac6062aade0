"""Combiner-Fixed in one pass over a sequence: a kernel forward and one backward.

The tiles of a sequence come in order, and the summaries of its blocks stay in vector memory (see `plan` for the phases
when not causal). Queries, keys and values are read once, and the output is written once.

Backward, the tiles come in reverse, and the gradients of the summaries stay in vector memory. When a tile is reached,
all later queries have added to the gradients of its summaries. The weights are computed again: the forward pass only
saves the summaries.

Letters: as in `tiles`, and `b` batch, `h` groups of heads that share lanes, `n` blocks of a sequence.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.plan import VMEM, Plan
from combiner.kernels.tpu.tiles import COLUMNS_BY_COLUMNS, ROWS_BY_ROWS, product


class Tokens(NamedTuple):
    """Queries (not scaled), keys and values of positions `[b, h, l, e]`, or in a kernel their references."""

    q: Any
    k: Any
    v: Any


class Ids(NamedTuple):
    """The segment ids of positions, and of the summaries of blocks.

    Attributes:
        of_tokens: segment ids `[b, n, c]`.
        members: `[b, s, n, c]`, 1 for the members of the summaries of a block, by side.
        of_summaries: `[b, s, n]`, the segment id of a summary, by side.
    """

    of_tokens: Any
    members: Any
    of_summaries: Any


class Seeds(NamedTuple):
    """Dropout: a seed for each sequence and head `[b, h]`, and of 2²⁴ weights, how many are kept `[1]`."""

    of_heads: Any
    kept: Any


class Table(NamedTuple):
    """Keys and values of the summaries of all blocks, `[b, h, s, n, e]`."""

    k: Any
    v: Any


class Tile:
    """The tile that a step of the grid visits: reads its rows, from the array or from what an earlier phase kept."""

    def __init__(self, plan: Plan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None, *, reverse: bool) -> None:
        self.plan, self.tokens, self.ids, self.seeds = plan, tokens, ids, seeds
        self.sequence, self.heads, self.phase, step = (pl.program_id(axis) for axis in range(4))
        self.first_step = (self.phase == 0) & (step == 0)
        self.number = plan.tiles - 1 - step if reverse else step

    def rows(self, ref: Any, block: Any = None, *, kept: bool = False) -> Array:
        """Returns the rows of a block, or of all blocks, with zeros beyond the end of the sequence."""
        plan = self.plan
        start, size = (0, plan.tile) if block is None else (block * plan.block, plan.block)
        here = self.number * plan.tile + start
        x = ref[pl.ds(pl.multiple_of(here if kept else start, 8), size), :]
        if plan.padded_length == plan.length:
            return x
        # There an array of full tiles ends: memory holds anything, NaN too.
        return jnp.where(here + lax.broadcasted_iota(jnp.int32, (size, 1), 0) < plan.length, x, jnp.zeros_like(x))

    def members(self, side: int) -> tuple[Array | None, Array]:
        """Returns the members of the summaries of a side, as a column of rows, and by block."""
        inside = tiles.in_block(self.plan.tile_blocks, self.plan.block)
        if self.ids is None:
            return None, inside
        members = self.ids.members[side] != 0
        return tiles.block_columns(members), inside & tiles.repeat_lanes(members)

    def masks(self, block: Any, own: Array | None) -> list[Array | None]:
        """Returns which keys of its own block, and which summaries of each side, the positions of a block see."""
        plan, number = self.plan, self.number * self.plan.tile_blocks + block
        other = lax.broadcasted_iota(jnp.int32, (1, plan.blocks), 1)
        if plan.sides == 2:
            sides = [other < number, other > number]
        else:
            sides = [other < number if plan.causal else (other != number) & (other * plan.block < plan.length)]
        if self.ids is None:
            return [own, *sides]
        row = self.ids.of_tokens[pl.ds(block, 1), :]
        ids = tiles.column(row)
        same = ids == row
        visible = [side & (ids == self.ids.of_summaries[pl.ds(one, 1), :]) for one, side in enumerate(sides)]
        return [same if own is None else own & same, *visible]

    def kept(self, block: Any, head: int, sizes: list[int]) -> list[Array] | None:
        """Returns which weights dropout keeps, for the own keys and the summaries of each side; None for all."""
        if self.seeds is None:
            return None
        seed = self.seeds.of_heads[self.sequence, self.heads * self.plan.shared_by + head]
        first = self.number * self.plan.tile + block * self.plan.block
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        count, size = self.seeds.kept[0], self.plan.block
        return [tiles.kept_weights(seed, first, at, (size, n), count) for at, n in zip(starts, sizes, strict=True)]

    def own_mask(self) -> Array | None:
        """Returns which positions of its block a position attends to: itself and earlier ones, or None for all."""
        shape = (self.plan.block, self.plan.block)
        if not self.plan.causal:
            return None
        return lax.broadcasted_iota(jnp.int32, shape, 1) <= lax.broadcasted_iota(jnp.int32, shape, 0)

    def for_each_block(self, body: Callable[[Any], None]) -> None:
        """Runs `body` for the number of each block of the tile."""
        lax.fori_loop(0, self.plan.tile_blocks, lambda i, _: body(i), None, unroll=self.plan.unroll)


def _scale(plan: Plan) -> float:
    return plan.head_width**-0.5


def _drop(weights: list[Array], kept: list[Array] | None, count: Any) -> list[Array]:
    """Drops weights, and divides the others by their part."""
    if kept is None:
        return weights
    factor = 2**24 / count.astype(jnp.float32)
    return [jnp.where(keep, x * factor, 0.0) for x, keep in zip(weights, kept, strict=True)]


def _summarise(plan: Plan, tile: Tile, table: Table, kept: Tokens | None) -> None:
    """Writes the summaries of the blocks of a tile into the table."""
    q, k, v = (tile.rows(ref) for ref in tile.tokens)
    for side in range(plan.sides):
        column, by_block = tile.members(side)
        query = tiles.pool(q, column, plan.tile_blocks, plan.pool).astype(q.dtype)
        values = []
        for head in tiles.of_each_head(tiles.scaled(query, _scale(plan), q.dtype), plan.shared_by):
            (weights,), total = tiles.softmax([product(head, k, ROWS_BY_ROWS)], [by_block])
            values.append(product((weights / total).astype(v.dtype), v))
        rows = _table_rows(plan, tile)
        table.k[side, rows, :] = tiles.pool(k, column, plan.tile_blocks, plan.pool).astype(k.dtype)
        table.v[side, rows, :] = tiles.own_lanes(values).astype(v.dtype)
    if kept is not None:
        _keep(plan, tile, kept, (q, k, v))


def _table_rows(plan: Plan, tile: Tile) -> Any:
    if plan.tiles == 1:
        return slice(None)
    return pl.ds(pl.multiple_of(tile.number * plan.tile_blocks, 8), plan.tile_blocks)


def _keep(plan: Plan, tile: Tile, kept: Tokens, arrays: tuple[Array, ...]) -> None:
    """Keeps the rows of a tile for the next phase."""
    for ref, x in zip(kept, arrays, strict=True):
        ref[pl.ds(pl.multiple_of(tile.number * plan.tile, 8), plan.tile), :] = x


def _forward(plan: Plan, tokens: Tokens, ids: Any, seeds: Any, out: Any, table: Table, kept: Tokens | None) -> None:
    """Visits one tile of the forward pass."""
    tile, source = Tile(plan, tokens, ids, seeds, reverse=False), kept or tokens
    own_mask, sizes = tile.own_mask(), [plan.block] + [plan.blocks] * plan.sides

    @pl.when(tile.first_step)
    def _() -> None:
        table.k[...], table.v[...] = jnp.zeros_like(table.k), jnp.zeros_like(table.v)

    def attend(block: Any) -> None:
        q, k, v = (tile.rows(ref, block, kept=kept is not None) for ref in source)
        masks, parts = tile.masks(block, own_mask), []
        for one, head in enumerate(tiles.of_each_head(tiles.scaled(q, _scale(plan), q.dtype), plan.shared_by)):
            keys = [k, *(table.k[side] for side in range(plan.sides))]
            weights, total = tiles.softmax([product(head, x, ROWS_BY_ROWS) for x in keys], masks)
            weights = _drop(weights, tile.kept(block, one, sizes), seeds and seeds.kept[0])
            values = [v, *(table.v[side] for side in range(plan.sides))]
            attended = sum(product(w.astype(v.dtype), x) for w, x in zip(weights, values, strict=True))
            parts.append(attended / total)
        out[pl.ds(pl.multiple_of(block * plan.block, 8), plan.block), :] = tiles.own_lanes(parts).astype(out.dtype)

    _in_phases(plan, tile, lambda: _summarise(plan, tile, table, kept), lambda: tile.for_each_block(attend))


def _in_phases(plan: Plan, tile: Tile, first: Callable[[], None], second: Callable[[], None]) -> None:
    if plan.phases == 1:
        first()
        second()
    else:
        pl.when(tile.phase == 0)(first)
        pl.when(tile.phase == 1)(second)


class Gradients(NamedTuple):
    """Gradients in vector memory, in float32: of summaries `[s, n, e]`, and of scaled q, k and v `[l, e]`."""

    table_k: Any
    table_v: Any
    q: Any
    k: Any
    v: Any


def _backward(
    plan: Plan, tokens: Tokens, ids: Any, seeds: Any, d_out: Any, table: Table, outs: Tokens, sums: Gradients, kept: Any
) -> None:
    """Visits one tile of the backward pass."""
    tile = Tile(plan, tokens, ids, seeds, reverse=plan.phases == 1)
    own_mask, sizes = tile.own_mask(), [plan.block] + [plan.blocks] * plan.sides
    scale, sides = _scale(plan), range(plan.sides)

    @pl.when(tile.first_step)
    def _() -> None:
        sums.table_k[...], sums.table_v[...] = jnp.zeros_like(sums.table_k), jnp.zeros_like(sums.table_v)

    def attend(block: Any) -> None:
        q, k, v, d_o = (tile.rows(ref, block) for ref in (*tokens, d_out))
        masks, keys, values = (
            tile.masks(block, own_mask),
            [k, *(table.k[s] for s in sides)],
            [v, *(table.v[s] for s in sides)],
        )
        dq, dk, dv = [], [0.0] * len(keys), [0.0] * len(keys)
        q_heads = tiles.of_each_head(tiles.scaled(q, scale, q.dtype), plan.shared_by)
        for one, (head, d_head) in enumerate(zip(q_heads, tiles.of_each_head(d_o, plan.shared_by), strict=True)):
            weights, total = tiles.softmax([product(head, x, ROWS_BY_ROWS) for x in keys], masks)
            weights = [x / total for x in weights]
            dropped, count = tile.kept(block, one, sizes), seeds and seeds.kept[0]
            change = _drop([product(d_head, x, ROWS_BY_ROWS) for x in values], dropped, count)
            d_logits = [x.astype(q.dtype) for x in tiles.softmax_gradient(weights, change)]
            weights = [x.astype(q.dtype) for x in _drop(weights, dropped, count)]
            dq.append(sum(product(x, key) for x, key in zip(d_logits, keys, strict=True)))
            for i, (x, w) in enumerate(zip(d_logits, weights, strict=True)):
                dk[i] += product(x, head, COLUMNS_BY_COLUMNS)
                dv[i] += product(w, d_head, COLUMNS_BY_COLUMNS)
        rows = _sum_rows(plan, tile, block)
        sums.q[rows, :], sums.k[rows, :], sums.v[rows, :] = tiles.own_lanes(dq), dk[0], dv[0]
        for side in sides:
            sums.table_k[side] += dk[1 + side]
            sums.table_v[side] += dv[1 + side]

    def attend_all() -> None:
        tile.for_each_block(attend)
        if kept is not None:
            _keep(plan, tile, kept, tuple(tile.rows(ref) for ref in tokens))

    _in_phases(plan, tile, attend_all, lambda: _summarise_backward(plan, tile, outs, sums, kept))


def _sum_rows(plan: Plan, tile: Tile, block: Any = None) -> Any:
    """Returns the rows of the sums for a block, or for the tile: the sums of one phase hold one tile."""
    start, size = (0, plan.tile) if block is None else (block * plan.block, plan.block)
    here = start + tile.number * plan.tile if plan.phases == 2 else start
    return pl.ds(pl.multiple_of(here, 8), size)


def _summarise_backward(plan: Plan, tile: Tile, outs: Tokens, sums: Gradients, kept: Tokens | None) -> None:
    """Adds the gradients through the summaries of a tile, and writes the gradients of its positions."""
    q, k, v = (tile.rows(ref, kept=kept is not None) for ref in kept or tile.tokens)
    blocks, scale, rows = plan.tile_blocks, _scale(plan), _sum_rows(plan, tile)
    dq, dk, dv = (ref[rows, :] for ref in (sums.q, sums.k, sums.v))
    for side in range(plan.sides):
        column, by_block = tile.members(side)
        query = tiles.scaled(tiles.pool(q, column, blocks, plan.pool).astype(q.dtype), scale, q.dtype)
        d_value = sums.table_v[side, _table_rows(plan, tile), :].astype(q.dtype)
        d_query, shared = [], plan.shared_by
        heads = zip(tiles.of_each_head(query, shared), tiles.of_each_head(d_value, shared), strict=True)
        for head, d_head in heads:
            (weights,), total = tiles.softmax([product(head, k, ROWS_BY_ROWS)], [by_block])
            weights = weights / total
            (d_logits,) = tiles.softmax_gradient([weights], [product(d_head, v, ROWS_BY_ROWS)])
            d_logits = d_logits.astype(q.dtype)
            d_query.append(product(d_logits, k))
            dk += product(d_logits, head, COLUMNS_BY_COLUMNS)
            dv += product(weights.astype(q.dtype), d_head, COLUMNS_BY_COLUMNS)
        dq += tiles.pool_gradient(tiles.own_lanes(d_query), q, column, blocks, plan.pool)
        dk += tiles.pool_gradient(sums.table_k[side, _table_rows(plan, tile), :], k, column, blocks, plan.pool)
    outs.q[...] = (dq * scale).astype(outs.q.dtype)
    outs.k[...], outs.v[...] = dk.astype(outs.k.dtype), dv.astype(outs.v.dtype)


def _specs(plan: Plan, ids: Ids | None, seeds: Seeds | None, *, reverse: bool) -> tuple[Any, ...]:
    """Returns the block specs of tokens that are read, of tokens that are written, of ids, of seeds and of tables."""
    last = plan.tiles - 1

    def at(step: Any) -> Any:
        return last - step if reverse else step

    # In the second phase the last tile that was read stays; in the first, the first that will be written.
    def read(b: Any, h: Any, phase: Any, step: Any) -> tuple[Any, ...]:
        return b, h, at(step) if plan.phases == 1 else jnp.where(phase == 0, step, last), 0

    def write(b: Any, h: Any, phase: Any, step: Any) -> tuple[Any, ...]:
        return b, h, at(step) if plan.phases == 1 else jnp.where(phase == 0, 0, step), 0

    tile = (None, None, plan.tile, plan.lanes)
    of_ids = ids and Ids(
        pl.BlockSpec((None, plan.tile_blocks, plan.block), lambda b, h, phase, step: (b, at(step), 0)),
        pl.BlockSpec((None, plan.sides, plan.tile_blocks, plan.block), lambda b, h, phase, step: (b, 0, at(step), 0)),
        pl.BlockSpec((None, plan.sides, plan.blocks), lambda b, h, phase, step: (b, 0, 0)),
    )
    of_seeds = seeds and Seeds(*[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2)
    table = pl.BlockSpec((None, None, *plan.table), lambda b, h, phase, step: (b, h, 0, 0, 0))
    return pl.BlockSpec(tile, read), pl.BlockSpec(tile, write), of_ids, of_seeds, Table(table, table)


def _options(plan: Plan, *, products: int, arrays: int, name: str) -> dict[str, Any]:
    """Returns the options of a kernel: its grid, and its cost by the matrix products and arrays of all positions."""
    positions = plan.batch * plan.heads * plan.length
    logits = positions * (plan.block + plan.sides * plan.blocks)
    size = plan.batch * plan.lane_groups * plan.length * plan.lanes * jnp.dtype(plan.dtype).itemsize
    return {
        'grid': (plan.batch, plan.lane_groups, plan.phases, plan.tiles),
        'interpret': plan.interpret,
        'name': name,
        'compiler_params': pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'), vmem_limit_bytes=VMEM
        ),
        'cost_estimate': pl.CostEstimate(
            flops=2 * products * logits * plan.head_width, transcendentals=logits, bytes_accessed=arrays * size
        ),
    }


def forward(plan: Plan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None) -> tuple[Array, Table]:
    """Computes the attended values `[b, h, l, e]`, and the summaries."""
    read, write, of_ids, of_seeds, of_table = _specs(plan, ids, seeds, reverse=False)
    table = jax.ShapeDtypeStruct((plan.batch, plan.lane_groups, *plan.table), tokens.k.dtype)
    kept = Tokens(*[pltpu.VMEM((plan.kept, plan.lanes), tokens.q.dtype)] * 3) if plan.kept else None
    return pl.pallas_call(
        functools.partial(_forward, plan),
        in_specs=(Tokens(read, read, read), of_ids, of_seeds),
        out_specs=(write, of_table),
        out_shape=(jax.ShapeDtypeStruct(tokens.q.shape, tokens.q.dtype), Table(table, table)),
        scratch_shapes=[kept],
        **_options(plan, products=2, arrays=4, name='combiner_fixed_forward'),
    )(tokens, ids, seeds)


def backward(plan: Plan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None, d_out: Array, table: Table) -> Tokens:
    """Computes the gradients of queries, keys and values."""
    read, write, of_ids, of_seeds, of_table = _specs(plan, ids, seeds, reverse=plan.phases == 1)
    summed = [pltpu.VMEM(shape, jnp.float32) for shape in (plan.table, (plan.kept or plan.tile, plan.lanes))]
    sums = Gradients(*summed[:1] * 2, *summed[1:] * 3)
    kept = Tokens(*[pltpu.VMEM((plan.kept, plan.lanes), tokens.q.dtype)] * 3) if plan.kept else None
    return pl.pallas_call(
        functools.partial(_backward, plan),
        in_specs=(Tokens(read, read, read), of_ids, of_seeds, read, of_table),
        out_specs=(Tokens(write, write, write),),
        out_shape=(Tokens(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tokens)),),
        scratch_shapes=[sums, kept],
        **_options(plan, products=5, arrays=7, name='combiner_fixed_backward'),
    )(tokens, ids, seeds, d_out, table)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None) -> Array:
    """Attends from all positions, with a gradient for the tokens."""
    return forward(plan, tokens, ids, seeds)[0]


def _attend_forward(plan, tokens, ids, seeds):
    out, table = forward(plan, tokens, ids, seeds)
    return out, (tokens, ids, seeds, table)


def _attend_backward(plan, residuals, d_out):
    tokens, ids, seeds, table = residuals
    return backward(plan, tokens, ids, seeds, d_out, table), None, None


attend.defvjp(_attend_forward, _attend_backward)
