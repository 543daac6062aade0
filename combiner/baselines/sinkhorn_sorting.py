"""What sorts the blocks of `sinkhorn`. Letters: as there."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.attention.joint import masked


def pool(x: Float[Array, 'b l e'], block: int, *, causal: bool) -> Float[Array, 'b n e']:
    """What the sorting network sees of each block: the sum of its inputs; causal, of all up to its first position."""
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -x.shape[1] % block), (0, 0)))
    blocks = x.reshape(x.shape[0], -1, block, x.shape[2])
    total = blocks.sum(axis=2)
    return jnp.pad(jnp.cumsum(total, axis=1)[:, :-1], ((0, 0), (1, 0), (0, 0))) + blocks[:, :, 0] if causal else total


def balance(
    scores: Float[Array, 'b h n m'], pairs: Bool[Array, 'b 1 n m'], *, iterations: int, causal: bool
) -> Float[Array, 'b h n m']:
    """Sinkhorn balancing of `exp(scores)`: its rows, then its columns are divided by their sums, again and again.

    Causal: the sum of a column runs over the rows up to the one that it divides, so that no row depends on a later one.

    Args:
        scores: logarithms.
        pairs: which entries there are; the others are zero.
        iterations: how often; 0 leaves `exp(scores)`.
        causal: whether rows must not depend on later rows.
    """
    for _ in range(iterations):
        scores = masked(scores, pairs)
        scores = masked(scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True), pairs)
        over_rows = jax.lax.cumlogsumexp if causal else jax.nn.logsumexp
        column = over_rows(scores, axis=2)
        scores = scores - (column if causal else column[:, :, None])
    return jnp.where(pairs, jnp.exp(masked(scores, pairs)), 0)


def next_row(
    columns: Float[Array, 'b t h m'], scores: Float[Array, 'b h m'], row: Int[Array, ' b']
) -> tuple[Float[Array, 'b t h m'], Float[Array, 'b h m']]:
    """Causal balancing of one more row: `balance` for decoding.

    Args:
        columns: the logarithm of each column's sum over the earlier rows, before each of the `t` iterations divides.
        scores: of this row.
        row: its number, so that it has `row` entries.
    """
    pairs = jnp.arange(scores.shape[-1]) < row[:, None, None]
    found = []
    for column in jnp.moveaxis(columns, 1, 0):
        scores = masked(scores, pairs)
        scores = masked(scores - jax.nn.logsumexp(scores, axis=-1, keepdims=True), pairs)
        found.append(jnp.logaddexp(column, scores))
        scores = scores - found[-1]
    columns = jnp.stack(found, axis=1) if found else columns
    return columns, jnp.where(pairs, jnp.exp(masked(scores, pairs)), 0)
