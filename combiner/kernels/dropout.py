"""Dropout of weights in the fused kernels of this project.

A kernel computes which weights it keeps from a seed of the sequence and head, and the numbers of the query and the key,
so that the backward pass keeps the same ones.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from combiner.ops.softmax import Drop, Dropout

KEPT_UNIT = 2**24  # what is kept of the weights is a number of this many parts


def draw_seeds(
    drop: Drop | None, batch: int, heads: int
) -> tuple[Int[Array, 'b h'], Int[Array, '']] | tuple[None, None]:
    """Returns a seed for each sequence and head, and how many of `KEPT_UNIT` weights are kept; None for no dropout."""
    if not isinstance(drop, Dropout):
        return None, None
    seeds = lax.bitcast_convert_type(jax.random.bits(drop.key, (batch, heads)), jnp.int32)
    return seeds, jnp.round((1 - jnp.asarray(drop.rate, jnp.float32)) * KEPT_UNIT).astype(jnp.int32)


def refuse_function(drop: Drop | None) -> str:
    """Returns the reason why a kernel cannot drop weights by this function; empty if it can."""
    if drop is None or isinstance(drop, Dropout):
        return ''
    return 'drops weights by ops.softmax.Dropout, not by another function'
