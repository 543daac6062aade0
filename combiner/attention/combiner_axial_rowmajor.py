"""Combiner-Axial, row-major: own grid row directly, other rows through one's own column (Combiner, section 4.3)."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from combiner import costs, patterns
from combiner.attention import combiner_axial_rowmajor_cache as rowmajor_cache
from combiner.attention.base import Attention
from combiner.attention.joint import Drop, dot
from combiner.attention.layout import Recent, fit, split
from combiner.attention.registry import register
from combiner.attention.row_summaries import attend_rows, look_along_rows
from combiner.attention.steps import visit_heads
from combiner.layers import parameter


def attend_combiner_axial_rowmajor(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    key: str | Callable[[Array], Array] = 'attended',
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Equation (7) on a grid: direct is the own row (causal: up to `i`), span `(t, c)` is row `t` from column `c`.

        V_(t,c) = Σ_j softmax_j(q_(t,c)·k_(t,j)/√d) v_(t,j)
        K_(t,c) = k_(t,c) (`token`)   or   Σ_j softmax_j(q_(t,c)·k_(t,j)/√d) k_(t,j) (`attended`) or key(V)_(t,c)

    so the token at `(t, c)` asks its row on behalf of everyone below it. O(l·(columns + l/columns)) time and
    memory. The logits inside a row are computed once and serve both the local expectations (all of them) and
    the direct part (causal: a triangle). On a CPU some heads of some sequences are computed at a time (see `steps`).

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        columns: length of a grid row; the last row may be partial.
        causal: whether a position sees only itself and what is before it.
        key: which summary key; a function gets the values `V` of every cell of the grid, also of a partial last row.
        valid: positions that are no padding; padding must hold finite numbers.
        segments: packed documents, each a contiguous run of positions with one number; they do not see each other. A
            token of another segment than the reader's counts as a zero query and key. Not with a function as key.
        drop: dropout of the joint weights.
    """
    if segments is not None and not isinstance(key, str):
        raise ValueError('segments need the summary key token or attended: a function sees tokens of other segments')
    columns = fit(columns, q.shape[1])
    options = {'columns': columns, 'causal': causal, 'key': key, 'drop': drop}
    at_once = drop is not None or not isinstance(key, str)  # what is drawn, and what a function sees, is not by head
    logits = 1 if at_once else q[..., 0].size * (columns + -(-q.shape[1] // columns))
    return visit_heads(partial(attend_rows, **options), logits, q, k, v, valid, segments)


@register('combiner_axial_rowmajor')
class CombinerAxialRowmajorAttention(Attention):
    """Combiner-Axial, row-major.

    Attributes:
        columns: length of a grid row; None for the power of two that costs least.
        key: `token`, `attended`, or `projected`: the authors' language-model setting, which owns parameters,
            `K_(t,c) = W2·LayerNorm(W1·concat_heads(V_(t,c)) + x_(t,c))` with the module's input `x`.
    """

    columns: int | None = None
    key: str = 'attended'

    full_support = packs = True

    def setup(self):
        """Makes the projections, and those of the summary keys."""
        super().setup()
        if self.key == 'projected':
            heads = (self.heads, self.head_width)
            init = nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2)
            axes = ('heads', 'head_dim', 'embed')
            self.span_inner = parameter(self, 'span_inner_kernel', init, axes, (*heads, self.width))
            init, axes = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2)), ('embed', 'heads', 'head_dim')
            self.span_outer = parameter(self, 'span_outer_kernel', init, axes, (self.width, *heads))
            self.span_norm = nn.LayerNorm(dtype=self.dtype)

    @property
    def keeps_documents_apart(self):
        return self.key != 'projected'  # whose keys are made of the values of a whole row

    def pattern(self, length):
        return patterns.combiner_axial_rowmajor(length, causal=self.causal, columns=self._columns(length))

    def cost(self, length):
        return costs.combiner_axial_rowmajor(length, self._columns(length), causal=self.causal)

    def attend(self, q, k, v, **masks):
        if self.key == 'projected':
            raise ValueError(
                f"key='projected' owns parameters: use the Linen module {type(self).__name__}, "
                'or choose token or attended'
            )
        return self._attend(self.key, q, k, v, **masks)

    def attend_from(self, x, q, k, v, **masks):
        return self._attend(self._key(x), q, k, v, **masks)

    def start(self, x, q, k, v, counts, capacity):
        columns = self._columns(capacity)
        tokens = Recent(*(split(a, columns) for a in (q * q.shape[-1] ** -0.5, k, v)))
        own, size = dot('hmqd,hmkd->hmqk', tokens.q, tokens.k), -(-x.shape[1] // columns) * columns
        spans = look_along_rows(own, *tokens[1:], self._key(x), size)
        return rowmajor_cache.start(x, tokens, spans, counts, rows=-(-capacity // columns))

    def step(self, cache, index, x, q, k, v):
        key = self._project_keys if self.key == 'projected' else self.key
        return rowmajor_cache.step(cache, index, x, q * q.shape[-1] ** -0.5, k, v, key)

    def _attend(self, key, q, k, v, **masks):
        options = {'columns': self._columns(q.shape[1]), 'causal': self.causal, 'key': key}
        return attend_combiner_axial_rowmajor(q, k, v, **options, **masks)

    def _key(self, x):
        if self.key != 'projected':
            return self.key
        room = -x.shape[1] % self._columns(x.shape[1])
        return partial(self._project_keys, x=jnp.pad(x, ((0, 0), (0, room), (0, 0))))

    def _project_keys(self, values: Float[Array, '*b h d'], x: Float[Array, '*b e']) -> Float[Array, '*b h d']:
        inner = jnp.einsum('...hd,hde->...e', values, self.span_inner.astype(values.dtype)) + x
        return jnp.einsum('...e,ehd->...hd', self.span_norm(inner), self.span_outer.astype(values.dtype))

    def _columns(self, length):
        return self.size_or_cheapest(self.columns, costs.combiner_axial_rowmajor, length)
