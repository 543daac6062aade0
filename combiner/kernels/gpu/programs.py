"""Runs GPU kernels: the grid of programs, and what of every array a program gets.

Letters: `b` batch, `l` length, `h` head, `d` head width, `n` blocks of a sequence.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from combiner.kernels.gpu.slices import Plan


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


def token_grid(q: Array, tiles: Tiles) -> tuple[int, ...]:
    """Returns the grid of a kernel with a program for each tile of positions, of `q` `[b, l, h, d]`."""
    return (-(-q.shape[1] // tiles.rows), q.shape[2], q.shape[0])


def run(kernel: Any, grid: tuple[int, ...], inputs: Any, outputs: Any, tiles: Tiles, plan: Plan) -> Any:
    """Runs a kernel over a grid `(tiles, heads, batch[, chunks])`; a program gets its head of every array.

    Of keys and values with fewer heads, consecutive query heads get the same one.

    Args:
        kernel: function of the references of inputs and outputs, and of `tiles` and `plan`.
        grid: of the programs.
        inputs: a tree of arrays; None for a missing one.
        outputs: a tree of the arrays' shapes and types.
        tiles: see `Tiles`.
        plan: see `Plan`.
    """
    of_program = {
        2: ((None, -1), lambda i, h, b, *c: (b, 0)),  # ids
        3: ((None, None, -1), lambda i, h, b, *c: (b, h, 0)),  # log-sum-exps, dropout
        4: ((None, -1, None, -1), lambda i, h, b, *c: (b, 0, h, 0)),
        5: ((None, None, -1, None, -1), lambda i, h, b, c: (c, b, 0, h, 0)),  # parts of chunks
    }

    def spec(x: Any) -> pl.BlockSpec:
        taken, index = of_program[x.ndim]
        repeats = grid[1] // x.shape[2] if x.ndim == 4 else 1

        def of_key_head(i: Any, h: Any, b: Any, *c: Any) -> Any:
            return index(i, lax.div(h, jnp.full_like(h, repeats)), b, *c)

        block = tuple(size and whole for size, whole in zip(taken, x.shape, strict=True))
        return pl.BlockSpec(block, of_key_head if repeats > 1 else index)

    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles, plan=plan),
        grid=grid,
        in_specs=jax.tree.map(spec, inputs),
        out_specs=jax.tree.map(spec, outputs),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=plan.interpret,
    )(*inputs)
