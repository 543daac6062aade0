"""Some terms of a softmax, from the positions of lines of the grid to keys, with gradients.

The queries are scaled, and of one head: with zeros in the lanes of the others.

Terms have the gradient of a softmax with a logarithm `L` and a `Δ`, two numbers of each position, whatever the other
terms are:

    weights  W = exp(logit - L)     gradient of the logits  W (do·v - Δ)     gradient of the values  Wᵀ do

In the mean of two softmaxes with logarithms `L1` and `L2` and `Δm = do·Am`, terms of one have `L = Lm + log 2` and
`Δ = Δm`. Terms of both have the weights `exp(logit - L1) / 2 + exp(logit - L2) / 2`, and so a logarithm and a `Δ` too:

    exp(-L) = exp(-L1) / 2 + exp(-L2) / 2          Δ = exp(L - L1) Δ1 / 2 + exp(L - L2) Δ2 / 2

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


def keep(weights: Float[Array, 'n s']) -> Float[Array, 'n s']:
    """Drops nothing."""
    return weights


class Query(NamedTuple):
    """What the positions of a line attend to, with one head.

    Attributes:
        x: scaled queries of the head, keys and values.
        mask: the keys to which each position attends.
        drop: dropout of the weights.
    """

    x: Tokens
    mask: Bool[Array, '#n s']
    drop: Drop = keep


class Terms(NamedTuple):
    """Weighted values, and the sum of their weights; both without a factor `exp(top)`."""

    values: Float[Array, 'n e']
    total: Float[Array, 'n 1']
    top: Float[Array, 'n 1']


def attend(queries: Sequence[Query]) -> list[Terms]:
    """Computes the terms of each; where all keys are masked, everything is zero.

    They are independent, and computed together so that the compiler interleaves them; so in `gradients`.
    """
    made = [partial_softmax(product(one.x.q, one.x.k, ROWS_BY_ROWS), one.mask) for one in queries]
    return [
        Terms(product(one.drop(weights).astype(one.x.v.dtype), one.x.v), total, top)
        for one, (weights, total, top) in zip(queries, made, strict=True)
    ]


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


class Share(NamedTuple):
    """The logarithm and the `Δ` of some terms."""

    logarithm: Float[Array, 'n 1']
    delta: Float[Array, 'n 1']


def gradients(
    queries: Sequence[Query], d_outs: Sequence[Float[Array, 'n e']], shares: Sequence[Share | None]
) -> list[Tokens]:
    """Returns the gradients of scaled queries, keys and values of each.

    Args:
        queries: what is attended to.
        d_outs: the gradients of the attended values, of one head.
        shares: see `Share`; None for a local expectation, whose softmax has no other terms.
    """
    logits = [jnp.where(one.mask, product(one.x.q, one.x.k, ROWS_BY_ROWS), tiles.LOWEST) for one in queries]
    changes = [product(d_out, one.x.v, ROWS_BY_ROWS) for one, d_out in zip(queries, d_outs, strict=True)]
    made = [_weights(*of_one) for of_one in zip(queries, shares, logits, changes, strict=True)]
    return [
        Tokens(
            product(d_logits, one.x.k),
            product(d_logits, one.x.q, COLUMNS_BY_COLUMNS),
            product(weights, d_out, COLUMNS_BY_COLUMNS),
        )
        for one, d_out, (weights, d_logits) in zip(queries, d_outs, made, strict=True)
    ]


def _weights(
    query: Query, share: Share | None, logits: Float[Array, 'n s'], change: Float[Array, 'n s']
) -> tuple[Float[Array, 'n s'], Float[Array, 'n s']]:
    """Returns the weights of the values and the gradients of the logits, in the type of the kernel."""
    if share is None:
        weights, total, _ = partial_softmax(logits, None)
        weights /= jnp.where(total > 0, total, 1.0)
        share = Share(total, (weights * change).sum(axis=1, keepdims=True))
    else:
        weights = jnp.exp(logits - share.logarithm)
    d_logits = weights * (query.drop(change) - share.delta)
    return query.drop(weights).astype(query.x.v.dtype), d_logits.astype(query.x.v.dtype)
