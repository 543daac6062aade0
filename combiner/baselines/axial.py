"""Sparse axial attention: own row and own column of a grid (Ho et al. 2019)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.costs import own_row_and_column
from combiner.ops.blocks import clip_size
from combiner.ops.grid import Grid, direct_in_column, direct_in_row, map_grids, transpose_lines
from combiner.ops.softmax import Drop, merge_partials
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
    columns = clip_size(columns, q.shape[1])

    def attend(cells: Grid) -> Array:
        in_column = transpose_lines(direct_in_column(cells), columns)
        return merge_partials(direct_in_row(cells), in_column).normalize()

    return map_grids(attend, q, k, v, columns=columns, causal=causal, valid=valid, segments=segments, drop=drop)


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
