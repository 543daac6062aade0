"""Spans of whole chunks: one pair of siblings for every chunk and level, in tables in vector memory.

Row `p` of a table, with `2^t` the lowest set bit of `p`, holds the span of chunks `[p - 2^t, p)` on side 0, and
`[p, p + 2^t)` on side 1. At level `t` chunk `g` is in one of the pair that meets at `(g >> t | 1) << t`, and attends to
the other.

Letters: as in `tiles`, and `u` levels, padded to whole registers.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Tile
from combiner.kernels.tpu.logsparse.nodes import ChunkIds
from combiner.kernels.tpu.logsparse.plan import SiblingPlan
from combiner.kernels.tpu.tiles import COLUMNS_BY_COLUMNS, LOWEST, ROWS_BY_ROWS, product


class Ids(NamedTuple):
    """Segment ids; of spans that are not there, and of spans without members, ids that no position has.

    Attributes:
        of_tokens: `[b, n, c]`.
        of_nodes: of the nodes of each side, `[b, sides, n, c]`; in row 0, of the whole chunk.
        seen: of the spans to which each chunk attends, `[b, n, u]`.
        own: of the spans that hold each chunk, `[b, n, u]`.
    """

    of_tokens: Any
    of_nodes: Any
    seen: Any
    own: Any


class Pooled(NamedTuple):
    """Spans, pooled: maxima and how many positions hold each, or sums and the numbers of members."""

    x: Any
    count: Any


class Sums(NamedTuple):
    """Partial softmaxes of spans; each head has its own in its lanes."""

    top: Any
    total: Any
    values: Any


class Tables(NamedTuple):
    """Tables of all spans, `[b, h, sides, r, e]` in float32: pooled queries and keys, and local expectations."""

    q: Pooled
    k: Pooled
    v: Sums


def start(plan: SiblingPlan, pooled: Pooled) -> None:
    """Fills a table of pooled spans with nothing."""
    pooled.x[...] = jnp.full(pooled.x.shape, LOWEST if plan.pool == 'max' else 0.0, jnp.float32)
    pooled.count[...] = jnp.zeros(pooled.count.shape, jnp.float32)


def start_sums(sums: Sums) -> None:
    """Fills a table of partial softmaxes with nothing."""
    sums.top[...] = jnp.full(sums.top.shape, LOWEST / 2, jnp.float32)
    sums.total[...], sums.values[...] = (jnp.zeros(x.shape, jnp.float32) for x in (sums.total, sums.values))


class Chunk:
    """One chunk of a tile, and its spans: the ones that hold it (`own`), and the ones to which it attends.

    Causal, a level has one of the two: only left spans are in the tables.
    """

    def __init__(self, plan: SiblingPlan, tile: Tile, ids: Ids | None, block: Any) -> None:
        self.plan, self.tile, self.block = plan, tile, block
        self.number = tile.number * plan.tile_blocks + block
        self.ids = self.seen_ids = self.own_ids = None
        if ids is not None:
            here = pl.ds(block, 1)
            row, self.seen_ids, self.own_ids = ids.of_tokens[here, :], ids.seen[here, :], tiles.column(ids.own[here, :])
            of_nodes = [ids.of_nodes[side, here, :] for side in range(plan.sides)]
            self.ids = ChunkIds(row, tiles.column(row), of_nodes)

    def read(self, table: Any, *, own: bool) -> Float[Array, 'u e']:
        """Returns the rows of the spans of a table, the ones that hold the chunk or the others."""
        levels = self.plan.span_levels
        room = jnp.zeros((self.plan.spans - levels, self.plan.lanes), jnp.float32)
        return jnp.concatenate([*(table[self._at(t, own=own)] for t in range(levels)), room], axis=0)

    def write(self, table: Any, rows: Array, *, own: bool) -> None:
        """Writes the rows that `read` returns."""
        for t in range(self.plan.span_levels):
            table[self._at(t, own=own)] = rows[t : t + 1, :]

    def add(self, table: Any, rows: Array, *, own: bool) -> None:
        """Adds to the rows that `read` returns."""
        self.write(table, self.read(table, own=own) + rows, own=own)

    def read_all(self, tables: Any, *, own: bool) -> Any:
        """Returns the rows of several tables."""
        return type(tables)(*(self.read(table, own=own) for table in tables))

    def write_all(self, tables: Any, rows: Any, *, own: bool) -> None:
        """Writes the rows of several tables."""
        for table, some in zip(tables, rows, strict=True):
            self.write(table, some, own=own)

    def _at(self, t: int, *, own: bool) -> tuple[Any, Any, slice]:
        half = self.number >> t
        bit = half & 1
        side = 0 if self.plan.causal else bit if own else 1 - bit
        return side, pl.ds((half | 1) << t, 1), slice(None)

    def is_right(self, axis: int) -> Bool[Array, '...']:
        """Returns at which levels the chunk is in the right span of a pair, along an axis of `[u, 1]` or `[1, u]`."""
        shape = (self.plan.spans, 1) if axis == 0 else (1, self.plan.spans)
        number = jnp.full(shape, self.number, jnp.int32)
        return lax.shift_right_logical(number, lax.broadcasted_iota(jnp.int32, shape, axis)) & 1 == 1

    def own_levels(self) -> Bool[Array, 'u 1']:
        """Returns the levels at which a table has the span that holds the chunk."""
        there = lax.broadcasted_iota(jnp.int32, (self.plan.spans, 1), 0) < self.plan.span_levels
        return there & ~self.is_right(0) if self.plan.causal else there

    def members(self) -> Bool[Array, 'u #c']:
        """Returns the positions of the chunk that are members of the spans that hold it."""
        return self.own_levels() if self.ids is None else self.own_ids == self.ids.row

    def visible(self) -> Bool[Array, '#c u']:
        """Returns the spans to which each position of the chunk attends."""
        if self.ids is not None:
            return self.ids.column == self.seen_ids
        there = lax.broadcasted_iota(jnp.int32, (1, self.plan.spans), 1) < self.plan.span_levels
        return there & self.is_right(1) if self.plan.causal else there

    def pools(self, x: Array) -> list[tuple[Pooled, Bool[Array, 'u 1'], Array | None]]:
        """Pools the chunk for the spans of each side: the chunk `[1, e]`, its spans, and its members (None for all)."""
        x = x.astype(jnp.float32)
        if self.ids is None:
            return [(_pooled(self.plan, x, None), self.own_levels(), None)]
        found = []
        for side, ids in enumerate(self.ids.of_nodes):
            edge = ids[:, :1]
            inside, spans = self.ids.column == edge, self.own_ids == edge
            if self.plan.sides == 2:
                spans = spans & (self.is_right(0) == bool(side))
            found.append((_pooled(self.plan, x, inside), spans, inside))
        return found

    def add_pooled(self, x: Array, table: Pooled) -> None:
        """Adds the chunk to the spans that hold it."""
        held = self.read_all(table, own=True)
        for new, spans, _ in self.pools(x):
            held = _merged(self.plan, held, new, spans)
        self.write_all(table, held, own=True)

    def pooled_gradient(self, x: Array, table: Pooled, d: Float[Array, 'u e']) -> Float[Array, 'c e']:
        """Returns the gradient of the chunk's rows for that of the spans that hold it."""
        held = self.read_all(table, own=True)
        dx: Any = 0.0
        share = d / jnp.maximum(held.count, 1.0)
        for new, spans, inside in self.pools(x):
            if self.plan.pool == 'max':
                spans = spans & (held.x == new.x)
            part = jnp.where(spans, share, 0.0).sum(axis=0, keepdims=True)
            part = jnp.broadcast_to(part, x.shape)
            if self.plan.pool == 'max':
                part = jnp.where(x.astype(jnp.float32) == new.x, part, 0.0)
            dx += part if inside is None else jnp.where(inside, part, 0.0)
        return dx

    def query(self, table: Pooled, dtype: Any) -> Float[Array, 'u e']:
        """Returns the scaled queries of the spans that hold the chunk."""
        query = self.summary(table, own=True).astype(dtype)
        return tiles.scaled(query, self.plan.scale, dtype)

    def summary(self, table: Pooled, *, own: bool) -> Float[Array, 'u e']:
        """Returns the pooled rows of spans; zeros for spans without members."""
        held = self.read_all(table, own=own)
        if self.plan.pool == 'mean':
            return held.x / jnp.maximum(held.count, 1.0)
        return jnp.where(held.x > LOWEST, held.x, 0.0)

    def expectation(self, table: Sums, *, own: bool) -> Float[Array, 'u e']:
        """Returns the local expectations of spans."""
        total = self.read(table.total, own=own)
        return self.read(table.values, own=own) / jnp.where(total > 0, total, 1.0)

    def add_expectation(self, query: Array, k: Array, v: Array, table: Sums) -> None:
        """Adds the chunk to the partial softmaxes of the spans that hold it."""
        held, inside, parts = self.read_all(table, own=True), self.members(), []
        for one, head in enumerate(tiles.of_each_head(query, self.plan.shared_by)):
            logits = jnp.where(inside, product(head, k, ROWS_BY_ROWS), LOWEST)
            top = jnp.maximum(self._of_head(held.top, one), logits.max(axis=1, keepdims=True))
            weights = jnp.exp(logits - top)
            change = jnp.exp(held.top - top)
            total = held.total * change + weights.sum(axis=1, keepdims=True)
            values = held.values * change + product(weights.astype(v.dtype), v)
            parts.append(Sums(jnp.broadcast_to(top, held.top.shape), total, values))
        self.write_all(table, [tiles.own_lanes(list(x)) for x in zip(*parts, strict=True)], own=True)

    def expectation_gradient(
        self, query: Array, k: Array, v: Array, table: Sums, d: Float[Array, 'u e']
    ) -> tuple[Float[Array, 'u e'], Float[Array, 'c e'], Float[Array, 'c e']]:
        """Returns the gradients of the (scaled) queries of the spans, and of the chunk's keys and values."""
        held, inside, values = self.read_all(table, own=True), self.members(), self.expectation(table, own=True)
        d_query = []
        dk: Any = 0.0
        dv: Any = 0.0
        heads = [tiles.of_each_head(x, self.plan.shared_by) for x in (query, d)]
        for one, (head, d_head) in enumerate(zip(*heads, strict=True)):
            logits = jnp.where(inside, product(head, k, ROWS_BY_ROWS), LOWEST)
            total = self._of_head(held.total, one)
            weights = jnp.exp(logits - self._of_head(held.top, one)) / jnp.where(total > 0, total, 1.0)
            mean = (d_head * values).sum(axis=1, keepdims=True)
            d_head = d_head.astype(v.dtype)
            d_logits = (weights * (product(d_head, v, ROWS_BY_ROWS) - mean)).astype(k.dtype)
            d_query.append(product(d_logits, k))
            dk += product(d_logits, head, COLUMNS_BY_COLUMNS)
            dv += product(weights.astype(v.dtype), d_head, COLUMNS_BY_COLUMNS)
        return tiles.own_lanes(d_query), dk, dv

    def _of_head(self, x: Array, head: int) -> Float[Array, 'u 1']:
        """Returns the number that fills the lanes of a head."""
        first = head * self.plan.padded_width
        return x[:, first : first + 1]


def _pooled(plan: SiblingPlan, x: Array, inside: Array | None) -> Pooled:
    """Pools rows, as `Pooled` says; an id of a chunk of padding has no members."""
    if plan.pool == 'mean':
        if inside is None:
            return Pooled(x.sum(axis=0, keepdims=True), float(x.shape[0]))
        flags = jnp.broadcast_to(inside.astype(jnp.float32), x.shape)
        return Pooled(jnp.where(inside, x, 0.0).sum(axis=0, keepdims=True), flags.sum(axis=0, keepdims=True))
    x = x if inside is None else jnp.where(inside, x, LOWEST)
    top = x.max(axis=0, keepdims=True)
    holds = x == top if inside is None else (x == top) & inside
    return Pooled(top, holds.astype(jnp.float32).sum(axis=0, keepdims=True))


def _merged(plan: SiblingPlan, held: Pooled, new: Pooled, spans: Bool[Array, 'u 1']) -> Pooled:
    """Adds a chunk to the spans of a column of flags."""
    if plan.pool == 'mean':
        return Pooled(*(one + jnp.where(spans, other, 0.0) for one, other in zip(held, new, strict=True)))
    x = jnp.where(spans, new.x, LOWEST)
    top = jnp.maximum(held.x, x)
    count = jnp.where(held.x == top, held.count, 0.0) + jnp.where(spans & (x == top), new.count, 0.0)
    return Pooled(top, count)
