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


class Given(NamedTuple):
    """What the gradient of a group of terms needs.

    Attributes:
        x: queries, keys and values.
        d_out: the gradient of the attended values.
        mask: the keys to which each position attends.
        share: of a softmax over several groups; None for a local expectation, whose softmax has no other terms.
        drop: dropout of the weights.
    """

    x: Tokens
    d_out: Float[Array, 'n e']
    mask: Mask
    share: Share | None = None
    drop: Drop = lambda weights: weights


def gradients(groups: Sequence[Given]) -> list[Tokens]:
    """Returns the gradients of queries, keys and values of each group, computed together as they are independent."""
    logits = [jnp.where(one.mask, product(one.x.q, one.x.k, ROWS_BY_ROWS), tiles.LOWEST) for one in groups]
    changes = [product(one.d_out, one.x.v, ROWS_BY_ROWS) for one in groups]
    made = [_weights(*of_group) for of_group in zip(groups, logits, changes, strict=True)]
    return [
        Tokens(
            product(d_logits, one.x.k),
            product(d_logits, one.x.q, COLUMNS_BY_COLUMNS),
            product(weights, one.d_out, COLUMNS_BY_COLUMNS),
        )
        for one, (weights, d_logits) in zip(groups, made, strict=True)
    ]


def _weights(given: Given, logits: Float[Array, 'n s'], change: Float[Array, 'n s']) -> tuple[Array, Array]:
    """Returns the weights of the values and the gradients of the logits, in the type of the kernel."""
    dtype = given.x.k.dtype
    if given.share is None:
        weights, total, _ = partial_softmax(logits, None)
        weights /= jnp.where(total > 0, total, 1.0)
        return weights.astype(dtype), (weights * (change - (weights * change).sum(axis=1, keepdims=True))).astype(dtype)
    weights = jnp.exp(logits - given.share.logarithm)
    d_logits = weights * (given.drop(change) - given.share.delta)
    return given.drop(weights).astype(dtype), d_logits.astype(dtype)
