"""Combiner-Axial, vertical: own grid row and column directly, every other column above as a span (section 4.3)."""

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
    """Equation (7) on a grid: direct are the own row and column, span `(r, c)` is column `c` above row `r`.

        Q_(r,c) = pool_{t<r} q_(t,c)      V_(r,c) = Σ_{t<r} softmax_t(Q_(r,c)·k_(t,c)/√d) v_(t,c)

    Row `r` sees the spans `(r, c)` of all columns but its query's own. When bidirectional, the rest of the column
    below row `r` is one more span of each column. O(l·(columns + l/columns)) time and memory.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        columns: length of a grid row; the last row may be partial.
        causal: whether a position sees only itself and what is before it.
        pools: how the members of a span become its summary query and key.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the joint weights.
    """
    columns = fit(columns, q.shape[1])

    def attend(cells):
        in_column = turn(grid.near_in_column(cells), columns)
        return together(grid.near_in_row(cells), in_column, grid.vertical(cells, pools)).average()

    return visit_grids(attend, q, k, v, columns=columns, causal=causal, pools=pools, valid=valid, drop=drop)


@register('combiner_axial_vertical')
class CombinerAxialVerticalAttention(PooledAttention):
    """Combiner-Axial, vertical; `columns` is the length of a grid row, None for the power of two that costs least."""

    columns: int | None = None

    full_support = True

    def pattern(self, length):
        return patterns.combiner_axial_vertical(length, causal=self.causal, columns=self._columns(length))

    def cost(self, length):
        return costs.combiner_axial_vertical(length, self._columns(length), causal=self.causal)

    def attend_pooled(self, pools, q, k, v, **masks):
        columns = self._columns(q.shape[1])
        return attend_combiner_axial_vertical(q, k, v, columns=columns, causal=self.causal, pools=pools, **masks)

    def start(self, x, q, k, v, counts, capacity):
        columns = self._columns(capacity)
        return grid_cache.start(q, k, v, counts, capacity, columns=columns, pools=self.pools, vertical=True)

    def step(self, cache, index, x, q, k, v):
        return grid_step.step(cache, index, q, k, v, pools=self.pools)

    def _columns(self, length):
        return self.size_or_cheapest(self.columns, costs.combiner_axial_vertical, length)
