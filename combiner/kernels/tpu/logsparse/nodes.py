"""The nodes of a chunk: spans of `2^t` of its positions, in the row of the position where they meet their siblings.

Row `p`, with `2^t` its lowest set bit, holds the left node `[p - 2^t, p)` or the right node `[p, p + 2^t)`. Row 0 holds
none. Positions of the one attend to the other. A node of one position is that position itself.

Nodes are pooled by maximum in levels, in place: after `t` levels row `i` holds the maximum over `[i, i + 2^t)`, which
is used if `i` is a multiple of `2^t`; other rows hold anything. Means are products with the matrix of members.

Letters: as in `tiles`; the sides are 0 for left nodes and 1 for right nodes.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.logsparse.plan import SiblingPlan
from combiner.kernels.tpu.tiles import COLUMNS_BY_COLUMNS, LOWEST, product
from combiner.ops.segments import PADDING_ID


class ChunkIds(NamedTuple):
    """Segment ids of one chunk: of its positions as a row and as a column, and of the nodes of each side, as rows."""

    row: Int[Array, '1 c']
    column: Int[Array, 'c 1']
    of_nodes: list[Int[Array, '1 c']]


def members(size: int, side: int, ids: ChunkIds | None) -> Bool[Array, 'c c']:
    """Returns the positions `[p, j]` of each node of a side."""
    node, position = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in range(2))
    inside = _in_node(node, position, side)
    if ids is None:
        return inside
    # Row 0 has the id of the whole chunk.
    return inside & (tiles.column(ids.of_nodes[side]) == ids.row)


def visible(size: int, side: int, ids: ChunkIds | None) -> Bool[Array, 'c c']:
    """Returns the nodes `[i, p]` of a side to which each position attends."""
    position, node = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in range(2))
    found = _in_node(node, position, 1 - side)
    return found if ids is None else found & (ids.column == ids.of_nodes[side])


def _in_node(node: Array, position: Array, side: int) -> Array:
    size, distance = node & -node, position - node
    return (distance >= 0) & (distance < size) if side else (distance < 0) & (distance >= -size)


class _Level(NamedTuple):
    """Spans of `2^t` positions, one from every row on: maximum, segment id, and how many positions hold the maximum."""

    top: Array
    ids: Any
    count: Any


class Pooling:
    """Pools the rows of a chunk into its nodes.

    Args:
        plan: the sizes.
        x: rows `[c, e]`.
        ids: segment ids; None if all are equal.
    """

    def __init__(self, plan: SiblingPlan, x: Array, ids: ChunkIds | None) -> None:
        self.plan, self.rows, self.ids, self.size = plan, x, ids, x.shape[0]
        self.number = lax.broadcasted_iota(jnp.int32, x.shape, 0)

    def pool(self, side: int) -> Float[Array, 'c e']:
        """Returns the nodes of a side; zeros for nodes without members."""
        if self.plan.pool == 'mean':
            inside = members(self.size, side, self.ids).astype(jnp.float32)
            return product(inside.astype(self.rows.dtype), self.rows) / _divisor(inside)
        found = jnp.full(self.rows.shape, LOWEST, jnp.float32)
        for t, level in enumerate(self._levels(side, counted=False)):
            top = level.top if side else pltpu.roll(level.top, 1 << t, 0)
            found = jnp.where(self._is_right(t), top, found)
        return jnp.where(found > LOWEST, found, 0.0)

    def gradient(self, d_nodes: list[Array]) -> Float[Array, 'c e']:
        """Returns the gradient of the rows for those of the nodes of each side, equal for equal maxima of a node."""
        if self.plan.pool == 'mean':
            dx: Any = 0.0
            for side, d in enumerate(d_nodes):
                inside = members(self.size, side, self.ids).astype(jnp.float32)
                share = (d / _divisor(inside)).astype(self.rows.dtype)
                dx += product(inside.astype(self.rows.dtype), share, COLUMNS_BY_COLUMNS)
            return dx
        if self.ids is None:
            return self._gradient(0, d_nodes)
        parts = [self._gradient(side, _only(d_nodes, side)) for side in range(len(d_nodes))]
        return functools.reduce(operator.add, parts)

    def _gradient(self, side: int, d_nodes: list[Any]) -> Array:
        """Returns the gradient through the levels of a side: what each position gets that holds the maximum."""
        levels = self._levels(side, counted=True)
        above: Any = None
        part: Any = None
        for t in reversed(range(len(levels))):
            level = levels[t]
            own = self._of_level(t, d_nodes) / jnp.maximum(level.count, 1.0)
            if above is not None:
                parents = [self._parent(t, x) for x in (above.top, part)]
                holds = level.top == parents[0]
                if above.ids is not None:
                    holds = holds & (level.ids == self._parent(t, above.ids))
                own += jnp.where(holds, parents[1], 0.0)
            above, part = level, own
        return jnp.where(above.top > LOWEST, part, 0.0)

    def _of_level(self, t: int, d_nodes: list[Any]) -> Array:
        """Moves the gradients of the nodes of a level to the rows where the nodes begin."""
        left, *right = d_nodes
        found = jnp.zeros(self.rows.shape, jnp.float32)
        if left is not None:
            found = jnp.where(self._is_left(t), self._up(t, left), found)
        for one in right:
            if one is not None:
                found = jnp.where(self._is_right(t), one, found)
        return found

    def _levels(self, side: int, *, counted: bool) -> list[_Level]:
        """Returns all levels; `side` decides which document a span is of: 0 for the last, 1 for the first."""
        top, ids = self.rows.astype(jnp.float32), None
        count = jnp.ones(top.shape, jnp.float32) if counted else None
        if self.ids is not None:
            ids = jnp.broadcast_to(self.ids.column, top.shape)
            top = jnp.where(ids != PADDING_ID, top, LOWEST)
        levels = [_Level(top, ids, count)]
        for t in range(self.plan.node_levels - 1):
            levels.append(self._merge(t, levels[-1], side))
        return levels

    def _merge(self, t: int, level: _Level, side: int) -> _Level:
        first, second, ids = level.top, self._up(t, level.top), None
        if level.ids is not None:
            pair = level.ids, self._up(t, level.ids)
            ids = jnp.where(pair[1 - side] != PADDING_ID, pair[1 - side], pair[side])
            first, second = (jnp.where(one == ids, x, LOWEST) for one, x in zip(pair, (first, second), strict=True))
        top, count = jnp.maximum(first, second), level.count
        if count is not None:
            count = jnp.where(first == top, count, 0.0) + jnp.where(second == top, self._up(t, count), 0.0)
        return _Level(top, ids, count)

    def _up(self, t: int, x: Array) -> Array:
        """Returns in each row what is `2^t` rows below."""
        return pltpu.roll(x, self.size - (1 << t), 0)

    def _parent(self, t: int, x: Array) -> Array:
        """Returns for the spans of a level the rows of the spans above."""
        return jnp.where(self._is_right(t), pltpu.roll(x, 1 << t, 0), x)

    def _is_left(self, t: int) -> Array:
        return self.number & ((2 << t) - 1) == 0

    def _is_right(self, t: int) -> Array:
        return self.number & ((2 << t) - 1) == 1 << t


def _divisor(inside: Array) -> Array:
    return jnp.maximum(inside.sum(axis=1, keepdims=True), 1.0)


def _only(d_nodes: list[Array], side: int) -> list[Any]:
    return [d if one == side else None for one, d in enumerate(d_nodes)]
