"""Visiting a sequence in steps, so that what a step computes stays in a CPU's cache.

A mechanism's logits are many times its input. Computed for all positions at once, on a CPU, they are written to and
read back from main memory, and the system has to find fresh pages for them. A step computes those of some blocks,
and their weighted values, and keeps nothing for the backward pass, which computes them again. At 4,096 positions, 8
heads of 64, on 2 cores, `combiner_fixed` so took half of the time forward and nine tenths of it for the gradients, with
half of the memory. Accelerators want all the work at once: there, one step takes everything.

Where a position needs others from the whole sequence (both axes of a grid), a step takes some heads instead of some
blocks. It cuts them out of the input and writes its part of the result in place. `combiner_axial_rowmajor`, as above:

    | one step takes                      | forward        | forward + backward |
    |-------------------------------------|----------------|--------------------|
    | all heads                           | 35 ms,   59 MB | 83 ms,      118 MB |
    | four heads                          | 23 ms,   29 MB | 78 ms,       71 MB |
    | two heads                           | 13 ms,   15 MB | 62 ms,       36 MB |
    | one head                            | 13 ms,    7 MB | 53 ms,       18 MB |
    | one head, by a map with heads first | 23 ms,   35 MB | 65 ms,       58 MB |

The map copies every array that goes in or comes out; above 32 MiB of temporaries the system finds fresh pages at every
call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

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

    def cut(x: Array) -> Array:
        pieces = x.reshape(batch, steps, -1, *x.shape[1:])
        return jnp.moveaxis(pieces, 1, 0).reshape(steps, -1, *x.shape[1:])

    def join(x: Array) -> Array:
        pieces = x.reshape(steps, batch, -1, *x.shape[2:])
        return jnp.moveaxis(pieces, 0, 1).reshape(-1, *x.shape[2:])

    step = jax.checkpoint(lambda pieces: body(*pieces), prevent_cse=False)
    return jax.tree.map(join, lax.map(step, jax.tree.map(cut, arrays)))


def visit_heads(
    attend: Callable[..., Array],
    logits: int,
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *labels: Shaped[Array, 'b l'] | None,
) -> Float[Array, 'b l h d']:
    """`attend(q, k, v, *labels)`, computed for some heads of some sequences at a time.

    All at once where there is more than one device: heads and sequences may be sharded over them, and a loop over a
    sharded axis would gather it. The backward pass computes every step again.

    Args:
        attend: treats every head of every sequence alike.
        logits: how many there are in all.
        q: queries.
        k: keys.
        v: values.
        *labels: of positions, without derivative.
    """
    batch, _, heads, _ = q.shape
    by_head = step_count(logits, heads) if jax.device_count() == 1 else 1
    by_sequence = step_count(logits // by_head, batch) if by_head == heads else 1
    if by_head * by_sequence == 1:
        return attend(q, k, v, *labels)

    rows, some = batch // by_sequence, heads // by_head

    def step(written: Array, at: Array) -> tuple[Array, None]:
        start = (at // by_head * rows, 0, at % by_head * some, 0)

        @partial(jax.checkpoint, prevent_cse=False)
        def part(*qkv: Array) -> Array:
            parts = [lax.dynamic_slice(x, start, (rows, x.shape[1], some, x.shape[3])) for x in qkv]
            own = [x if x is None else lax.dynamic_slice_in_dim(x, start[0], rows) for x in labels]
            return attend(*parts, *own)

        return lax.dynamic_update_slice(written, part(q, k, v), start), None

    return lax.scan(step, jnp.zeros_like(v), jnp.arange(by_sequence * by_head))[0]
