"""Combiner-Axial, horizontal: own grid row and column directly, every earlier row without that column as a span."""

from functools import partial

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


def pattern(length: int, *, causal: bool, columns: int, split: bool = False) -> Pattern:
    """Returns the pattern: own row and column directly, every earlier row without that column as a span (section 4.3).

    Args:
        length: number of positions.
        causal: whether a position attends to itself and earlier positions only. If not, all other rows are spans: this
            project's choice.
        columns: length of a grid row; the last row may be partial.
        split: whether the cells left and the cells right of the column are two spans, as in the authors' code.
    """
    direct, row, column = grid_support(length, columns, causal=causal)
    # In a partial last row, columns beyond its end leave out no cell: they share the span of the first such column.
    span_row, span_column = np.divmod(np.arange(min((row[-1] + 1) * columns, length + 1)), columns)
    visible = span_row < row[:, None] if causal else span_row != row[:, None]
    in_last = span_row == length // columns
    left_out = np.where(in_last, np.minimum(column[:, None], length % columns), column[:, None])
    pieces = [span_column[:, None] > column, span_column[:, None] < column]
    if not split:
        pieces = [pieces[0] | pieces[1]]
    spans = [(span_row[:, None] == row) & piece for piece in pieces]
    return with_spans(direct, np.concatenate(spans), np.tile(visible & (left_out == span_column), len(pieces)))


def cost(length: int, columns: int, split: bool = False, *, causal: bool) -> Cost:
    """Returns `pattern(…).cost()` in closed form: `O(l (columns + l / columns))`."""
    whole, rest = divmod(length, columns)
    direct = own_row_and_column(length, columns, causal=causal)
    if columns == 1 or not whole:
        return Cost(direct, 0)
    in_row, in_last = (2 * columns - 2, max(0, 2 * rest - 1)) if split else (columns, rest)  # spans by column, summed
    if causal:
        used = (whole - 1) * columns + rest  # in the last row but one, only cells above a token
        return Cost(direct + triangle(whole - 1) * in_row + whole * in_last, (columns - 1) * used)
    terms = direct + whole * (whole - 1) * in_row + whole * in_last
    if rest:
        terms += whole * (columns + rest - 2 if split else columns - (rest == 1))
    return Cost(terms, (columns - 1) * (whole * columns if whole > 1 else rest) + rest**2)


def attend_combiner_axial_horizontal(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    split: bool = False,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends by equation (7) on a grid: directly in own row and column; span `(t, c)` is row `t` without column `c`.

        Q_(t,c) = pool_{j≠c} q_(t,j)      V_(t,c) = Σ_{j≠c} softmax_j(Q_(t,c)·k_(t,j)/√d) v_(t,j)

    Column `c` attends to the spans `(t, c)` of all earlier (bidirectional: other) rows (Combiner, section 4.3).
    O(l·(columns + l/columns)) time and memory.

    Args:
        columns: length of a grid row; the last row may be partial.
        split: whether the cells left and the cells right of the column are two spans, as in the authors' code.
        q, k, v, causal, pools, valid, drop: see `core.mechanism`.
    """
    columns = clip_size(columns, q.shape[1])

    def attend(cells):
        by_column = merge_partials(grid.direct_in_column(cells), grid.horizontal_spans(cells, pools, split=split))
        return merge_partials(grid.direct_in_row(cells), grid.transpose_lines(by_column, columns)).normalize()

    return grid.map_grids(attend, q, k, v, columns=columns, causal=causal, pools=pools, valid=valid, drop=drop)


@register('combiner_axial_horizontal')
class CombinerAxialHorizontal(Pooled):
    """Combiner-Axial, horizontal.

    Attributes:
        columns: length of a grid row; None for the cheapest power of two.
        split: whether the cells left and the cells right of the own column are two spans, as in the authors' code.
    """

    columns: int | None = None
    split: bool = False

    full_support = True

    def pattern(self, length):
        columns = self._columns(length)
        return pattern(length, causal=self.causal, columns=columns, split=self.split)

    def cost(self, length):
        return self._cost(length, self._columns(length), causal=self.causal)

    def attend(self, q, k, v, context):
        columns, pools, split = self._columns(q.shape[1]), self.pools(context), self.split
        causal, valid, drop = self.causal, context.valid, context.drop
        return attend_combiner_axial_horizontal(
            q, k, v, columns=columns, causal=causal, split=split, pools=pools, valid=valid, drop=drop
        )

    def init_cache(self, q, k, v, context, counts, capacity):
        pools, relations = self.pools(context), grid.horizontal_relations(self.split)
        columns = self._columns(capacity)
        return grid.init_cache(q, k, v, counts, capacity, columns=columns, pools=pools, relations=relations)

    def decode_step(self, cache, index, q, k, v, context):
        pools, relations = self.pools(context), grid.horizontal_relations(self.split)
        return grid.decode_step(cache, index, q, k, v, pools=pools, relations=relations)

    @property
    def _cost(self):
        return partial(cost, split=self.split)

    def _columns(self, length):
        return self.size_or_cheapest(self.columns, self._cost, length)
