"""What a program of the GPU kernels holds: consecutive positions or summaries, and which of them see each other.

Summaries have levels: of blocks (level 0), of rows of those, and so on.

Letters: `t` queries and `s` keys of a slice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from combiner.kernels.dropout import KEPT_UNIT
from combiner.ops.segments import PADDING_ID


class Plan(NamedTuple):
    """What is known of shapes and masks when a kernel is traced.

    Attributes:
        length: of the sequences.
        width: of the heads.
        block: positions in a block, and with several levels, summaries in a row; the last may be partial.
        causal: whether a position attends to itself and earlier positions of its block only.
        packed: whether queries attend only to summaries of their segment; if not, ids only mark padding.
        relations: whether a query attends to the summaries that are 'earlier' or 'later' than its own, or to all
            'other' ones: a table of every level for each.
        levels: of summaries; with several, a query attends to those of the row of its own summary only.
        interpret: whether to run the kernels as plain operations, where there is no GPU.
    """

    length: int
    width: int
    block: int
    causal: bool
    packed: bool
    relations: tuple[str, ...]
    levels: int
    interpret: bool

    def aligned(self, size: int) -> bool:
        """Returns whether steps of `size` through the blocks of a tile start at multiples of it."""
        return self.block % size == 0 or size % self.block == 0

    def block_of(self, position: Any) -> Any:
        """Returns the number of the block of a position."""
        return lax.div(position, jnp.full_like(position, self.block))

    def start_of_block(self, position: Any) -> Any:
        """Returns the first position of the block of a position."""
        return round_down(position, self.block)

    def end_of_block(self, position: Any) -> Any:
        """Returns the end of the block of a position."""
        return jnp.minimum(self.start_of_block(position) + self.block, self.length)

    def size(self, level: int) -> int:
        """Returns the number of positions of a summary."""
        return self.block ** (level + 1)

    def count(self, level: int) -> int:
        """Returns the number of summaries of a level; -1 is that of the positions."""
        return -(-self.length // self.size(level))

    def row(self, level: int) -> int:
        """Returns the number of summaries in a row: a query attends to those of one row."""
        return self.count(level) if self.levels == 1 else self.block

    def step(self, step: int, level: int) -> int:
        """Returns the number of summaries of a step of a loop over a row: `step`, or fewer if the row is shorter."""
        return step if self.levels == 1 else min(step, max(16, pl.next_power_of_2(self.row(level))))

    def own_summary(self, position: Any, level: int) -> Any:
        """Returns the number of the summary that has a position."""
        return lax.div(position, jnp.full_like(position, self.size(level)))

    def before(self, level: int, side: int) -> int:
        """Returns how many keys come before those of the table of a level and a relation; no two have one number."""
        tables = len(self.relations)
        return self.length + tables * sum(map(self.count, range(level))) + side * self.count(level)


class Slice(NamedTuple):
    """Consecutive positions of a sequence, or summaries of a table.

    Attributes:
        start: the first.
        at: their numbers.
        inside: which of them exist; None if all do.
        ids: their segment ids; None if all are equal.
    """

    start: Any
    at: Any
    inside: Any
    ids: Any

    @classmethod
    def of(cls, ids_ref: Any, start: Any, size: int, count: int, *, aligned: bool = True) -> 'Slice':
        """Makes the slice of `size` of `count` positions, or summaries.

        Args:
            ids_ref: the segment ids of all; None if all are equal.
            start: the first.
            size: how many, a power of two.
            count: how many exist.
            aligned: whether `start` is a multiple of `size`.
        """
        at = start + jnp.arange(size, dtype=jnp.int32)
        inside = None if aligned and count % size == 0 else at < count
        positions = cls(jnp.int32(start), at, inside, None)
        return positions if ids_ref is None else positions._replace(ids=positions.load(ids_ref))

    @property
    def column(self) -> 'Slice':
        """Returns it with arrays of shape `[· 1]`."""
        return jax.tree.map(lambda x: x[:, None] if x.ndim else x, self)

    @property
    def row(self) -> 'Slice':
        """Returns it with arrays of shape `[1 ·]`."""
        return jax.tree.map(lambda x: x[None] if x.ndim else x, self)

    def load(self, ref: Any) -> Array:
        """Loads their numbers, or their vectors up to a width of a power of two; zeros for what does not exist."""
        part, mask = self._part(ref)
        return triton.load(part, mask=mask, other=None if mask is None else 0)

    def store(self, ref: Any, x: Array) -> None:
        """Stores their numbers or vectors, as far as they exist."""
        part, mask = self._part(ref)
        triton.store(part, x.astype(ref.dtype), mask=mask)

    def load_parents(self, ref: Any, plan: Plan) -> Array:
        """Loads for each of them the number or vector of the summary that has it, of the level above."""
        number = jnp.minimum(plan.block_of(self.at), ref.shape[0] - 1)
        if ref.ndim == 1:
            return triton.load(ref.at[number])
        shape = self.at.size, padded_width(ref.shape[1])
        number, column = jnp.broadcast_to(number[:, None], shape), lax.broadcasted_iota(jnp.int32, shape, 1)
        mask = None if shape[1] == ref.shape[1] else column < ref.shape[1]
        return triton.load(ref.at[number, column], mask=mask, other=None if mask is None else 0)

    def last(self, plan: Plan) -> Any:
        """Returns the last position that exists."""
        return jnp.minimum(self.start + self.at.size, plan.length) - 1

    def _part(self, ref: Any) -> tuple[Any, Any]:
        if ref.ndim == 1:
            return ref.at[pl.ds(self.start, self.at.size)], self.inside
        width = padded_width(ref.shape[1])
        mask = None if self.inside is None else self.inside[:, None]
        if width != ref.shape[1]:
            there = (jnp.arange(width) < ref.shape[1])[None]
            mask = there if mask is None else mask & there
        shape = self.at.size, width
        first: Any = np.int32(0)  # of the type of `start`, with jax_enable_x64 too
        columns = pl.ds(first, width)
        rows = pl.ds(self.start, shape[0])
        return ref.at[rows, columns], mask if mask is None else jnp.broadcast_to(mask, shape)


def padded_width(width: int) -> int:
    """Returns the width of loaded vectors: a power of two, as Triton needs, and enough for a matrix product."""
    return max(16, pl.next_power_of_2(width))


def own_mask(queries: Slice, keys: Slice, plan: Plan) -> Bool[Array, '...']:
    """Returns which queries attend to which positions of their blocks: one slice is a column, the other a row."""
    visible = plan.block_of(queries.at) == plan.block_of(keys.at)
    if plan.causal:
        visible &= keys.at <= queries.at  # a query that exists sees none beyond the end
    elif keys.inside is not None:
        visible &= keys.inside
    return visible if keys.ids is None else visible & (queries.ids == keys.ids)


def table_mask(queries: Slice, keys: Slice, relation: str, level: int, plan: Plan) -> Bool[Array, '...']:
    """Returns which queries attend to which summaries: one slice is a column, the other a row.

    Of slices that begin within the spans of `summaries_of` and `queries_of`.
    """
    compare = {'earlier': jnp.less, 'later': jnp.greater, 'other': jnp.not_equal}[relation]
    own = plan.own_summary(queries.at, level)
    visible = compare(keys.at, own)
    row = plan.row(level)
    if plan.count(level) > row and (row % keys.at.size or row * plan.size(level) % queries.at.size):
        visible &= round_down(keys.at, row) == round_down(own, row)  # a slice may hold parts of several rows
    if keys.inside is not None and relation != 'earlier':
        visible &= keys.inside
    if keys.ids is not None:
        visible &= keys.ids != PADDING_ID
        if plan.packed:
            visible &= queries.ids == keys.ids
    return visible


def own_keys(queries: Slice, plan: Plan) -> tuple[Any, Any]:
    """Returns the first and the end of the positions to which queries attend directly."""
    last = queries.last(plan)
    return plan.start_of_block(queries.start), last + 1 if plan.causal else plan.end_of_block(last)


def own_queries(keys: Slice, plan: Plan) -> tuple[Any, Any]:
    """Returns the first and the end of the positions that attend to keys directly."""
    return keys.start if plan.causal else plan.start_of_block(keys.start), plan.end_of_block(keys.last(plan))


def summaries_of(queries: Slice, relation: str, level: int, step: int, plan: Plan) -> tuple[Any, Any]:
    """Returns the first (a multiple of `step`) and the end of the summaries to which queries attend."""
    first, last = (plan.own_summary(at, level) for at in (queries.start, queries.last(plan)))
    row = plan.row(level)
    begin, end = round_down(first, row), jnp.minimum(round_down(last, row) + row, plan.count(level))
    if relation == 'earlier':
        end = last
    elif relation == 'later':
        begin = first + 1
    return round_down(begin, step), end


def queries_of(keys: Slice, relation: str, level: int, step: int, plan: Plan) -> tuple[Any, Any]:
    """Returns the first (a multiple of `step`) and the end of the queries that attend to summaries."""
    size, row, last = plan.size(level), plan.row(level), keys.start + keys.at.size - 1
    begin, end = round_down(keys.start, row), round_down(last, row) + row
    if relation == 'earlier':
        begin = keys.start + 1
    elif relation == 'later':
        end = last
    # Of summaries first: 32 bits do not hold the end of a row that goes on far behind the sequence.
    begin, end = (jnp.minimum(summary, plan.count(level)) * size for summary in (begin, end))
    return round_down(begin, step), jnp.minimum(end, plan.length)


def most_queries(keys: int, level: int, step: int, plan: Plan) -> int:
    """Returns a bound of the number of queries that `queries_of` spans, for a slice of as many keys."""
    row = plan.row(level)
    rows = -(-keys // row) if keys % row == 0 or row % keys == 0 else -(-keys // row) + 1
    span = rows * row * plan.size(level)
    return min(plan.length, span + (step if span % step else 0))  # the first is rounded down


def loop(span: tuple[Any, Any], step: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Returns `carry` after `carry = body(first, carry)` for every step of a span."""
    begin, end = span
    count = lax.div(jnp.int32(end - begin + step - 1), jnp.int32(step))
    return lax.fori_loop(jnp.int32(0), count, lambda i, carry: body(begin + i * step, carry), carry)


def round_down(number: Any, step: int) -> Any:
    """Returns the greatest multiple of `step` up to a number."""
    return number - lax.rem(number, jnp.full_like(number, step))


def kept_weights(drop_ref: Any, queries: Slice, keys: Slice, before: int = 0) -> Float[Array, '...'] | float:
    """Returns the factors of dropout: a function of a seed and the numbers of the query and the key.

    Args:
        drop_ref: a seed, and of `KEPT_UNIT` weights how many are kept; None for no dropout.
        queries: a column or a row.
        keys: a row or a column.
        before: how many keys come before the first one.
    """
    if drop_ref is None:
        return 1.0
    seed, kept = drop_ref[0], drop_ref[1]
    number = lax.shift_right_logical(_mix(_mix(queries.at ^ seed) + keys.at + before), jnp.int32(8))
    return jnp.where(number < kept, KEPT_UNIT / jnp.maximum(kept, 1).astype(jnp.float32), 0.0)


def _mix(x: Int[Array, '...']) -> Int[Array, '...']:
    """Hashes 32 bits by the last step of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ lax.shift_right_logical(x, jnp.full_like(x, shift))) * np.uint32(factor).astype(np.int32)
    return x ^ lax.shift_right_logical(x, jnp.full_like(x, 16))
