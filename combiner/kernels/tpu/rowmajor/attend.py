"""Combiner-Axial, row-major, in one pass over the rows of a sequence: a kernel forward and one backward.

The tiles, some whole rows each, come in order, and the summaries of their rows stay in vector memory (see `passes`).

Backward, the tiles come in reverse, and the gradients of the tables stay in vector memory: when a tile is reached, all
later rows have added to the gradients of its summaries. The forward pass saves the tables, the outputs, and the
logarithms, from which the weights are computed again.

Not causal, a row needs the summaries of later ones: a first phase makes all of them (backward: all their gradients), a
second does the rest.

Letters: as in `tile`, and `b` batch, `h` groups of heads that share lanes, `l` positions, `m` groups of rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from combiner.kernels.tpu.arrays import Ids, Seeds, Tokens
from combiner.kernels.tpu.layout import tile_spec
from combiner.kernels.tpu.rowmajor.passes import Backward, Forward, Residuals, Turned
from combiner.kernels.tpu.rowmajor.plan import GridPlan
from combiner.kernels.tpu.rowmajor.rows import Pair
from combiner.layers import LANES


def _specs(plan: GridPlan, ids: Ids | None, seeds: Seeds | None) -> dict[str, Any]:
    """Returns the block specs of arrays that are read in every phase, in the last, and so on."""
    reverse = plan.backward and plan.causal

    def at(step: Any) -> Any:
        return plan.tiles - 1 - step if reverse else step

    def in_first(phase: Any, step: Any) -> Any:  # and of the last tile thereafter
        return at(step) if plan.phases == 1 else jnp.where(phase == 0, step, plan.tiles - 1)

    def in_last(phase: Any, step: Any) -> Any:  # and of the first tile before
        return at(step) if plan.phases == 1 else jnp.where(phase == 0, 0, step)

    def whole(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b,) + (0,) * (x.ndim - 1))

    groups = plan.tile_groups, plan.group
    members = pl.BlockSpec((None, plan.sides, *groups), lambda b, h, phase, step, one: (b, 0, at(step), 0))
    of_tokens = pl.BlockSpec((None, *groups), lambda b, h, phase, step, one: (b, at(step), 0))
    logarithms = (None, None, plan.shared_by, *groups)
    sides, columns, rows, lanes = plan.summaries
    part = (None, None, sides, columns, plan.tile_blocks, lanes)
    table = (None, None, sides, columns, rows, lanes)
    return {
        'always': tile_spec(plan, lambda phase, step: at(step)),
        'last': tile_spec(plan, in_last),
        'ids': ids and Ids(of_tokens, jax.tree.map(whole, ids.of_summaries), (members,)),
        'seeds': seeds and Seeds(*[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2),
        'logarithms': pl.BlockSpec(logarithms, lambda b, h, phase, step, one: (b, h, 0, in_last(phase, step), 0)),
        'logarithms_always': pl.BlockSpec(logarithms, lambda b, h, phase, step, one: (b, h, 0, at(step), 0)),
        'part': pl.BlockSpec(part, lambda b, h, phase, step, one: (b, h, 0, 0, in_first(phase, step), 0)),
        'table': pl.BlockSpec(table, lambda b, h, *_: (b, h, 0, 0, 0, 0), pipeline_mode=pl.Buffered(1)),
    }


def _turned(plan: GridPlan, *, packed: bool) -> Turned:
    """Returns the scratch arrays of a tile."""
    shape = plan.tile_blocks * plan.pitch, LANES
    one = tuple([pltpu.VMEM(shape, jnp.float32)] * (plan.lanes // LANES))
    by_side = tuple([one] * plan.sides)
    ids = (pltpu.VMEM(shape, jnp.int32),) if packed else None
    return Turned(one, one, one if plan.backward else None, one, Pair(by_side, by_side), ids)


def _options(plan: GridPlan, *, in_rows: int, in_columns: int, arrays: int, name: str) -> dict[str, Any]:
    """Returns the options of a kernel: its grid, and its cost by the matrix products and arrays of all positions."""
    positions, others = plan.batch * plan.heads * plan.length, plan.sides * plan.rows
    products = in_rows * plan.block + in_columns * others
    size = plan.batch * plan.lane_groups * plan.length * plan.lanes * jnp.dtype(plan.dtype).itemsize
    return {
        'grid': (plan.batch, plan.lane_groups, plan.phases, plan.tiles, 1),  # as `layout.tile_spec` needs
        'interpret': plan.interpret,
        'name': f'{plan.name}_{name}',
        'compiler_params': pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary', 'arbitrary'),
            vmem_limit_bytes=plan.memory,
        ),
        'cost_estimate': pl.CostEstimate(
            flops=2 * positions * products * plan.head_width,
            transcendentals=positions * (2 * plan.block + others),
            bytes_accessed=arrays * size,
        ),
    }


def forward(
    plan: GridPlan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None, *, saves: bool
) -> tuple[Array, Residuals | None]:
    """Computes the attended values `[b, h, l, e]`, and if `saves` what the backward pass needs."""
    specs, groups, dtype = _specs(plan, ids, seeds), (plan.batch, plan.lane_groups), tokens.q.dtype
    residuals = shapes = None
    if saves:
        residuals = Residuals(specs['logarithms'], Pair(*[specs['part']] * 2))
        logarithms = (*groups, plan.shared_by, plan.blocks // plan.group_rows, plan.group)
        table = jax.ShapeDtypeStruct((*groups, *plan.summaries), dtype)
        shapes = Residuals(jax.ShapeDtypeStruct(logarithms, jnp.float32), Pair(table, table))
    return pl.pallas_call(
        lambda *refs: Forward(plan, *refs).run(),
        in_specs=(Tokens(*[specs['always']] * 3), specs['ids'], specs['seeds']),
        out_specs=(specs['last'], residuals),
        out_shape=(jax.ShapeDtypeStruct(tokens.q.shape, dtype), shapes),
        scratch_shapes=[Pair(*[pltpu.VMEM(plan.summaries, dtype)] * 2), _turned(plan, packed=ids is not None)],
        **_options(plan, in_rows=4, in_columns=2, arrays=3 * plan.phases + (3 if saves else 1), name='forward'),
    )(tokens, ids, seeds)


def backward(
    plan: GridPlan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None, d_out: Array, out: Array, saved: Residuals
) -> Tokens:
    """Computes the gradients of queries, keys and values."""
    specs = _specs(plan, ids, seeds)
    always, last = specs['always'], specs['last']
    residuals = Residuals(specs['logarithms_always'], Pair(*[specs['table']] * 2))
    sums = Pair(*[pltpu.VMEM(plan.summaries, jnp.float32)] * 2)
    return pl.pallas_call(
        lambda *refs: Backward(plan, *refs).run(),
        in_specs=(Tokens(always, last, last), specs['ids'], specs['seeds'], always, always, residuals),
        out_specs=(Tokens(last, last, last),),
        out_shape=(Tokens(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tokens)),),
        scratch_shapes=[sums, _turned(plan, packed=ids is not None)],
        **_options(plan, in_rows=10, in_columns=5, arrays=7 + 3 * plan.phases, name='backward'),
    )(tokens, ids, seeds, d_out, out, saved)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: GridPlan, tokens: Tokens, ids: Ids | None, seeds: Seeds | None) -> Array:
    """Attends from all positions, with a gradient for the tokens."""
    return forward(plan, tokens, ids, seeds, saves=False)[0]


def _attend_forward(plan, tokens, ids, seeds):
    out, saved = forward(plan, tokens, ids, seeds, saves=True)
    return out, (tokens, ids, seeds, out, saved)


def _attend_backward(plan, residuals, d_out):
    tokens, ids, seeds, out, saved = residuals
    return backward(plan.for_backward(), tokens, ids, seeds, d_out, out, saved), None, None


attend.defvjp(_attend_forward, _attend_backward)
