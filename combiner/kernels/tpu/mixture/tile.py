"""The tiles that a step of the kernels visits: whole rows of the grid, or neighbouring columns.

Both attend by groups of lines. A tile of columns is read by rows, and changes between rows and columns by arrays in
vector memory, as in `rowmajor.tile`.

Letters: as in `arrays`; `w` columns of a tile.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Seeds, Tokens
from combiner.kernels.tpu.mixture.plan import Lines, MixturePlan
from combiner.kernels.tpu.mixture.terms import Drop, Query, Terms, keep
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
        lines: of the tile.
        masks: of this kind of tile; None if all cells are positions.
        seeds: of dropout; None without.
        first_key: dropout's number of the first key.
    """

    lines: Lines
    first_key: int

    def __init__(self, plan: MixturePlan, masks: Any, seeds: Seeds | None) -> None:
        self.plan, self.masks, self.seeds = plan, masks, seeds
        self.sequence, self.heads, self.number = (pl.program_id(axis) for axis in range(3))

    def for_each(self, count: int, positions: int, body: Callable[[Any], None]) -> None:
        """Runs `body` for each number below `count`, of a row or group of some positions."""
        size = self.plan.unrolled_of(count, positions)

        def some(first: Any, _: None) -> None:
            for i in range(size):
                body(first * size + i)

        lax.fori_loop(0, count // size, some, None)

    def for_each_group(self, body: Callable[[Any], None]) -> None:
        """Runs `body` for the number of each group."""
        self.for_each(self.lines.groups, self.lines.group, body)

    def queries(self, x: Tokens, mask: Bool[Array, 't t'], drops: Sequence[Drop] | None = None) -> list[Query]:
        """Returns what the positions of a group attend to, by head; the queries of `x` are not scaled."""
        scaled = self.of_each_head(tiles.scaled(x.q, self.plan.scale, x.q.dtype))
        return [
            Query(x._replace(q=q), mask, drop) for q, drop in zip(scaled, drops or [keep] * len(scaled), strict=True)
        ]

    def of_each_head(self, x: Array) -> list[Array]:
        """Returns the array once for each head that shares its lanes."""
        return tiles.of_each_head(x, self.plan.shared_by)

    def expectation(self, heads: Sequence[Terms]) -> Float[Array, 't e']:
        """Returns a local expectation of all heads that share lanes; zeros where there is no term."""
        return tiles.own_lanes([one.values / jnp.where(one.total > 0, one.total, 1.0) for one in heads])

    def merge_terms(self, heads: Sequence[Terms]) -> tuple[Float[Array, 't e'], list[Array], list[Array]]:
        """Returns the terms of all heads that share lanes: values, and the other numbers by head."""
        values, totals, tops = (list(parts) for parts in zip(*heads, strict=True))
        return tiles.own_lanes(values), totals, tops

    def merge_heads(self, heads: Sequence[Tokens]) -> Tokens:
        """Joins the gradients of queries, keys and values of the heads that share lanes; the queries are scaled."""
        q, k, v = zip(*heads, strict=True)
        return Tokens(tiles.own_lanes(list(q)) * self.plan.scale, sum(k), sum(v))

    def numbers(self, ref: Any, at: Any) -> list[list[Float[Array, '1 n']]]:
        """Returns the numbers of a group or column, of each kind and head."""
        return self.by_kind([ref[i, pl.ds(at, 1), :] for i in range(ref.shape[0])])

    def write_numbers(self, ref: Any, at: Any, numbers: Sequence[Sequence[Float[Array, '1 n']]]) -> None:
        """Writes the numbers of a group or column, of each kind and head."""
        for i, row in enumerate(one for of_kind in numbers for one in of_kind):
            ref[i, pl.ds(at, 1), :] = row

    def by_kind(self, numbers: Sequence[Any]) -> list[list[Any]]:
        """Groups numbers, or other things of each kind and head, by kind."""
        heads = self.plan.shared_by
        return [list(numbers[i : i + heads]) for i in range(0, len(numbers), heads)]

    def columns_of(self, numbers: Sequence[Sequence[Float[Array, '1 n']]]) -> list[list[Float[Array, 'n 1']]]:
        """Transposes numbers of each kind and head."""
        return self.by_kind(columns_of([one for of_kind in numbers for one in of_kind]))

    def rows_of(self, numbers: Sequence[Sequence[Float[Array, 'n 1']]]) -> list[list[Float[Array, '1 n']]]:
        """Inverts `columns_of`."""
        return self.by_kind(rows_of([one for of_kind in numbers for one in of_kind]))

    def mask(self, kind: int, group: Any) -> Bool[Array, '1 t'] | None:
        """Returns a mask of a group; None if all is allowed."""
        return None if self.masks is None else self.masks[kind, pl.ds(group, 1), :] != 0

    def queries_and_keys(self) -> tuple[Int[Array, 't t'], Int[Array, 't t'], Bool[Array, 't t']]:
        """Returns the numbers of the query and the key of each pair of a group, and whether their line is the same."""
        shape = self.lines.group, self.lines.group
        query, key = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        return query, key, query // self.lines.length == key // self.lines.length

    def drops(self, group: Any, kind: int) -> list[Drop]:
        """Returns dropout of the weights of a group for a kind of keys, of each head.

        It divides the weights that are kept by their part.
        """
        first = (self.number * self.lines.groups + group) * self.lines.group
        first_key = self.first_key + kind * self.lines.group
        return [self._drop(head, first, first_key) for head in range(self.plan.shared_by)]

    def _drop(self, head: int, first: Any, first_key: int) -> Drop:
        def drop(weights: Array) -> Array:
            if self.seeds is None:
                return weights
            of_tile = self.heads * self.plan.shared_by
            return self.seeds.drop(weights, self.sequence, of_tile + head, first, first_key)

        return drop


class RowTile(Tile):
    """Whole rows of the grid."""

    def __init__(self, plan: MixturePlan, masks: Any, seeds: Seeds | None) -> None:
        super().__init__(plan, masks, seeds)
        self.lines, self.first_key = plan.by_row, 0

    def _rows(self, group: Any) -> Any:
        return pl.ds(group * self.lines.lines, self.lines.lines)

    def read(self, ref: Any, group: Any) -> Float[Array, 't e']:
        """Reads the positions of a group."""
        return ref[self._rows(group)].reshape(self.lines.group, self.plan.lanes)

    def write(self, ref: Any, group: Any, x: Float[Array, 't e']) -> None:
        """Writes the positions of a group."""
        ref[self._rows(group)] = self.by_row(x.astype(ref.dtype))

    def by_row(self, x: Shaped[Array, 't e']) -> Shaped[Array, 'n c e']:
        """Separates the rows of a group."""
        return x.reshape(self.lines.lines, self.lines.length, x.shape[-1])

    def inside(self, group: Any) -> Bool[Array, 'n c 1'] | None:
        """Returns which cells of a group are positions; None for all."""
        mask = self.mask(0, group)
        return None if mask is None else self.by_row(tiles.column(mask.astype(jnp.int32))) != 0

    def own_row(self, group: Any) -> tuple[Bool[Array, 't t'], Bool[Array, 't t']]:
        """Returns which positions of its row a position attends to, and which are in the span of it."""
        query, key, same_row = self.queries_and_keys()
        own, others = same_row & (key <= query) if self.plan.causal else same_row, same_row & (key != query)
        mask = self.mask(0, group)
        return (own, others) if mask is None else (own & mask, others & mask)

    def vertical(self, group: Any, side: int) -> Bool[Array, 't t']:
        """Returns which vertical spans of its row, above or below it, a position attends to."""
        query, key, same_row = self.queries_and_keys()
        some = self.mask(1 + side, group)
        if some is None:
            row = (self.number * self.lines.groups + group) * self.lines.lines + key // self.lines.length
            some = row < self.plan.blocks - 1 if side else row > 0
        return same_row & (key != query) & some


class ColumnTile(Tile):
    """Neighbouring columns of the grid, with all rows.

    Attributes:
        turned_mask: an array by which the mask of positions changes from columns to rows; None without masks.
    """

    def __init__(self, plan: MixturePlan, masks: Any, seeds: Seeds | None, turned_mask: Any) -> None:
        super().__init__(plan, masks, seeds)
        self.lines, self.first_key = plan.by_column, (1 + plan.sides) * plan.by_row.group
        self.turned_mask = turned_mask

    def for_each_row(self, body: Callable[[Any], None]) -> None:
        """Runs `body` for the number of each row."""
        self.for_each(self.plan.blocks, self.plan.width, body)

    def row(self, number: Any) -> Any:
        """Returns the positions of a row in an array with gaps."""
        return pl.ds(number * self.plan.pitch, self.plan.width)

    def turn(self, refs: Sequence[Any], turned: Sequence[Any]) -> None:
        """Writes arrays of the tile into arrays with gaps."""

        def one(row: Any) -> None:
            for ref, to in zip(refs, turned, strict=True):
                put(to, self.row(row), ref[row])

        self.for_each_row(one)

    def write(self, refs: Sequence[Any], turned: Sequence[Any], so_far: Sequence[Any] = ()) -> None:
        """Inverts `turn`, and adds arrays `so_far` to the first ones."""

        def one(row: Any) -> None:
            for ref, made, before in itertools.zip_longest(refs, turned, so_far):
                x = get(made, self.row(row))
                x = x if before is None else before[row].astype(jnp.float32) + x
                ref[row] = x.astype(ref.dtype)

        self.for_each_row(one)

    def _columns(self, group: Any) -> list[Any]:
        """Returns the positions of each column of a group in an array with gaps."""
        first = group * self.lines.lines
        return [pl.ds(first + i, self.plan.blocks, stride=self.plan.pitch) for i in range(self.lines.lines)]

    def read(self, turned: Any, group: Any) -> Float[Array, 't e']:
        """Reads a group from an array with gaps, in the type of the kernel."""
        return jnp.concatenate([get(turned, column) for column in self._columns(group)], axis=0).astype(self.plan.dtype)

    def put(self, turned: Any, group: Any, x: Shaped[Array, 't e']) -> None:
        """Writes a group into an array with gaps."""
        for i, column in enumerate(self._columns(group)):
            put(turned, column, x[i * self.plan.blocks : (i + 1) * self.plan.blocks])

    def turn_mask(self) -> None:
        """Writes the mask of positions, if there is one, so that it can be read by rows."""
        if self.masks is None:
            return

        def one(group: Any) -> None:
            mask = tiles.column(self.masks[0, pl.ds(group, 1), :])
            self.put([self.turned_mask], group, jnp.broadcast_to(mask, (self.lines.group, LANES)))

        self.for_each_group(one)

    def inside(self, row: Any) -> Bool[Array, 'w e'] | None:
        """Returns which cells of a row are positions; None for all."""
        if self.masks is None:
            return None
        mask = self.turned_mask[self.row(row), :]
        return jnp.concatenate([mask] * (self.plan.lanes // LANES), axis=1) != 0

    def related(self, group: Any, kind: int, *, side: int | None = None) -> Bool[Array, 't t']:
        """Returns to what a position attends: other positions of its column, or (`kind` 1) their horizontal spans.

        With a `side`, only those above or those below.
        """
        query, key, same_column = self.queries_and_keys()
        one_side = side is not None or self.plan.causal
        related = same_column & ((key > query if side else key < query) if one_side else key != query)
        mask = self.mask(kind, group)
        return related if mask is None else related & mask
