"""Combiner-Axial, horizontal: own grid row and column directly, every earlier row without that column as a span."""

from functools import partial

from jaxtyping import Array, Bool, Float

from combiner import costs, patterns
from combiner.attention import grid, grid_cache, grid_step
from combiner.attention.grid_layout import turn, visit_grids
from combiner.attention.joint import Drop
from combiner.attention.layout import fit
from combiner.attention.pooled import PooledAttention
from combiner.attention.pooling import PLAIN, Pools
from combiner.attention.registry import register
from combiner.attention.sums import together


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
    """Equation (7) on a grid: direct are the own row and column, span `(t, c)` is row `t` without column `c`.

        Q_(t,c) = pool_{j≠c} q_(t,j)      V_(t,c) = Σ_{j≠c} softmax_j(Q_(t,c)·k_(t,j)/√d) v_(t,j)

    Column `c` sees the spans `(t, c)` of all earlier (bidirectional: other) rows (Combiner, section 4.3).
    O(l·(columns + l/columns)) time and memory.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        columns: length of a grid row; the last row may be partial.
        causal: whether a position sees only itself and what is before it.
        split: whether what is left of the column and what is right of it are two spans, as in the authors' code.
        pools: how the members of a span become its summary query and key.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the joint weights.
    """
    columns = fit(columns, q.shape[1])

    def attend(cells):
        by_column = together(grid.near_in_column(cells), grid.horizontal(cells, pools, split=split))
        return together(grid.near_in_row(cells), turn(by_column, columns)).average()

    return visit_grids(attend, q, k, v, columns=columns, causal=causal, pools=pools, valid=valid, drop=drop)


@register('combiner_axial_horizontal')
class CombinerAxialHorizontalAttention(PooledAttention):
    """Combiner-Axial, horizontal.

    Attributes:
        columns: length of a grid row; None for the power of two that costs least.
        split: whether what is left and what is right of the own column are two spans, as in the authors' code.
    """

    columns: int | None = None
    split: bool = False

    full_support = True

    def pattern(self, length):
        columns = self._columns(length)
        return patterns.combiner_axial_horizontal(length, causal=self.causal, columns=columns, split=self.split)

    def cost(self, length):
        return self._cost(length, self._columns(length), causal=self.causal)

    def attend_pooled(self, pools, q, k, v, **masks):
        sizes = {'columns': self._columns(q.shape[1]), 'split': self.split}
        return attend_combiner_axial_horizontal(q, k, v, causal=self.causal, pools=pools, **sizes, **masks)

    def start(self, x, q, k, v, counts, capacity):
        options = {'columns': self._columns(capacity), 'relations': grid.beside(self.split)}
        return grid_cache.start(q, k, v, counts, capacity, pools=self.pools, **options)

    def step(self, cache, index, x, q, k, v):
        return grid_step.step(cache, index, q, k, v, pools=self.pools, relations=grid.beside(self.split))

    @property
    def _cost(self):
        return partial(costs.combiner_axial_horizontal, split=self.split)

    def _columns(self, length):
        return self.size_or_cheapest(self.columns, self._cost, length)
