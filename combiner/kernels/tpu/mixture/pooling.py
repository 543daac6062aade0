"""Pooling of the members of a span into its summary query and key, with the gradient, in float32.

The span of a cell of a row is the rest of the row. The spans of a column grow from cell to cell: its cells are visited
in turn, with all columns of a tile at once. Positions that share a maximum get equal parts of its gradient.

Letters: `n` rows of a group, `c` columns, `e` lanes.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner.kernels.tpu.tiles import LOWEST


def _total(x: Array) -> Array:
    return x.sum(axis=1, keepdims=True)


class _Highest(NamedTuple):
    """The highest numbers of rows, the next lower ones, and the cells that hold them."""

    first: Array
    second: Array
    is_first: Array
    is_second: Array
    holders: Array


def _highest(x: Array, inside: Array | None) -> _Highest:
    x = x if inside is None else jnp.where(inside, x, LOWEST)
    first = x.max(axis=1, keepdims=True)
    is_first = (x == first) & (x > LOWEST)
    rest = jnp.where(is_first, LOWEST, x)
    second = rest.max(axis=1, keepdims=True)
    return _Highest(first, second, is_first, (rest == second) & (rest > LOWEST), _total(is_first.astype(jnp.float32)))


def _others(x: Array, inside: Array | None) -> Any:
    """Returns the number of other members of each cell's row, at least one."""
    if inside is None:
        return float(max(1, x.shape[1] - 1))
    counts = jnp.broadcast_to(inside, x.shape).astype(jnp.float32)
    return jnp.maximum(_total(counts) - counts, 1.0)


def pool_others(kind: str, x: Float[Array, 'n c e'], inside: Bool[Array, 'n c 1'] | None) -> Float[Array, 'n c e']:
    """Pools the other cells of its row for each cell; zeros where there are none."""
    if kind == 'mean':
        kept = x if inside is None else jnp.where(inside, x, 0.0)
        return (_total(kept) - kept) / _others(x, inside)
    high = _highest(x, inside)
    best = jnp.where(high.is_first & (high.holders == 1), high.second, high.first)
    return jnp.where(best > LOWEST, best, 0.0)


def pool_others_gradient(
    kind: str, x: Float[Array, 'n c e'], inside: Bool[Array, 'n c 1'] | None, d_pooled: Float[Array, 'n c e']
) -> Float[Array, 'n c e']:
    """Returns the gradient of `pool_others`."""
    if kind == 'mean':
        shares = d_pooled / _others(x, inside)
        made = _total(shares) - shares
        return made if inside is None else jnp.where(inside, made, 0.0)
    high = _highest(x, inside)
    of_first = jnp.where(high.is_first, d_pooled, 0.0)
    to_first = _total(d_pooled - of_first) / jnp.maximum(high.holders, 1.0)
    of_first_together = _total(of_first)
    tied = (of_first_together - of_first) / jnp.maximum(high.holders - 1, 1.0)  # from a single first cell: nothing
    to_second = of_first_together / jnp.maximum(_total(high.is_second.astype(jnp.float32)), 1.0)
    second = high.is_second & (high.holders == 1)
    return jnp.where(high.is_first, to_first + tied, jnp.where(second, to_second, 0.0))


class Running(NamedTuple):
    """A span that grows: its maximum and how many members hold it, or its sum and how many members it has."""

    value: Float[Array, 'c e']
    count: Float[Array, 'c e']


def empty(kind: str, shape: tuple[int, ...]) -> Running:
    """Returns a span without members."""
    return Running(jnp.full(shape, LOWEST if kind == 'max' else 0.0, jnp.float32), jnp.zeros(shape, jnp.float32))


def pooled(kind: str, span: Running) -> Float[Array, 'c e']:
    """Returns the pooled members; zeros where there are none."""
    value = span.value if kind == 'max' else span.value / jnp.maximum(span.count, 1.0)
    return jnp.where(span.count > 0, value, 0.0)


def grow(kind: str, span: Running, x: Float[Array, 'c e'], inside: Bool[Array, 'c e'] | None) -> Running:
    """Adds a cell."""
    if kind == 'mean':
        value, count = span.value + x, span.count + 1.0
    else:
        value = jnp.maximum(span.value, x)
        count = jnp.where(x > span.value, 1.0, jnp.where(x == span.value, span.count + 1.0, span.count))
    if inside is None:
        return Running(value, count)
    return Running(jnp.where(inside, value, span.value), jnp.where(inside, count, span.count))


def shrink(
    kind: str, span: Running, x: Float[Array, 'c e'], inside: Bool[Array, 'c e'] | None, share: Float[Array, 'c e']
) -> tuple[Float[Array, 'c e'], Float[Array, 'c e']]:
    """Returns the gradient of a cell that a span is given, and the share of each of those who hold the span before.

    Args:
        kind: `max` or `mean`.
        span: before the cell is added.
        x: the cell.
        inside: whether it is a member.
        share: what each of those who hold the span with the cell gets from all longer spans.
    """
    holds = inside
    if kind == 'max':
        holds = x >= span.value if inside is None else inside & (x >= span.value)
        replaces = x > span.value if inside is None else inside & (x > span.value)
        rest = jnp.where(replaces, 0.0, share)
    else:
        rest = share
    return share if holds is None else jnp.where(holds, share, 0.0), rest
