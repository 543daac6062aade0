"""A tile of a grid: some whole rows, whose positions are visited by groups of rows, then by columns.

A tile changes between rows and columns by arrays in vector memory, which are written by rows and read by columns, or
the reverse. A column has a stride, which registers of 32 bits allow: so these arrays are float32 whatever the type of
the kernel, and have 128 lanes each. Their rows have gaps (see `GridPlan.pitch`).

Letters: `t` positions of a group, `n` rows of a tile, `s` rows of a table, `e` lanes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Ids, Seeds
from combiner.kernels.tpu.rowmajor.plan import GridPlan
from combiner.layers import LANES


def put(refs: Any, rows: Any, x: Array) -> None:
    """Writes rows of arrays `[positions, 128]`, of which each has 128 of the lanes, in their type."""
    for i, ref in enumerate(refs):
        ref[rows, :] = x[:, i * LANES : (i + 1) * LANES].astype(ref.dtype)


def get(refs: Any, rows: Any) -> Array:
    """Reads rows that `put` has written."""
    parts = [ref[rows, :] for ref in refs]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


class PartialSoftmax(NamedTuple):
    """Weights that are not normalised, their sum, and the largest logit, at least half of the lowest number."""

    weights: Array
    total: Float[Array, 'n 1']
    top: Float[Array, 'n 1']


def partial_softmax(logits: Float[Array, 'n s'], mask: Bool[Array, 'n s'] | None) -> PartialSoftmax:
    """Returns the weights of the logits; zeros where all are masked."""
    logits = logits if mask is None else jnp.where(mask, logits, tiles.LOWEST)
    top = jnp.maximum(logits.max(axis=1, keepdims=True), tiles.LOWEST / 2)
    weights = jnp.exp(logits - top)
    return PartialSoftmax(weights, weights.sum(axis=1, keepdims=True), top)


def by_head(parts: list[Float[Array, 'n 1']], lanes: int) -> Float[Array, 'n e']:
    """Repeats a number of each head in the lanes of the head."""
    return tiles.own_lanes([jnp.broadcast_to(part, (part.shape[0], lanes)) for part in parts])


class GridTile:
    """The tile that a step of the grid of the kernel visits."""

    def __init__(self, plan: GridPlan, ids: Ids | None, seeds: Seeds | None) -> None:
        self.plan, self.ids, self.seeds = plan, ids, seeds
        self.sequence, self.heads, self.phase, step = (pl.program_id(axis) for axis in range(4))
        self.number = plan.tiles - 1 - step if plan.backward and plan.causal else step
        self.is_first = step == 0

    def for_each(self, count: int, body: Callable[[Any], None]) -> None:
        """Runs `body` for each number below `count`."""
        size = self.plan.unrolled_of(count)

        def some(first: Any) -> None:
            for i in range(size):
                body(first * size + i)

        lax.fori_loop(0, count // size, lambda first, _: some(first), None)

    def for_each_group(self, body: Callable[[Any], None]) -> None:
        """Runs `body` for the number of each group of rows of the tile."""
        self.for_each(self.plan.tile_groups, body)

    def for_each_column(self, body: Callable[[Any], None]) -> None:
        """Runs `body` for the number of each column."""
        self.for_each(self.plan.block, body)

    def group(self, number: Any) -> Any:
        """Returns the positions of a group, in an array of the tile."""
        return pl.ds(pl.multiple_of(number * self.plan.group, 8), self.plan.group)

    def _rows_of(self, group: Any) -> list[Any]:
        """Returns the positions of each row of a group, in an array with gaps."""
        first, plan = group * self.plan.group_rows, self.plan
        return [pl.ds((first + row) * plan.pitch, plan.block) for row in range(plan.group_rows)]

    def put_group(self, refs: Any, group: Any, x: Array) -> None:
        """Writes the positions of a group into an array with gaps."""
        for row, here in enumerate(self._rows_of(group)):
            put(refs, here, x[row * self.plan.block : (row + 1) * self.plan.block])

    def get_group(self, refs: Any, group: Any) -> Array:
        """Reads the positions of a group from an array with gaps."""
        parts = [get(refs, here) for here in self._rows_of(group)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=0)

    def column(self, number: Any) -> Any:
        """Returns the positions of a column, in an array with gaps."""
        return pl.ds(number, self.plan.tile_blocks, stride=self.plan.pitch)

    @property
    def table_rows(self) -> Any:
        """Returns the rows of the tile in a column of a table."""
        if self.plan.tile_blocks == self.plan.blocks:
            return slice(None)
        return pl.ds(pl.multiple_of(self.number * self.plan.tile_blocks, 16), self.plan.tile_blocks)

    def rows(self, ref: Any, group: Any) -> Array:
        """Returns the rows of a group in an array of the tile, with zeros beyond the end of the sequence."""
        x = ref[self.group(group), :]
        if self.plan.padded_length == self.plan.length:
            return x
        # Beyond the end of an array, memory holds anything, NaN too.
        first = self.number * self.plan.tile + group * self.plan.group
        inside = first + lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0) < self.plan.length
        return jnp.where(inside, x, jnp.zeros_like(x))

    def ids_of(self, group: Any) -> Array | None:
        """Returns the segment ids of a group as a row; None if all are equal."""
        return None if self.ids is None else self.ids.of_tokens[pl.ds(group, 1), :]

    def own_masks(self, group: Any) -> tuple[Bool[Array, 't t'], Bool[Array, 't t']]:
        """Returns which positions of a group are of the same row, and which of them a position attends to."""
        query, key = (lax.broadcasted_iota(jnp.int32, (self.plan.group, self.plan.group), axis) for axis in (0, 1))
        same_row = query // self.plan.block == key // self.plan.block
        own = same_row & (key <= query) if self.plan.causal else same_row
        ids = self.ids_of(group)
        return same_row, own if ids is None else own & (tiles.column(ids) == ids)

    def members(self, group: Any, side: int) -> tuple[Array | None, Array | None]:
        """Returns the members of the summaries of a side, as a column and as a row; None if all are."""
        if self.ids is None:
            return None, None
        row = self.ids.members[0][side, pl.ds(group, 1), :]
        return tiles.column(row) != 0, row != 0

    def visible(self, ids: Array | None) -> Bool[Array, 'n s']:
        """Returns which summaries of a column, of all sides, its positions attend to.

        Args:
            ids: the segment ids of the positions, in every lane.
        """
        plan, found = self.plan, []
        row = self.number * plan.tile_blocks + lax.broadcasted_iota(jnp.int32, (plan.tile_blocks, 1), 0)
        other = lax.broadcasted_iota(jnp.int32, (plan.tile_blocks, plan.blocks), 1)
        for side in range(plan.sides):
            if plan.causal or plan.sides == 2:
                visible = other > row if side else other < row
            else:
                visible = (other != row) & (other < plan.rows)
            if self.ids is not None and ids is not None:
                visible = visible & (ids[:, :1] == self.ids.of_summaries[0][side])
            found.append(visible)
        return _joined(found)

    def written(self, summaries: Float[Array, 's e']) -> Float[Array, 's e']:
        """Returns the summaries of a column, of all sides, with zeros for rows that no tile has written.

        Nothing attends to them, but there memory holds anything, NaN too, and a weight of 0 times NaN is NaN.
        """
        plan = self.plan
        if plan.written_rows == plan.blocks:
            return summaries
        row = lax.broadcasted_iota(jnp.int32, (summaries.shape[0], 1), 0) % plan.blocks
        return jnp.where(row < plan.rows, summaries, jnp.zeros_like(summaries))

    def drop_own(self, weights: Array, group: Any, head: int) -> Array:
        """Drops weights of a group for itself, and divides the others by their part."""
        first = self.number * self.plan.tile + group * self.plan.group
        return self._drop(weights, head, first, stride=1, first_key=0)

    def drop_others(self, weights: Array, column: Any, head: int) -> Array:
        """Drops weights of a column for summaries, and divides the others by their part."""
        first, stride = self.number * self.plan.tile + column, self.plan.block
        return self._drop(weights, head, first, stride=stride, first_key=self.plan.group)

    def _drop(self, weights: Array, head: int, first: Any, *, stride: int, first_key: int) -> Array:
        if self.seeds is None:
            return weights
        of_tile = self.heads * self.plan.shared_by
        return self.seeds.drop(weights, self.sequence, of_tile + head, first, first_key, stride)


def _joined(parts: list[Array]) -> Array:
    """Joins masks along the lanes, as integers, which have whole registers."""
    return parts[0] if len(parts) == 1 else jnp.concatenate([x.astype(jnp.int32) for x in parts], axis=1) != 0
