"""A group of terms of a softmax, from the positions of a line of the grid to keys, with gradients.

The queries are scaled, and of one head: with zeros in the lanes of the others.

The gradient of every group is that of a softmax of its own, with its own logarithm `L` and its own `Δ`, by position:

    weights  W = exp(logit - L)     gradient of the logits  W (do·v - Δ)     gradient of the values  Wᵀ do

Of the mean of two softmaxes with the logarithms `L1` and `L2` and `Δm = do·Am`, the terms of one alone have
`L = Lm + log 2` and `Δm`. Those of both have `W = (exp(logit - L1) + exp(logit - L2)) / 2`, which is of that form too.

Letters: `n` positions, `s` keys, `e` lanes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Tokens
from combiner.kernels.tpu.rowmajor.tile import partial_softmax
from combiner.kernels.tpu.tiles import COLUMNS_BY_COLUMNS, ROWS_BY_ROWS, product

Drop = Callable[[Float[Array, 'n s']], Float[Array, 'n s']]
Mask = Bool[Array, '#n s']


class Terms(NamedTuple):
    """Weighted values, and the sum of their weights; both without a factor `exp(top)`."""

    values: Float[Array, 'n e']
    total: Float[Array, 'n 1']
    top: Float[Array, 'n 1']


def attend(q: Float[Array, 'n e'], k: Float[Array, 's e'], v: Float[Array, 's e'], mask: Mask, drop: Drop) -> Terms:
    """Attends to some keys; where all are masked, everything is zero."""
    weights, total, top = partial_softmax(product(q, k, ROWS_BY_ROWS), mask)
    return Terms(product(drop(weights).astype(v.dtype), v), total, top)


class Weights(NamedTuple):
    """The sum of the weights of some terms, as in `Terms`."""

    total: Float[Array, '1 n']
    top: Float[Array, '1 n']


def merge(parts: Sequence[Weights]) -> tuple[list[Float[Array, '1 n']], Float[Array, '1 n']]:
    """Returns the factor of the values of each part in one softmax, and the logarithm of its sum of exponentials.

    Zeros where there is no term.
    """
    best = functools.reduce(jnp.maximum, [part.top for part in parts])
    factors = [jnp.exp(part.top - best) for part in parts]
    total = sum(factor * part.total for factor, part in zip(factors, parts, strict=True))
    some = jnp.where(total > 0, total, 1.0)
    return [factor / some for factor in factors], jnp.where(total > 0, best + jnp.log(some), 0.0)


def local_weights(q: Float[Array, 'n e'], k: Float[Array, 's e'], mask: Mask) -> Float[Array, 'n s']:
    """Returns the weights of local expectations; zeros where all keys are masked."""
    weights, total, _ = partial_softmax(product(q, k, ROWS_BY_ROWS), mask)
    return weights / jnp.where(total > 0, total, 1.0)


class Share(NamedTuple):
    """The logarithm and the `Δ` of a group of terms."""

    logarithm: Float[Array, 'n 1']
    delta: Float[Array, 'n 1']


def gradient(x: Tokens, d_out: Float[Array, 'n e'], mask: Mask, share: Share, drop: Drop) -> Tokens:
    """Returns the gradients of the queries, keys and values of `attend`."""
    logits = jnp.where(mask, product(x.q, x.k, ROWS_BY_ROWS), tiles.LOWEST)
    weights = jnp.exp(logits - share.logarithm)
    change = drop(product(d_out, x.v, ROWS_BY_ROWS))
    d_logits = (weights * (change - share.delta)).astype(x.k.dtype)
    d_values = product(drop(weights).astype(x.v.dtype), d_out, COLUMNS_BY_COLUMNS)
    return Tokens(product(d_logits, x.k), product(d_logits, x.q, COLUMNS_BY_COLUMNS), d_values)


def local_gradient(x: Tokens, d_out: Float[Array, 'n e'], mask: Mask) -> Tokens:
    """Returns the gradients of the queries, keys and values of a local expectation."""
    weights = local_weights(x.q, x.k, mask)
    change = product(d_out, x.v, ROWS_BY_ROWS)
    d_logits = (weights * (change - (weights * change).sum(axis=1, keepdims=True))).astype(x.k.dtype)
    d_values = product(weights.astype(x.v.dtype), d_out, COLUMNS_BY_COLUMNS)
    return Tokens(product(d_logits, x.k), product(d_logits, x.q, COLUMNS_BY_COLUMNS), d_values)
