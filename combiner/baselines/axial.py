"""Sparse axial attention: own row and own column of a grid (Ho et al. 2019)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.costs import own_row_and_column
from combiner.ops.blocks import (
    block_segment_ids,
    clip_size,
    merge_blocks,
    own_mask,
    scale_queries,
    split_blocks,
    transpose_grid,
)
from combiner.ops.grid import BEFORE, OTHERS, transpose_ids
from combiner.ops.segments import same_segment
from combiner.ops.softmax import Drop, einsum, mask_logits, unnormalized_softmax
from combiner.ops.windows import decode_gathered, init_full_cache
from combiner.patterns import Cost, Pattern, grid_support, sparse


def pattern(length: int, *, causal: bool, columns: int) -> Pattern:
    """Returns the pattern (Ho et al. 2019): own row and own column of a grid with `columns` columns."""
    return sparse(grid_support(length, columns, causal=causal)[0])


def cost(length: int, columns: int, *, causal: bool) -> Cost:
    """Returns `pattern(…).cost()` in closed form."""
    return Cost(own_row_and_column(length, columns, causal=causal), 0)


def attend_axial(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends in one softmax to the own row and the own column of a grid (causal: `j ≤ i`).

    O(l·(columns + l/columns)) time and memory.

    Args:
        columns: length of a grid row; the last row may be partial.
        q, k, v, causal, valid, segments, drop: see `core.mechanism`.
    """
    batch, length = q.shape[:2]
    columns = clip_size(columns, length)
    segment_ids = block_segment_ids(batch, length, columns, causal=causal, valid=valid, segments=segments)
    q, k, v = (split_blocks(x, columns) for x in (scale_queries(q), k, v))
    rows = q.shape[1] // batch
    column_q, column_k, column_v = (transpose_grid(x, rows) for x in (q, k, v))

    visible = same_segment(segment_ids, segment_ids, own_mask(columns, causal=causal))
    in_row = mask_logits(einsum('hmqd,hmkd->hmqk', q, k), visible)
    transposed = None if segment_ids is None else transpose_ids(segment_ids, rows)
    visible = same_segment(transposed, transposed, (BEFORE if causal else OTHERS).members(None, rows))
    in_column = transpose_grid(mask_logits(einsum('hknd,hkrd->hknr', column_q, column_k), visible), columns)

    (in_row, in_column), total = unnormalized_softmax(in_row, in_column, drop=drop)
    attended = einsum('hmqk,hmkd->hmqd', in_row.astype(v.dtype), v)
    from_columns = einsum('hknr,hkrd->hknd', transpose_grid(in_column.astype(v.dtype), rows), column_v)
    return merge_blocks(((attended + transpose_grid(from_columns, columns)) / total).astype(v.dtype), length)


@register('axial')
class Axial(Mechanism):
    """Sparse axial attention; `columns` None for the cheapest power of two."""

    columns: int | None = None

    supports_segments = True

    def pattern(self, length):
        return pattern(length, causal=self.causal, columns=self._columns(length))

    def cost(self, length):
        return cost(length, self._columns(length), causal=self.causal)

    def attend(self, q, k, v, context):
        columns = self._columns(q.shape[1])
        valid, segments, drop = context.valid, context.segments, context.drop
        return attend_axial(q, k, v, columns=columns, causal=self.causal, valid=valid, segments=segments, drop=drop)

    def init_cache(self, q, k, v, context, counts, capacity):
        return init_full_cache(k, v, capacity)

    def decode_step(self, cache, index, q, k, v, context):
        capacity = cache.k.shape[2]
        columns, here = self._columns(capacity), index[:, None]
        in_row = here // columns * columns + jnp.arange(columns)
        above = here % columns + jnp.arange(-(-capacity // columns)) * columns
        visible = jnp.concatenate([in_row <= here, above < in_row[:, :1]], axis=1)
        return decode_gathered(cache, index, q, k, v, jnp.concatenate([in_row, above], axis=1), visible)

    def _columns(self, length):
        return self.size_or_cheapest(self.columns, cost, length)
