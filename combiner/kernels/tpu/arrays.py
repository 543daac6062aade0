"""The arrays of a kernel, and the tile of them that a step of its grid visits.

A field holds an array, its block spec, or in a kernel a reference to it, which has no leading axes `b` and `h`.

Letters: as in `tiles`, and `b` batch, `h` groups of heads that share lanes, `l` positions, `n` blocks, `r` rows of
summaries of a level.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from combiner.kernels.dropout import KEPT_UNIT
from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.plan import TABLE_ROWS, Plan


class Tokens(NamedTuple):
    """Queries (not scaled), keys and values of positions: `[b, h, l, e]`, or of narrow heads `[b, l, h·e]`.

    A key head may serve several query heads: then queries have more heads.
    """

    q: Any
    k: Any
    v: Any


class Ids(NamedTuple):
    """Segment ids. A summary of a side 0 is of the last document of its span, of a side 1 of the first.

    Attributes:
        of_tokens: `[b, n, c]`.
        of_summaries: at every level, `[b, sides, r, siblings]`.
        members: at every level, 1 for the members of each summary: `[b, sides, n, c]`, then `[b, sides, r, siblings]`;
            of no level if the summaries are given.
    """

    of_tokens: Any
    of_summaries: tuple[Any, ...]
    members: tuple[Any, ...]


class Seeds(NamedTuple):
    """Dropout: a seed for each sequence and head `[b, h]`, and of `KEPT_UNIT` weights, how many are kept `[1]`."""

    of_heads: Any
    kept: Any

    def drop(self, weights: Array, sequence: Any, head: Any, first_row: Any, first_key: int, stride: int = 1) -> Array:
        """Drops weights of a head, and divides the others by the part that is kept; positions as in `kept_weights`."""
        count = self.kept[0]
        kept = tiles.kept_weights(self.of_heads[sequence, head], first_row, first_key, weights.shape, count, stride)
        return jnp.where(kept, weights * (KEPT_UNIT / count.astype(jnp.float32)), 0.0)


class Tables(NamedTuple):
    """Summaries, or their gradients: one array for each level, `[b, h, sides, r·siblings, e]`.

    If a key head serves several query heads, each has its own summaries: `[b, h, repeats, sides, r·siblings, e]`.

    Attributes:
        k: keys.
        v: values.
        q: queries, not scaled, of all levels but the last; of no level if the tables are given.
    """

    k: tuple[Any, ...]
    v: tuple[Any, ...]
    q: tuple[Any, ...]


class Tile:
    """The tile that a step of the grid visits: reads its rows, from the array or from what an earlier phase kept."""

    def __init__(self, plan: Plan, ids: Ids | None, seeds: Seeds | None, *, reverse: bool) -> None:
        self.plan, self.ids, self.seeds = plan, ids, seeds
        self.sequence, self.heads, self.phase, step, self.repeat = (pl.program_id(axis) for axis in range(5))
        self.number = plan.tiles - 1 - step if reverse else step
        self.is_first, self.is_last = step == 0, step == plan.tiles - 1

    def run_phases(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Runs both parts, or each in its phase."""
        if self.plan.phases == 1:
            first()
            second()
        else:
            pl.when(self.phase == 0)(first)
            pl.when(self.phase == 1)(second)

    def for_each_block(self, body: Callable[[Any], None]) -> None:
        """Runs `body` for the number of each block of the tile."""
        size = self.plan.unrolled

        def some(group: Any) -> None:
            for i in range(size):
                body(group * size + i)

        groups = self.plan.tile_blocks // size
        if groups == 1:
            some(0)
        else:
            lax.fori_loop(0, groups, lambda group, _: some(group), None)

    def slice(self, block: Any = None, *, whole: bool) -> Any:
        """Returns the rows of a block, or of the tile, in an array of the tile or of the whole sequence."""
        start, size = (0, self.plan.tile) if block is None else (block * self.plan.block, self.plan.block)
        start = self.number * self.plan.tile + start if whole else start
        return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, 8), size)

    def own(self, refs: Any) -> Any:
        """Returns the part of references that belongs to the query heads of this step, of those of a key head."""
        if self.plan.repeats == 1:
            return refs
        return jax.tree.map(lambda ref: ref.at[self.repeat], refs)

    def for_queries(self, keys: Array) -> Array:
        """Puts the key head of each query head into the lanes of the query head."""
        plan = self.plan
        if plan.repeats == 1 or plan.shared_by == 1:
            return keys
        needed, moved = self._moves(), keys
        for one in range(1, plan.shared_by):
            moved = jnp.where(needed == one, tiles.roll_lanes(keys, one * plan.padded_width), moved)
        return moved

    def for_keys(self, gradient: Array) -> Array:
        """Returns the gradient of the keys of `for_queries`."""
        plan = self.plan
        if plan.repeats == 1 or plan.shared_by == 1:
            return gradient
        needed, total = self._moves(), 0.0
        for one in range(plan.shared_by):
            total += tiles.roll_lanes(jnp.where(needed == one, gradient, 0.0), -one * plan.padded_width)
        return total  # pyright: ignore[reportReturnType]

    def _moves(self) -> Array:
        """Returns by how many heads the keys of each lane must move."""
        shared = self.plan.shared_by
        head = lax.broadcasted_iota(jnp.int32, (1, self.plan.lanes), 1) // self.plan.padded_width
        of_keys = (self.repeat * shared + head) // self.plan.repeats
        return (head - of_keys + shared) % shared

    def rows(self, ref: Any, block: Any = None, *, kept: bool = False) -> Array:
        """Returns the rows of a block, or of the tile, with zeros beyond the end of the sequence."""
        x = ref[self.slice(block, whole=kept), :]
        if self.plan.padded_length == self.plan.length:
            return x
        # Beyond the end of an array, memory holds anything, NaN too.
        first = self.number * self.plan.tile + (0 if block is None else block * self.plan.block)
        inside = first + lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0) < self.plan.length
        return jnp.where(inside, x, jnp.zeros_like(x))

    def keep(self, kept: Tokens, arrays: tuple[Array, ...]) -> None:
        """Keeps the rows of the tile for the next phase."""
        for ref, x in zip(kept, arrays, strict=True):
            ref[self.slice(whole=True), :] = x

    def summary_rows(self) -> Any:
        """Returns the summaries of the blocks of the tile, in a table."""
        start = self.number * self.plan.tile_blocks
        return (
            slice(0, self.plan.tile_blocks)
            if self.plan.tiles == 1
            else pl.ds(pl.multiple_of(start, 8), self.plan.tile_blocks)
        )

    def write_summaries(self, table: Any, side: int, rows: Array) -> None:
        """Writes the summaries of the blocks of the tile into a table."""
        if not self.plan.shares_rows:
            table[side, self.summary_rows(), :] = rows
            return
        group, places = self._shared_rows()
        held = table[side, group, :]
        for i, here in enumerate(places):
            held = jnp.where(here, rows[i : i + 1], held)
        table[side, group, :] = held

    def read_summaries(self, table: Any, side: int) -> Array:
        """Returns the rows of a table that are of the blocks of the tile."""
        if not self.plan.shares_rows:
            return table[side, self.summary_rows(), :]
        group, places = self._shared_rows()
        held = table[side, group, :]
        return jnp.concatenate([jnp.where(here, held, 0).sum(axis=0, keepdims=True) for here in places], axis=0)

    def _shared_rows(self) -> tuple[Any, list[Array]]:
        """Returns the whole group of rows that holds the summaries of the tile, and which of them is each."""
        first = self.number * self.plan.tile_blocks
        start = first // TABLE_ROWS * TABLE_ROWS
        row = start + lax.broadcasted_iota(jnp.int32, (TABLE_ROWS, 1), 0)
        group = pl.ds(pl.multiple_of(start, TABLE_ROWS), TABLE_ROWS)
        return group, [row == first + i for i in range(self.plan.tile_blocks)]

    def _row_of_ids(self, block: Any) -> Any:
        """Returns the row of a block in the ids, which are those of the tile, or of the whole sequence."""
        first = self.number * self.plan.tile_blocks if self.plan.shares_rows else 0
        return pl.ds(first + block, 1)

    def members(self, side: int) -> tuple[Array | None, Array]:
        """Returns the members of the summaries of a side, as a column of rows, and by block."""
        inside = tiles.in_block(self.plan.tile_blocks, self.plan.block)
        if self.ids is None:
            return None, inside
        if self.plan.shares_rows:
            rows = [self.ids.members[0][side, self._row_of_ids(i), :] for i in range(self.plan.tile_blocks)]
            members = jnp.concatenate(rows, axis=0) != 0
        else:
            members = self.ids.members[0][side] != 0
        return tiles.block_columns(members), inside & tiles.repeat_lanes(members)

    def finished(self, level: int) -> tuple[Any, Any]:
        """Returns the first summary of a level that the blocks of the tile finish, and the one after the last."""
        first, end = self.number * self.plan.tile_blocks, (self.number + 1) * self.plan.tile_blocks
        span = self.plan.siblings**level
        return first // span, end // span

    def seen(self, block: Any) -> list[tuple[int, int, Any]]:
        """Returns the summaries that a block may see: level, side and rows of the tables."""
        plan, found = self.plan, []
        for level in range(plan.levels):
            start = self._row(block, level) * plan.siblings
            rows = slice(None) if plan.levels == 1 else pl.ds(pl.multiple_of(start, 8), plan.siblings)
            found += [(level, side, rows) for side in range(plan.sides)]
        return found

    def keys_and_values(self, block: Any, k: Array, v: Array, tables: Tables) -> tuple[list[Array], list[Array]]:
        """Returns the keys and values of a block: its own, and the summaries in `seen`."""
        seen = self.seen(block)
        keys, values = ([table[level][side, rows, :] for level, side, rows in seen] for table in (tables.k, tables.v))
        return [k, *keys], [v, *values]

    def add_to_seen(self, block: Any, sums: Tables, d_keys: list[Array], d_values: list[Array]) -> None:
        """Adds the gradients of the keys and values of the summaries in `seen`."""
        for (level, side, rows), d_key, d_value in zip(self.seen(block), d_keys, d_values, strict=True):
            sums.k[level][side, rows, :] += d_key
            sums.v[level][side, rows, :] += d_value

    def _row(self, block: Any, level: int) -> Any:
        """Returns the row of summaries of a level that holds a block of the tile."""
        number = self.number * self.plan.tile_blocks + block
        return number // self.plan.siblings ** (level + 1)

    def masks(self, block: Any, own: Array | None) -> list[Array | None]:
        """Returns which keys of its own block, and which of the summaries in `seen`, the positions of a block see."""
        plan, ids = self.plan, None
        if self.ids is not None:
            row = self.ids.of_tokens[self._row_of_ids(block), :]
            ids = tiles.column(row)
            own = ids == row if own is None else own & (ids == row)
        found = [own]
        for level, side, _ in self.seen(block):
            number = (self.number * plan.tile_blocks + block) // plan.siblings**level
            row = self._row(block, level)
            other = row * plan.siblings + lax.broadcasted_iota(jnp.int32, (1, plan.siblings), 1)
            if plan.causal or plan.sides == 2:
                visible = other > number if side else other < number
            else:
                visible = (other != number) & (other * plan.block * plan.siblings**level < plan.length)
            if self.ids is not None:
                visible = visible & (ids == self.ids.of_summaries[level][side, pl.ds(row, 1), :])
            found.append(visible)
        return found

    def own_mask(self) -> Array | None:
        """Returns which positions of its block a position attends to: itself and earlier ones, or None for all."""
        shape = (self.plan.block, self.plan.block)
        if not self.plan.causal:
            return None
        return lax.broadcasted_iota(jnp.int32, shape, 1) <= lax.broadcasted_iota(jnp.int32, shape, 0)

    def drop(self, weights: list[Array], block: Any, head: int) -> list[Array]:
        """Drops the weights of a block, for one of the heads that share lanes, and divides the others by their part."""
        if self.seeds is None:
            return weights
        of_tile = (self.heads * self.plan.repeats + self.repeat) * self.plan.shared_by
        first_key, dropped = 0, []
        first_row = self.number * self.plan.tile + block * self.plan.block
        for group in weights:
            dropped.append(self.seeds.drop(group, self.sequence, of_tile + head, first_row, first_key))
            first_key += group.shape[1]
        return dropped
