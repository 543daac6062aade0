"""The tiles that a step of the kernels visits: whole rows of the grid, or neighbouring columns.

A tile of rows is read by groups. A tile of columns is read by rows, and changes between rows and columns by arrays in
vector memory, as in `rowmajor.tile`.

Letters: as in `arrays`; `w` columns of a tile.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Shaped

from combiner.kernels.dropout import KEPT_UNIT
from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Seeds
from combiner.kernels.tpu.mixture.plan import MixturePlan
from combiner.kernels.tpu.mixture.terms import Drop
from combiner.kernels.tpu.rowmajor.tile import get, put
from combiner.layers import LANES


def columns_of(rows: list[Float[Array, '1 n']]) -> list[Float[Array, 'n 1']]:
    """Transposes rows."""
    padded = jnp.concatenate(rows + rows[:1] * (-len(rows) % 8), axis=0).T
    return [padded[:, i : i + 1] for i in range(len(rows))]


def rows_of(columns: list[Float[Array, 'n 1']]) -> list[Float[Array, '1 n']]:
    """Inverts `columns_of`."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    together = jnp.broadcast_to(columns[0], (columns[0].shape[0], LANES))
    for i, column in enumerate(columns[1:], 1):
        together = jnp.where(lane == i, column, together)
    together = together.T
    return [together[i : i + 1] for i in range(len(columns))]


class Tile:
    """What both kinds of tiles share.

    Attributes:
        plan: the sizes.
        masks: of this kind of tile; None if all cells are positions.
        seeds: of dropout; None without.
    """

    def __init__(self, plan: MixturePlan, masks: Any, seeds: Seeds | None) -> None:
        self.plan, self.masks, self.seeds = plan, masks, seeds
        self.sequence, self.heads, self.number = (pl.program_id(axis) for axis in range(3))

    def for_each(self, count: int, body: Callable[[Any], None]) -> None:
        """Runs `body` for each number below `count`."""
        size = self.plan.unrolled_of(count)

        def some(first: Any, _: None) -> None:
            for i in range(size):
                body(first * size + i)

        lax.fori_loop(0, count // size, some, None)

    def of_each_head(self, x: Array, *, scaled: bool = False) -> list[Array]:
        """Returns the array once for each head that shares its lanes, `scaled` as queries are."""
        x = tiles.scaled(x, self.plan.scale, x.dtype) if scaled else x
        return tiles.of_each_head(x, self.plan.shared_by)

    def numbers(self, ref: Any, at: Any) -> list[list[Float[Array, '1 n']]]:
        """Returns the numbers of a group or column, of each kind and head."""
        return self._by_kind([ref[i, pl.ds(at, 1), :] for i in range(ref.shape[0])])

    def write_numbers(self, ref: Any, at: Any, numbers: Sequence[Sequence[Float[Array, '1 n']]]) -> None:
        """Writes the numbers of a group or column, of each kind and head."""
        for i, row in enumerate(one for of_kind in numbers for one in of_kind):
            ref[i, pl.ds(at, 1), :] = row

    def _by_kind(self, numbers: Sequence[Array]) -> list[list[Array]]:
        """Groups numbers by kind."""
        heads = self.plan.shared_by
        return [list(numbers[i : i + heads]) for i in range(0, len(numbers), heads)]

    def columns_of(self, numbers: Sequence[Sequence[Float[Array, '1 n']]]) -> list[list[Float[Array, 'n 1']]]:
        """Transposes numbers of each kind and head."""
        return self._by_kind(columns_of([one for of_kind in numbers for one in of_kind]))

    def rows_of(self, numbers: Sequence[Sequence[Float[Array, 'n 1']]]) -> list[list[Float[Array, '1 n']]]:
        """Inverts `columns_of`."""
        return self._by_kind(rows_of([one for of_kind in numbers for one in of_kind]))

    def mask(self, kind: int, at: Any) -> Bool[Array, '1 n'] | None:
        """Returns a mask of a group or column; None if all is allowed."""
        return None if self.masks is None else self.masks[kind, pl.ds(at, 1), :] != 0

    def drops(self, first: Any, stride: int, first_key: int) -> list[Drop]:
        """Returns dropout of the weights of positions, from the `first` with a stride, of each head.

        It divides the weights that are kept by their part.
        """
        return [self._drop(head, first, stride, first_key) for head in range(self.plan.shared_by)]

    def _drop(self, head: int, first: Any, stride: int, first_key: int) -> Drop:
        def drop(weights: Array) -> Array:
            if self.seeds is None:
                return weights
            seed = self.seeds.of_heads[self.sequence, self.heads * self.plan.shared_by + head]
            count = self.seeds.kept[0]
            kept = tiles.kept_weights(seed, first, first_key, weights.shape, count, stride)
            return jnp.where(kept, weights * (KEPT_UNIT / count.astype(jnp.float32)), 0.0)

        return drop


class RowTile(Tile):
    """Whole rows of the grid."""

    def for_each_group(self, body: Callable[[Any], None]) -> None:
        """Runs `body` for the number of each group."""
        self.for_each(self.plan.tile_groups, body)

    def _rows(self, group: Any) -> Any:
        return pl.ds(group * self.plan.group_rows, self.plan.group_rows)

    def read(self, ref: Any, group: Any) -> Float[Array, 't e']:
        """Reads the positions of a group."""
        return ref[self._rows(group)].reshape(self.plan.group, self.plan.lanes)

    def write(self, ref: Any, group: Any, x: Float[Array, 't e']) -> None:
        """Writes the positions of a group."""
        ref[self._rows(group)] = self.by_row(x.astype(ref.dtype))

    def by_row(self, x: Shaped[Array, 't e']) -> Shaped[Array, 'n c e']:
        """Separates the rows of a group."""
        return x.reshape(self.plan.group_rows, self.plan.block, x.shape[-1])

    def inside(self, group: Any) -> Bool[Array, 'n c 1'] | None:
        """Returns which cells of a group are positions; None for all."""
        mask = self.mask(0, group)
        return None if mask is None else self.by_row(tiles.column(mask.astype(jnp.int32))) != 0

    def own_row(self, group: Any) -> tuple[Bool[Array, 't t'], Bool[Array, 't t']]:
        """Returns which positions of its row a position attends to, and which are in the span of it."""
        query, key = (lax.broadcasted_iota(jnp.int32, (self.plan.group, self.plan.group), axis) for axis in (0, 1))
        same_row = query // self.plan.block == key // self.plan.block
        own, others = same_row & (key <= query) if self.plan.causal else same_row, same_row & (key != query)
        mask = self.mask(0, group)
        return (own, others) if mask is None else (own & mask, others & mask)

    def vertical(self, group: Any, side: int) -> Bool[Array, 't t']:
        """Returns which vertical spans of its row, above or below it, a position attends to."""
        query, key = (lax.broadcasted_iota(jnp.int32, (self.plan.group, self.plan.group), axis) for axis in (0, 1))
        others = (query // self.plan.block == key // self.plan.block) & (key != query)
        some = self.mask(1 + side, group)
        if some is None:
            row = self.number * self.plan.tile_blocks + group * self.plan.group_rows + key // self.plan.block
            some = row < self.plan.blocks - 1 if side else row > 0
        return others & some

    def drops_of(self, group: Any, kind: int) -> list[Drop]:
        """Returns dropout of the weights for the own row, or (`1 + side`) for vertical spans, of each head."""
        first = self.number * self.plan.tile + group * self.plan.group
        return self.drops(first, 1, kind * self.plan.group)


class ColumnTile(Tile):
    """Neighbouring columns of the grid, with all rows.

    Attributes:
        turned_mask: an array by which the mask of positions changes from columns to rows; None without masks.
    """

    turned_mask: Any = None

    def for_each_row(self, body: Callable[[Any], None]) -> None:
        """Runs `body` for the number of each row."""
        self.for_each(self.plan.blocks, body)

    def for_each_column(self, body: Callable[[Any], None]) -> None:
        """Runs `body` for the number of each column."""
        self.for_each(self.plan.width, body)

    def row(self, number: Any) -> Any:
        """Returns the positions of a row in an array with gaps."""
        return pl.ds(number * self.plan.pitch, self.plan.width)

    def column(self, number: Any) -> Any:
        """Returns the positions of a column in an array with gaps."""
        return pl.ds(number, self.plan.blocks, stride=self.plan.pitch)

    def turn(self, ref: Any, turned: Any) -> None:
        """Writes an array of the tile into an array with gaps."""
        self.for_each_row(lambda row: put(turned, self.row(row), ref[row]))

    def write(self, ref: Any, turned: Any) -> None:
        """Inverts `turn`."""

        def one(row: Any) -> None:
            ref[row] = get(turned, self.row(row)).astype(ref.dtype)

        self.for_each_row(one)

    def read(self, turned: Any, column: Any) -> Float[Array, 'r e']:
        """Reads a column of an array with gaps, in the type of the kernel."""
        return get(turned, self.column(column)).astype(self.plan.dtype)

    def turn_mask(self) -> None:
        """Writes the mask of positions, if there is one, so that it can be read by rows."""
        if self.masks is None:
            return

        def one(column: Any) -> None:
            mask = tiles.column(self.masks[0, pl.ds(column, 1), :])
            put([self.turned_mask], self.column(column), jnp.broadcast_to(mask, (self.plan.blocks, LANES)))

        self.for_each_column(one)

    def inside(self, row: Any) -> Bool[Array, 'w e'] | None:
        """Returns which cells of a row are positions; None for all."""
        if self.masks is None:
            return None
        mask = self.turned_mask[self.row(row), :]
        return jnp.concatenate([mask] * (self.plan.lanes // LANES), axis=1) != 0

    def related(self, column: Any, kind: int, *, side: int | None = None) -> Bool[Array, 'r r']:
        """Returns which rows a row of the column attends to: the positions or (`kind` 1) the horizontal spans of them.

        With a `side`, only those above or those below.
        """
        row, other = (lax.broadcasted_iota(jnp.int32, (self.plan.blocks, self.plan.blocks), axis) for axis in (0, 1))
        one_side = side is not None or self.plan.causal
        related = (other > row if side else other < row) if one_side else other != row
        mask = self.mask(kind, column)
        return related if mask is None else related & mask

    def drops_of(self, column: Any, kind: int) -> list[Drop]:
        """Returns dropout of the weights for the own column, or (`kind` 1) for horizontal spans, of each head."""
        first_key = (1 + self.plan.sides) * self.plan.group + kind * self.plan.blocks
        return self.drops(self.number * self.plan.width + column, self.plan.block, first_key)
