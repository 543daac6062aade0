"""What a step of the kernels of Combiner-Axial, row-major, does with its tile.

A tile attends within its rows, makes a summary for each position, and puts it into the table of its column, which stays
in vector memory. Then it attends along the columns. The two parts of the softmax are joined by the logarithms of their
sums of exponentials.

Letters: as in `tile`, and `b` batch, `h` groups of heads that share lanes, `m` groups of rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Ids, Seeds, Tokens
from combiner.kernels.tpu.rowmajor import columns, rows
from combiner.kernels.tpu.rowmajor.columns import Column
from combiner.kernels.tpu.rowmajor.plan import GridPlan
from combiner.kernels.tpu.rowmajor.rows import Pair
from combiner.kernels.tpu.rowmajor.tile import GridTile, get, put
from combiner.kernels.tpu.tiles import ROWS_BY_ROWS, product
from combiner.layers import LANES


class Residuals(NamedTuple):
    """What the backward pass needs of the forward: outputs of the kernel.

    Attributes:
        logarithms: of the sums of exponentials, `[b, h, heads that share lanes, m, t]`.
        tables: of the summaries, `[b, h, sides, columns, s, e]`.
    """

    logarithms: Any
    tables: Any


class Turned(NamedTuple):
    """Arrays of a tile by which it changes between rows and columns (see `tile`).

    Attributes:
        q: scaled queries.
        out: attended values; backward, the gradient of queries through the columns.
        d_out: the gradient of the attended values; only backward.
        sums: the logarithm of the sum of exponentials, in the lanes of each head; backward, see `put_sums`.
        summaries: their keys and values by side; backward, the gradients.
        ids: segment ids, in every lane, if there are any.
    """

    q: Any
    out: Any
    d_out: Any
    sums: Any
    summaries: Pair
    ids: Any


class _Pass:
    """What both passes share: the tile, and the arrays by which it changes between rows and columns."""

    plan: GridPlan
    ids: Ids | None
    seeds: Seeds | None
    turned: Turned

    @functools.cached_property
    def tile(self) -> GridTile:
        """Returns the tile of the step."""
        return GridTile(self.plan, self.ids, self.seeds)

    def clear(self, tables: Pair) -> None:
        """Fills tables with zeros before the first tile."""

        @pl.when((self.tile.phase == 0) & self.tile.is_first)
        def _() -> None:
            for table in tables:
                table[...] = jnp.zeros_like(table)

    def by_phase(self, first: Callable[[], None], last: Callable[[], None], both: Callable[[], None]) -> None:
        """Runs the parts of two phases, or of one that does both."""
        if self.plan.phases == 1:
            both()
        else:
            pl.when(self.tile.phase == 0)(first)
            pl.when(self.tile.phase == 1)(last)

    def put_ids(self, group: Any) -> None:
        """Writes the segment ids of a group, if there are any, into every lane."""
        ids = self.tile.ids_of(group)
        if ids is not None:
            by_lane = jnp.broadcast_to(tiles.column(ids), (self.plan.group, LANES))
            self.tile.put_group(self.turned.ids, group, by_lane)

    def ids_of(self, at: Any) -> Array | None:
        """Returns the segment ids of a column, in every lane."""
        return None if self.turned.ids is None else get(self.turned.ids, at)


@dataclasses.dataclass
class Forward(_Pass):
    """A step of the forward pass; the arguments are references to the arrays of the kernel."""

    plan: GridPlan
    tokens: Tokens
    ids: Ids | None
    seeds: Seeds | None
    out: Any
    residuals: Residuals | None
    tables: Pair
    turned: Turned

    def run(self) -> None:
        """Visits the tile."""
        if self.plan.tile_blocks < self.plan.blocks:
            self.clear(self.tables)
        self.by_phase(
            lambda: self._visit(summarise=True, attend=False),
            lambda: self._visit(summarise=False, attend=True),
            lambda: self._visit(summarise=True, attend=True),
        )

    def _visit(self, *, summarise: bool, attend: bool) -> None:
        def column(number: Any) -> None:
            if summarise:
                self._write_column(number)
            if attend:
                self._attend_column(number)

        self.tile.for_each_group(lambda group: self._visit_rows(group, summarise=summarise, attend=attend))
        self.tile.for_each_column(column)
        if attend:
            self.tile.for_each_group(self._finish)

    def _visit_rows(self, group: Any, *, summarise: bool, attend: bool) -> None:
        tile, turned = self.tile, self.turned
        x = Tokens(*(tile.rows(ref, group) for ref in self.tokens))
        logits = [product(head, x.k, ROWS_BY_ROWS) for head in rows.heads_of(tile, x)]
        for side in range(self.plan.sides if summarise else 0):
            for refs, made in zip(turned.summaries, rows.summarise(tile, group, side, x, logits), strict=True):
                tile.put_group(refs[side], group, made)
        if attend:
            values, logarithm = rows.attend_own(tile, group, x.v, logits)
            tile.put_group(turned.q, group, tiles.scaled(x.q, self.plan.scale, x.q.dtype))
            tile.put_group(turned.out, group, values)
            tile.put_group(turned.sums, group, logarithm)
            self.put_ids(group)

    def _write_column(self, number: Any) -> None:
        columns.write_summaries(self.tile, number, self.turned.summaries, self.tables)
        if self.residuals is not None:
            for table, block in zip(self.tables, self.residuals.tables, strict=True):
                block[:, number] = table[:, number, self.tile.table_rows, :]

    def _attend_column(self, number: Any) -> None:
        at, turned = self.tile.column(number), self.turned
        q, values, own = get(turned.q, at), get(turned.out, at), get(turned.sums, at)
        q = q.astype(self.out.dtype)
        sums, total, top = columns.attend(self.tile, number, q, self.ids_of(at), self.tables)
        best = jnp.maximum(own, top)
        own_part, others_part = jnp.exp(own - best), jnp.exp(top - best)
        total = own_part + others_part * total
        some = jnp.where(total > 0, total, 1.0)
        put(turned.out, at, (own_part * values + others_part * sums) / some)
        put(turned.sums, at, jnp.where(total > 0, best + jnp.log(some), 0.0))

    def _finish(self, group: Any) -> None:
        here = self.tile.group(group)
        self.out[here, :] = self.tile.get_group(self.turned.out, group).astype(self.out.dtype)
        if self.residuals is not None:
            by_lane = self.tile.get_group(self.turned.sums, group).T
            for head in range(self.plan.shared_by):
                lane = head * self.plan.padded_width
                self.residuals.logarithms[head, pl.ds(group, 1), :] = by_lane[lane : lane + 1]


@dataclasses.dataclass
class Backward(_Pass):
    """A step of the backward pass; `sums` are the gradients of the tables."""

    plan: GridPlan
    tokens: Tokens
    ids: Ids | None
    seeds: Seeds | None
    d_out: Any
    out: Any
    residuals: Residuals
    grads: Tokens
    sums: Pair
    turned: Turned

    def run(self) -> None:
        """Visits the tile."""
        self.clear(self.sums)
        self.by_phase(
            lambda: self._visit(add=True, read=False),
            lambda: self._visit(add=False, read=True),
            lambda: self._visit(add=True, read=True),
        )

    def _visit(self, *, add: bool, read: bool) -> None:
        self.tile.for_each_group(self._visit_rows)
        self.tile.for_each_column(lambda number: self._visit_column(number, add=add, read=read))
        if read:
            self.tile.for_each_group(self._finish)

    def _sums_of(self, group: Any) -> rows.Sums:
        heads, tile = range(self.plan.shared_by), self.tile
        logarithms = [tiles.column(self.residuals.logarithms[head, pl.ds(group, 1), :]) for head in heads]
        change = tile.rows(self.d_out, group).astype(jnp.float32) * tile.rows(self.out, group).astype(jnp.float32)
        parts = tiles.of_each_head(change, self.plan.shared_by)
        return rows.Sums(logarithms, [part.sum(axis=1, keepdims=True) for part in parts])

    def _visit_rows(self, group: Any) -> None:
        tile, turned = self.tile, self.turned
        q = tile.rows(self.tokens.q, group)
        tile.put_group(turned.q, group, tiles.scaled(q, self.plan.scale, q.dtype))
        tile.put_group(turned.d_out, group, tile.rows(self.d_out, group))
        tile.put_group(turned.sums, group, columns.put_sums(self._sums_of(group), self.plan.lanes))
        self.put_ids(group)

    def _visit_column(self, number: Any, *, add: bool, read: bool) -> None:
        at, turned = self.tile.column(number), self.turned
        q, d_out = (get(ref, at).astype(self.d_out.dtype) for ref in (turned.q, turned.d_out))
        x = Column(q, d_out, get(turned.sums, at), self.ids_of(at))
        dq = columns.gradient(self.tile, number, x, self.residuals.tables, self.sums if add else None)
        if read:
            put(turned.out, at, dq)
            columns.read_gradients(self.tile, number, self.sums, turned.summaries)

    def _finish(self, group: Any) -> None:
        tile, turned, here = self.tile, self.turned, self.tile.group(group)
        x = Tokens(*(tile.rows(ref, group) for ref in self.tokens))
        d_summaries = [Pair(*(tile.get_group(refs[side], group) for refs in turned.summaries)) for side in self._sides]
        d = rows.gradient(tile, group, x, tile.rows(self.d_out, group), self._sums_of(group), d_summaries)
        dq = (d.q + tile.get_group(turned.out, group)) * self.plan.scale
        for ref, made in zip(self.grads, (dq, d.k, d.v), strict=True):
            ref[here, :] = made.astype(ref.dtype)

    @property
    def _sides(self) -> range:
        return range(self.plan.sides)
