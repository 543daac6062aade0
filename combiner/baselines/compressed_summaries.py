"""Summaries of `compressed`. Letters: as there."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner.attention.layout import Summary, split, split_labels
from combiner.attention.pooling import attention


def pooled(
    k: Float[Array, 'h *n c d'], v: Float[Array, 'h *n c d'], gates: Summary, members: Bool[Array, '*n c']
) -> Summary:
    """Gated means of the members of each block; zeros where there are none."""
    return Summary(attention(gates.key)(k, members), attention(gates.value)(v, members))


def summaries(
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    gates: Summary,
    *,
    block: int,
    valid: Bool[Array, 'b l'] | None = None,
) -> Summary:
    """Of the blocks of all sequences, `[h, b·n, d]`."""
    members = split_labels(jnp.ones(k.shape[:2], bool) if valid is None else valid, block)
    return pooled(split(k, block), split(v, block), gates, members)
