"""Sequences in parts: each device of the mesh axis `context` has one part of every sequence.

`core.distributed` runs a mechanism on all parts at once. There, these functions say which part is the own one, and
exchange arrays between the parts. Elsewhere a sequence has one part, and they change nothing: so a mechanism is written
once, for both.

Letters: `b` batch, `n` blocks of a part, `m = b·n`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from combiner.sharding import CONTEXT_AXIS


def count() -> int:
    """Returns the number of parts of a sequence."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[CONTEXT_AXIS] if CONTEXT_AXIS in mesh.manual_axes else 1


def index() -> Int[Array, '']:
    """Returns the number of the own part."""
    return lax.axis_index(CONTEXT_AXIS) if count() > 1 else jnp.zeros((), jnp.int32)


def own_numbers(blocks: int) -> Int[Array, ' n']:
    """Returns the numbers, within the sequence, of the blocks of the own part."""
    return index() * blocks + jnp.arange(blocks)


def gather(x: Shaped[Array, '...'], axis: int) -> Shaped[Array, '...']:
    """Concatenates the arrays of all parts along an axis."""
    return x if count() == 1 else lax.all_gather(x, CONTEXT_AXIS, axis=axis % x.ndim, tiled=True)


def gather_blocks(x: Shaped[Array, '...'], batch: int, axis: int = 0) -> Shaped[Array, '...']:
    """Concatenates what the blocks of all parts have, sequence by sequence, along an axis of `m` elements."""
    if count() == 1:
        return x
    axis %= x.ndim
    by_sequence = x.reshape(*x.shape[:axis], batch, -1, *x.shape[axis + 1 :])
    return gather(by_sequence, axis + 1).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def own_blocks(x: Shaped[Array, '...'], batch: int, axis: int = 0) -> Shaped[Array, '...']:
    """Inverts `gather_blocks`: returns what the blocks of the own part have."""
    if count() == 1:
        return x
    axis %= x.ndim
    by_sequence = x.reshape(*x.shape[:axis], batch, count(), -1, *x.shape[axis + 1 :])
    own = lax.dynamic_index_in_dim(by_sequence, index(), axis + 1, keepdims=False)
    return own.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def send_on(tree: Any) -> Any:
    """Sends arrays to the next part, and returns those of the part before; the last part sends to the first."""
    ring = [(part, (part + 1) % count()) for part in range(count())]
    return jax.tree.map(lambda x: lax.ppermute(x, CONTEXT_AXIS, ring), tree)
