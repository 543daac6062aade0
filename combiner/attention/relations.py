"""Pooling for every position of a line over the positions before it, after it, or over all others.

A line is a row or a column of a grid; each of its positions sees another span of it. Sums (see `pooling`) are products
with a triangle of ones. Maxima have derivatives of their own. At 4,096 positions, 8 heads of 64, on
2 cores, forward and backward, the maximum before each position took 4.5 ms, `lax.cummax` 19 ms and four times as long
to compile; the maximum over all others took 2.9 ms, and 15 ms with the derivative that JAX makes.

Letters: `c` position in a line; `*n` lines, `f` features, as in `pooling`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from combiner.attention.joint import dot
from combiner.attention.pooling import Pool


class Relation(NamedTuple):
    """What of its line a position sees.

    Attributes:
        matrix: for lines of a length, whether the position of the row sees that of the column.
        highest: the maximum over what each position of `[*n, c, f]` sees, the lowest number where that is nothing.
    """

    matrix: Callable[[int], Bool[np.ndarray, 'c c']]
    highest: Callable[[Float[Array, '*n c f']], Float[Array, '*n c f']]

    def members(self, inside: Bool[Array, 'm c'] | None, size: int) -> Bool[Array, '#m c c']:
        """The relation between the positions of lines, to those that are `inside`."""
        related = jnp.asarray(self.matrix(size)[None])
        return related if inside is None else related & inside[:, None, :]

    def pool(
        self, pool: Pool, x: Float[Array, 'h m c d'], inside: Bool[Array, 'm c'] | None
    ) -> Float[Array, 'h m c d']:
        """For every position, the members it sees pooled; zeros where it sees none."""
        features = pool.lifted(x, inside)
        if pool.highest:
            features = self.highest(features)
        else:
            features = dot('ij,...jf->...if', jnp.asarray(self.matrix(x.shape[2]), features.dtype), features)
        return pool.finished(features, self.members(inside, x.shape[2]).any(axis=-1)).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _running_maximum(reverse: bool, x: Float[Array, '*n c f']) -> Float[Array, '*n c f']:
    """The maximum over the positions before (in reverse: after) each one."""

    def step(top: Array, at: Array) -> tuple[Array, Array]:
        return jnp.maximum(top, _at(x, at)), top

    lowest = jnp.full_like(x[..., 0, :], jnp.finfo(x.dtype).min)
    _, tops = jax.lax.scan(step, lowest, jnp.arange(x.shape[-2]), reverse=reverse)
    return jnp.moveaxis(tops, 0, -2)


@_running_maximum.defjvp
def _running_maximum_tangent(reverse, primals, tangents):
    """Where a position equals the maximum before it, they share its derivative evenly, as in the maximum of JAX."""
    (x,), (tangent,) = primals, tangents
    tops = _running_maximum(reverse, x)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(change: Array, at: Array) -> tuple[Array, Array]:
        new, top = _at(x, at), _at(tops, at)
        share = jnp.where(new > top, 1, jnp.where(new == top, 0.5, 0)).astype(change.dtype)
        return change + share * (_at(tangent, at).astype(change.dtype) - change), change.astype(x.dtype)

    nothing = jnp.zeros(x[..., 0, :].shape, jnp.promote_types(x.dtype, jnp.float32))
    _, changes = jax.lax.scan(step, nothing, jnp.arange(x.shape[-2]), reverse=reverse)
    return tops, jnp.moveaxis(changes, 0, -2)


@jax.custom_jvp
def _maximum_of_others(x: Float[Array, '*n c f']) -> Float[Array, '*n c f']:
    """The maximum over all other positions: the first or, from the position that holds it alone, the second."""
    first, second, alone = _two_highest(x)
    return jnp.where((x == first) & alone, second, first)


def _two_highest(x):
    """The highest number, the highest without that one, and whether only one position holds the first."""
    first = x.max(axis=-2, keepdims=True)
    second = jnp.where(x == first, jnp.finfo(x.dtype).min, x).max(axis=-2, keepdims=True)
    return first, second, (x == first).sum(axis=-2, keepdims=True) == 1


@_maximum_of_others.defjvp
def _maximum_of_others_tangent(primals, tangents):
    """Where several positions hold a maximum they share its derivative evenly, as in the maximum of JAX."""
    (x,), (tangent,) = primals, tangents
    first, second, alone = _two_highest(x)
    tangent = tangent.astype(jnp.promote_types(x.dtype, jnp.float32))

    def total(terms: Array) -> Array:
        return terms.sum(axis=-2, keepdims=True)

    is_first, is_second = x == first, (x == second) & (second < first)
    held = total(is_first)
    of_first = total(jnp.where(is_first, tangent, 0))
    of_second = total(jnp.where(is_second, tangent, 0)) / jnp.maximum(total(is_second), 1)
    of_tied = of_first / jnp.maximum(held - 1, 1)
    own = jnp.where(alone, 0, 1 / jnp.maximum(held - 1, 1)).astype(tangent.dtype)
    change = jnp.where(is_first, jnp.where(alone, of_second, of_tied), of_first / held)
    change -= own * jnp.where(is_first, tangent, 0)
    return _maximum_of_others(x), change.astype(x.dtype)


def _at(x: Float[Array, '*n c f'], at: Array) -> Float[Array, '*n f']:
    return jax.lax.dynamic_index_in_dim(x, at, axis=-2, keepdims=False)


BEFORE = Relation(lambda size: np.tri(size, k=-1, dtype=bool), partial(_running_maximum, False))
AFTER = Relation(lambda size: np.tri(size, k=-1, dtype=bool).T, partial(_running_maximum, True))
OTHERS = Relation(lambda size: ~np.eye(size, dtype=bool), _maximum_of_others)
