"""Visiting a sequence in steps, so that what a step computes stays in a CPU's cache.

A mechanism's logits are many times its input. Computed for all positions at once, on a CPU, they are written to and
read back from main memory, and the system has to find fresh pages for them. A step computes those of some blocks,
and their weighted values, and keeps nothing for the backward pass, which computes them again. At 4,096 positions, 8
heads of 64, on 2 cores, `combiner_fixed` so took half of the time forward and nine tenths of it for the gradients, with
half of the memory. Accelerators want all the work at once: there, one step takes everything.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

STEP_LOGITS = 2**18  # 1 MiB of float32: with its exponentials and values it fits into a core's second-level cache


def step_count(logits: int, blocks: int) -> int:
    """The number of equal steps in which to visit the blocks of a sequence.

    Args:
        logits: how many there are in all.
        blocks: the number of blocks of a sequence, of which the result is a divisor.
    """
    if jax.default_backend() != 'cpu':
        return 1
    wanted = max(1, logits // STEP_LOGITS)
    return max(steps for steps in range(1, blocks + 1) if blocks % steps == 0 and steps <= wanted)


def visit(body: Callable[..., Any], steps: int, batch: int, *arrays: Any) -> Any:
    """`body(*arrays)`, computed in steps; the arrays may be trees of arrays.

    Every array's first axis holds, sequence after sequence, one element for each position or block, and so do those of
    what `body` returns. A step gets the elements of `1 / steps` of every sequence.
    """
    if steps == 1:
        return body(*arrays)

    def cut(x: jax.Array) -> jax.Array:
        pieces = x.reshape(batch, steps, -1, *x.shape[1:])
        return jnp.moveaxis(pieces, 1, 0).reshape(steps, -1, *x.shape[1:])

    def join(x: jax.Array) -> jax.Array:
        pieces = x.reshape(steps, batch, -1, *x.shape[2:])
        return jnp.moveaxis(pieces, 0, 1).reshape(-1, *x.shape[2:])

    step = jax.checkpoint(lambda pieces: body(*pieces), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(step, jax.tree.map(cut, arrays)))
