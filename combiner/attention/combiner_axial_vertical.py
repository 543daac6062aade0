"""Combiner-Axial, vertical: own grid row and column directly, every other column above as a span (section 4.3)."""

import numpy as np
from jaxtyping import Array, Bool, Float

from combiner.core.pooled import Pooled
from combiner.core.registry import register
from combiner.costs import own_row_and_column, triangle
from combiner.ops import grid
from combiner.ops.blocks import clip_size
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.softmax import Drop, merge_partials
from combiner.patterns import Cost, Pattern, grid_support, with_spans


def pattern(length: int, *, causal: bool, columns: int) -> Pattern:
    """Returns the pattern: own row and column directly, every other column above as a span (section 4.3).

    When bidirectional, the part of another column below the own row is a second span: this project's choice.
    """
    direct, row, column = grid_support(length, columns, causal=causal)
    rows = np.arange(row[-1] + 1)
    spans, uses = [], []
    for inside in (rows[:, None] > row, rows[:, None] < row)[: 1 if causal else 2]:
        span_row, span_column = (axis.ravel() for axis in np.meshgrid(rows, np.arange(columns), indexing='ij'))
        spans.append(inside[span_row] & (span_column[:, None] == column))
        uses.append((row[:, None] == span_row) & (column[:, None] != span_column))
    return with_spans(direct, np.concatenate(spans), np.concatenate(uses, axis=1))


def cost(length: int, columns: int, *, causal: bool) -> Cost:
    """Returns `pattern(…).cost()` in closed form: `O(l (columns + l / columns))`."""
    whole, rest = divmod(length, columns)
    terms = own_row_and_column(length, columns, causal=causal) + (length - min(length, columns)) * (columns - 1)
    if columns == 1:
        return Cost(terms, 0)
    last = columns - 1 if rest == 1 else columns if rest else 0  # a single token does not use the span above itself
    members = columns * triangle(whole - 1) + whole * last
    if not causal and whole:
        terms += ((whole - 1) * columns + rest) * (columns - 1)
        members += columns * triangle(whole - 1) + whole * rest
    return Cost(terms, members)


def attend_combiner_axial_vertical(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends by equation (7) on a grid: directly within own row and column; span `(r, c)` is column `c` above row `r`.

        Q_(r,c) = pool_{t<r} q_(t,c)      V_(r,c) = Σ_{t<r} softmax_t(Q_(r,c)·k_(t,c)/√d) v_(t,c)

    A query in row `r` attends to the spans `(r, c)` of all columns except its own. When bidirectional, the part of each
    column below row `r` is one more span. O(l·(columns + l/columns)) time and memory.

    Args:
        columns: length of a grid row; the last row may be partial.
        q, k, v, causal, pools, valid, drop: see `core.mechanism`.
    """
    columns = clip_size(columns, q.shape[1])

    def attend(cells):
        in_column = grid.transpose_lines(grid.direct_in_column(cells), columns)
        return merge_partials(grid.direct_in_row(cells), in_column, grid.vertical_spans(cells, pools)).normalize()

    return grid.map_grids(attend, q, k, v, columns=columns, causal=causal, pools=pools, valid=valid, drop=drop)


@register('combiner_axial_vertical')
class CombinerAxialVertical(Pooled):
    """Combiner-Axial, vertical; `columns` is the length of a grid row, None for the cheapest power of two."""

    columns: int | None = None

    full_support = True

    def pattern(self, length):
        return pattern(length, causal=self.causal, columns=self._columns(length))

    def cost(self, length):
        return cost(length, self._columns(length), causal=self.causal)

    def attend(self, q, k, v, context):
        columns, pools = self._columns(q.shape[1]), self.pools(context)
        return attend_combiner_axial_vertical(
            q, k, v, columns=columns, causal=self.causal, pools=pools, valid=context.valid, drop=context.drop
        )

    def init_cache(self, q, k, v, context, counts, capacity):
        pools, columns = self.pools(context), self._columns(capacity)
        return grid.init_cache(q, k, v, counts, capacity, columns=columns, pools=pools, vertical=True)

    def decode_step(self, cache, index, q, k, v, context):
        return grid.decode_step(cache, index, q, k, v, pools=self.pools(context))

    def _columns(self, length):
        return self.size_or_cheapest(self.columns, cost, length)
