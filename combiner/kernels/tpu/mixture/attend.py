"""Combiner-Mixture in six kernels, three forward and three backward, each over independent tiles.

    forward     rows: horizontal summaries; columns: vertical summaries, own column, horizontal part; rows: the rest
    backward    rows: own row, vertical part; columns: own column, horizontal part, vertical summaries; rows: horizontal
                summaries; each adds its part to the gradients

The forward pass saves the summaries, the results, and the logarithms, from which the weights are computed again.

Letters: as in `arrays`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from combiner.kernels.tpu.arrays import Seeds, Tokens
from combiner.kernels.tpu.mixture import columns, rows
from combiner.kernels.tpu.mixture.arrays import (
    Masks,
    Pair,
    shape_of_numbers,
    tile_of_cells,
    tile_of_numbers,
    transpose_numbers,
)
from combiner.kernels.tpu.mixture.plan import MixturePlan
from combiner.kernels.tpu.mixture.tile import ColumnTile, RowTile
from combiner.layers import LANES


def _call(
    plan: MixturePlan,
    body: Callable[..., None],
    name: str,
    masks: Masks | None,
    seeds: Seeds | None,
    x: Any,
    numbers: Array | None,
    out: Any,
    out_numbers: int,
    scratch: tuple[Any, ...] = (),
    *,
    by_row: bool,
    products: int,
) -> tuple[Any, Array | None]:
    """Runs a kernel over tiles of rows or of columns.

    Args:
        plan: the sizes.
        body: `body(tile, x, numbers, out, out_numbers, *scratch)`, with references.
        name: of the kernel.
        masks: the masks.
        seeds: the seeds of dropout.
        x: arrays like tokens.
        numbers: numbers of the positions.
        out: a tree like that of the results, which are arrays like tokens.
        out_numbers: how many kinds of numbers there are in the results.
        scratch: arrays in vector memory.
        by_row: whether tiles are of rows.
        products: matrix products of a position with its line, for the estimate of the cost.
    """
    one = jax.tree.leaves(x)[0]
    cells, lines = tile_of_cells(plan, by_row=by_row), plan.by_row if by_row else plan.by_column

    def numbers_spec(array: Any) -> Any:
        return None if array is None else tile_of_numbers(array.shape)

    mask = None if masks is None else masks.rows if by_row else masks.columns
    made = jax.ShapeDtypeStruct(shape_of_numbers(plan, out_numbers, lines), jnp.float32) if out_numbers else None
    like_tokens = jax.ShapeDtypeStruct(one.shape, one.dtype)

    def kernel(mask: Any, seeds: Any, x: Any, numbers: Any, out: Any, made: Any, *scratch: Any) -> None:
        if by_row:
            body(RowTile(plan, mask, seeds), x, numbers, out, made)
        else:
            turned_mask, *scratch = scratch
            body(ColumnTile(plan, mask, seeds, turned_mask), x, numbers, out, made, *scratch)

    if not by_row:
        turned_mask = None if mask is None else pltpu.VMEM((plan.blocks * plan.pitch, LANES), jnp.int32)
        scratch = (turned_mask, *scratch)
    positions = plan.batch * plan.heads * plan.length
    return pl.pallas_call(
        kernel,
        grid=(plan.batch, plan.lane_groups, lines.tiles),
        in_specs=(
            numbers_spec(mask),
            seeds and Seeds(*[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2),
            jax.tree.map(lambda _: cells, x),
            numbers_spec(numbers),
        ),
        out_specs=(jax.tree.map(lambda _: cells, out), numbers_spec(made)),
        out_shape=(jax.tree.map(lambda _: like_tokens, out), made),
        scratch_shapes=scratch,
        interpret=plan.interpret,
        name=f'{plan.name}_{name}',
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',) * 3, vmem_limit_bytes=plan.memory),
        cost_estimate=pl.CostEstimate(
            flops=2 * positions * products * lines.length * plan.head_width,
            transcendentals=positions * lines.length * products // 3,
            bytes_accessed=(len(jax.tree.leaves((x, out)))) * one.size * one.dtype.itemsize,
        ),
    )(mask, seeds, x, numbers)


def _turned(plan: MixturePlan, *, backward: bool) -> columns.Turned:
    """Returns the arrays by which a tile of columns changes between rows and columns."""
    one = tuple([pltpu.VMEM((plan.blocks * plan.pitch, LANES), jnp.float32)] * (plan.lanes // LANES))
    sides = (one,) * plan.sides
    turned = columns.Turned(Tokens(one, one, one), Pair(one, one), sides)
    return turned._replace(d_out=one, d_values=sides) if backward else turned


def forward(
    plan: MixturePlan, x: Tokens, masks: Masks | None, seeds: Seeds | None, *, saves: bool
) -> tuple[Array, Any]:
    """Computes the attended values, like the tokens, and if `saves` what the backward pass needs."""
    call = functools.partial(_call, plan)
    horizontal, _ = call(rows.summarise, 'forward_spans', masks, None, x, None, Pair(0, 0), 0, by_row=True, products=2)
    inputs, wanted = columns.Inputs(x, horizontal), columns.Outputs((Pair(0, 0),) * plan.sides, (0, 0))
    scratch = (_turned(plan, backward=False),)
    (vertical, parts), logs = call(
        columns.attend, 'forward_columns', masks, seeds, inputs, None, wanted, 4, scratch, by_row=False,
        products=4 + 2 * plan.sides,
    )  # fmt: skip
    inputs = rows.Inputs(x, vertical, parts)
    wanted = rows.Outputs(0, 0 if saves and not plan.joint else None)
    results, logs = call(
        rows.attend, 'forward_rows', masks, seeds, inputs, transpose_numbers(logs, plan.by_column, plan.by_row), wanted, 3 * saves, by_row=True,
        products=2 + 2 * plan.sides,
    )  # fmt: skip
    return results.out, (x, masks, seeds, horizontal, vertical, results, logs)


def backward(plan: MixturePlan, saved: Any, d_out: Array) -> Tokens:
    """Computes the gradients of queries, keys and values."""
    x, masks, seeds, horizontal, vertical, results, logs = saved
    call = functools.partial(_call, plan)
    inputs = rows.GradientInputs(x, vertical, results, d_out)
    wanted = rows.Gradients(Tokens(0, 0, 0), (Pair(0, 0),) * plan.sides)
    (so_far, d_vertical), deltas = call(
        rows.gradient, 'backward_rows', masks, seeds, inputs, logs, wanted, 2, by_row=True, products=5 + 5 * plan.sides
    )
    heads = plan.shared_by
    numbers = jnp.concatenate([logs[..., :heads, :, :], logs[..., 2 * heads :, :, :], deltas], axis=3)
    inputs = columns.GradientInputs(x, horizontal, d_out, d_vertical, so_far)
    block = pltpu.VMEM((plan.blocks, plan.width, plan.lanes), jnp.float32)
    scratch = _turned(plan, backward=True), columns.Scratch(block, block)
    (so_far, d_horizontal), _ = call(
        columns.gradient, 'backward_columns', masks, seeds, inputs, transpose_numbers(numbers, plan.by_row, plan.by_column),
        rows.Gradients(Tokens(0, 0, 0), Pair(0, 0)), 0, scratch, by_row=False, products=10 + 5 * plan.sides,
    )  # fmt: skip
    inputs = rows.SummaryInputs(x, d_horizontal, so_far)
    return call(
        rows.summary_gradient, 'backward_spans', masks, None, inputs, None, Tokens(0, 0, 0), 0, by_row=True, products=5
    )[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: MixturePlan, x: Tokens, masks: Masks | None, seeds: Seeds | None) -> Array:
    """Attends from all cells, with a gradient for the tokens."""
    return forward(plan, x, masks, seeds, saves=False)[0]


def _attend_forward(plan, x, masks, seeds):
    return forward(plan, x, masks, seeds, saves=True)


def _attend_backward(plan, saved, d_out):
    return backward(plan, saved, d_out), None, None


attend.defvjp(_attend_forward, _attend_backward)
