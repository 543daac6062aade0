"""Sparse axial attention: own row and own column of a grid (Ho et al. 2019)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.core.module import Attention
from combiner.core.registry import register
from combiner.costs import own_row_and_column
from combiner.ops.blocks import fit, label, mask_own, merge, split, transpose_grid
from combiner.ops.grid import BEFORE, OTHERS, turn_labels
from combiner.ops.kv_cache import start_all, step_to
from combiner.ops.segments import of_same
from combiner.ops.softmax import Drop, dot, joint_exp, masked
from combiner.patterns import Cost, Pattern, grid_support, sparse


def pattern(length: int, *, causal: bool, columns: int) -> Pattern:
    """Sparse axial attention (Ho et al. 2019): own row and own column of a grid with `columns` columns."""
    return sparse(grid_support(length, columns, causal=causal)[0])


def cost(length: int, columns: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`."""
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
    """One softmax over the own row and the own column of a grid (causal: `j ≤ i`).

    O(l·(columns + l/columns)) time and memory.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        columns: length of a grid row; the last row may be partial.
        causal: whether a position sees only itself and what is before it.
        valid: positions that are no padding; padding must hold finite numbers.
        segments: packed documents; they do not see each other.
        drop: dropout of the weights.
    """
    batch, length = q.shape[:2]
    columns = fit(columns, length)
    labels = label(batch, length, columns, causal=causal, valid=valid, segments=segments)
    q, k, v = (split(x, columns) for x in (q * q.shape[-1] ** -0.5, k, v))
    rows = q.shape[1] // batch
    column_q, column_k, column_v = (transpose_grid(x, rows) for x in (q, k, v))

    in_row = mask_own(dot('hmqd,hmkd->hmqk', q, k), causal=causal, inside=None, segments=labels)
    turned = None if labels is None else turn_labels(labels, rows)
    seen = of_same(turned, turned, (BEFORE if causal else OTHERS).members(None, rows))
    in_column = transpose_grid(masked(dot('hknd,hkrd->hknr', column_q, column_k), seen), columns)

    (in_row, in_column), total = joint_exp(in_row, in_column, drop=drop)
    attended = dot('hmqk,hmkd->hmqd', in_row.astype(v.dtype), v)
    from_columns = dot('hknr,hkrd->hknd', transpose_grid(in_column.astype(v.dtype), rows), column_v)
    return merge(((attended + transpose_grid(from_columns, columns)) / total).astype(v.dtype), length)


@register('axial')
class AxialAttention(Attention):
    """Sparse axial attention; `columns` None for the power of two that costs least."""

    columns: int | None = None

    packs = True

    def pattern(self, length):
        return pattern(length, causal=self.causal, columns=self._columns(length))

    def cost(self, length):
        return cost(length, self._columns(length), causal=self.causal)

    def attend(self, q, k, v, **masks):
        return attend_axial(q, k, v, columns=self._columns(q.shape[1]), causal=self.causal, **masks)

    def start(self, x, q, k, v, counts, capacity):
        return start_all(k, v, capacity)

    def step(self, cache, index, x, q, k, v):
        capacity = cache.k.shape[2]
        columns, here = self._columns(capacity), index[:, None]
        in_row = here // columns * columns + jnp.arange(columns)
        above = here % columns + jnp.arange(-(-capacity // columns)) * columns
        seen = jnp.concatenate([in_row <= here, above < in_row[:, :1]], axis=1)
        return step_to(cache, index, q, k, v, jnp.concatenate([in_row, above], axis=1), seen)

    def _columns(self, length):
        return self.size_or_cheapest(self.columns, cost, length)
