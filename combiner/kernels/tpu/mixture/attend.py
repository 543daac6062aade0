"""Combiner-Mixture in six kernels, three forward and three backward, each over independent tiles.

    forward     rows: horizontal summaries; columns: vertical summaries, own column, horizontal part; rows: the rest
    backward    rows: own row, vertical part; columns: own column, horizontal part, vertical summaries; rows: horizontal
                summaries; each adds its part to the gradients

The forward pass saves the summaries, the results, and the logarithms, from which the weights are computed again.

Letters: as in `arrays`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
from combiner.kernels.tpu.mixture.plan import Lines, MixturePlan
from combiner.kernels.tpu.mixture.tile import ColumnTile, RowTile
from combiner.layers import LANES


class Kernel(NamedTuple):
    """One of the six kernels.

    Attributes:
        body: `body(tile, x, numbers, out, made, *scratch)`, with references to arrays like tokens and to numbers of
            positions, given and made.
        name: its name after that of the mechanism.
        by_row: whether its tiles are of rows; otherwise of columns.
        products: matrix products of a position with its line, for the estimate of the cost.
        kinds: how many kinds of numbers it makes.
    """

    body: Callable[..., None]
    name: str
    by_row: bool
    products: Callable[[int], int]
    kinds: int = 0

    def __call__(
        self,
        plan: MixturePlan,
        masks: Masks | None,
        seeds: Seeds | None,
        x: Any,
        numbers: Array | None,
        out: Any,
        scratch: tuple[Any, ...] = (),
    ) -> tuple[Any, Any]:
        """Runs the kernel; `out` is a tree like that of its results, which are arrays like tokens."""
        one, cells = jax.tree.leaves(x)[0], tile_of_cells(plan, by_row=self.by_row)
        mask, lines = None if masks is None else masks.rows if self.by_row else masks.columns, self._lines(plan)
        shape = shape_of_numbers(plan, self.kinds, lines)
        made = jax.ShapeDtypeStruct(shape, jnp.float32) if self.kinds else None
        seed_specs = seeds and Seeds(*[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2)
        if not self.by_row:
            turned_mask = None if mask is None else pltpu.VMEM((plan.blocks * plan.pitch, LANES), jnp.int32)
            scratch = (turned_mask, *scratch)
        return pl.pallas_call(
            functools.partial(self._run, plan),
            grid=(plan.batch, plan.lane_groups, lines.tiles),
            in_specs=(tile_of_numbers(mask), seed_specs, jax.tree.map(lambda _: cells, x), tile_of_numbers(numbers)),
            out_specs=(jax.tree.map(lambda _: cells, out), tile_of_numbers(made)),
            out_shape=(jax.tree.map(lambda _: jax.ShapeDtypeStruct(one.shape, one.dtype), out), made),
            scratch_shapes=scratch,
            interpret=plan.interpret,
            name=f'{plan.name}_{self.name}',
            compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',) * 3, vmem_limit_bytes=plan.memory),
            cost_estimate=self._cost(plan, len(jax.tree.leaves((x, out))) * one.size * one.dtype.itemsize),
        )(mask, seeds, x, numbers)

    def _lines(self, plan: MixturePlan) -> Lines:
        return plan.by_row if self.by_row else plan.by_column

    def _run(
        self, plan: MixturePlan, mask: Any, seeds: Any, x: Any, numbers: Any, out: Any, made: Any, *scratch: Any
    ) -> None:
        if self.by_row:
            self.body(RowTile(plan, mask, seeds), x, numbers, out, made)
        else:
            self.body(ColumnTile(plan, mask, seeds, scratch[0]), x, numbers, out, made, *scratch[1:])

    def _cost(self, plan: MixturePlan, size: int) -> pl.CostEstimate:
        products = plan.batch * plan.heads * plan.length * self._lines(plan).length * self.products(plan.sides)
        return pl.CostEstimate(flops=2 * products * plan.head_width, transcendentals=products // 3, bytes_accessed=size)


SUMMARISE_ROWS = Kernel(rows.summarise, 'forward_spans', True, lambda sides: 2)
ATTEND_IN_COLUMNS = Kernel(columns.attend, 'forward_columns', False, lambda sides: 4 + 2 * sides, 4)
ATTEND_IN_ROWS = Kernel(rows.attend, 'forward_rows', True, lambda sides: 2 + 2 * sides, 3)
GRADIENT_IN_ROWS = Kernel(rows.gradient, 'backward_rows', True, lambda sides: 5 + 5 * sides, 2)
GRADIENT_IN_COLUMNS = Kernel(columns.gradient, 'backward_columns', False, lambda sides: 10 + 5 * sides)
GRADIENT_OF_SUMMARIES = Kernel(rows.summary_gradient, 'backward_spans', True, lambda sides: 5)


def _turned(plan: MixturePlan, *, backward: bool) -> columns.Turned:
    """Returns the arrays by which a tile of columns changes between rows and columns."""
    one = tuple([pltpu.VMEM((plan.blocks * plan.pitch, LANES), jnp.float32)] * (plan.lanes // LANES))
    sides = (one,) * plan.sides
    turned = columns.Turned(Tokens(one, one, one), Pair(one, one), sides)
    return turned._replace(d_out=one, d_values=sides) if backward else turned


def forward(
    plan: MixturePlan, x: Tokens, masks: Masks | None, seeds: Seeds | None, *, saves: bool
) -> tuple[Array, Any]:
    """Computes the attended values, like the tokens, and what the backward pass needs; less if it does not `save`."""
    sides = (Pair(0, 0),) * plan.sides
    horizontal, _ = SUMMARISE_ROWS(plan, masks, None, x, None, Pair(0, 0))
    inputs, wanted = columns.Inputs(x, horizontal), columns.Outputs(sides, (0, 0))
    scratch = (_turned(plan, backward=False),)
    (vertical, parts), weights = ATTEND_IN_COLUMNS(plan, masks, seeds, inputs, None, wanted, scratch)
    weights = transpose_numbers(weights, plan.by_column, plan.by_row)
    inputs, wanted = rows.Inputs(x, vertical, parts), rows.Outputs(0, 0 if saves and not plan.joint else None)
    kernel = ATTEND_IN_ROWS if saves else ATTEND_IN_ROWS._replace(kinds=0)
    results, logs = kernel(plan, masks, seeds, inputs, weights, wanted)
    return results.out, (x, masks, seeds, horizontal, vertical, results, logs)


def backward(plan: MixturePlan, saved: Any, d_out: Array) -> Tokens:
    """Computes the gradients of queries, keys and values."""
    x, masks, seeds, horizontal, vertical, results, logs = saved
    tokens, sides = Tokens(0, 0, 0), (Pair(0, 0),) * plan.sides
    inputs, wanted = rows.GradientInputs(x, vertical, results, d_out), rows.Gradients(tokens, sides)
    (so_far, d_vertical), deltas = GRADIENT_IN_ROWS(plan, masks, seeds, inputs, logs, wanted)
    direct, _, of_horizontal = jnp.split(logs, 3, axis=-3)
    numbers = jnp.concatenate([direct, of_horizontal, deltas], axis=-3)
    numbers = transpose_numbers(numbers, plan.by_row, plan.by_column)
    inputs = columns.GradientInputs(x, horizontal, d_out, d_vertical, so_far)
    wanted = rows.Gradients(tokens, Pair(0, 0))
    one = pltpu.VMEM((plan.blocks, plan.width, plan.lanes), jnp.float32)
    scratch = _turned(plan, backward=True), columns.Scratch(one, one)
    (so_far, d_horizontal), _ = GRADIENT_IN_COLUMNS(plan, masks, seeds, inputs, numbers, wanted, scratch)
    inputs = rows.SummaryInputs(x, d_horizontal, so_far)
    return GRADIENT_OF_SUMMARIES(plan, masks, None, inputs, None, tokens)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: MixturePlan, x: Tokens, masks: Masks | None, seeds: Seeds | None) -> Array:
    """Attends from all cells, with a gradient for the tokens."""
    return forward(plan, x, masks, seeds, saves=False)[0]


def _attend_forward(plan, x, masks, seeds):
    return forward(plan, x, masks, seeds, saves=True)


def _attend_backward(plan, saved, d_out):
    return backward(plan, saved, d_out), None, None


attend.defvjp(_attend_forward, _attend_backward)
