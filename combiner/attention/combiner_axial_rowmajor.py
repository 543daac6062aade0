"""Combiner-Axial, row-major: own grid row directly, other rows through one's own column (Combiner, section 4.3).

Decoding takes O(columns + rows) work for a token. The summary of row `t` through column `c` is first needed at
`(t + 1, c)`, so it is computed there: one for each token.

Letters: as in `ops.blocks`, and `e` model width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from combiner import reference
from combiner.core.module import Attention
from combiner.core.registry import register
from combiner.costs import own_block_and_others
from combiner.layers import parameter
from combiner.ops.blocks import (
    KeyGroup,
    Recent,
    attend_one,
    block_segment_ids,
    blocks_by_sequence,
    clip_size,
    merge_blocks,
    own_mask,
    scale_queries,
    split_blocks,
    transpose_grid,
)
from combiner.ops.chunking import map_heads
from combiner.ops.segments import same_segment
from combiner.ops.softmax import Drop, einsum, joint_softmax, mask_logits, softmax
from combiner.ops.summaries import summary_masks
from combiner.patterns import NO_ANCHOR, Cost, Pattern, check_positive, support, with_spans


def pattern(length: int, *, causal: bool, columns: int) -> Pattern:
    """Combiner-Axial, row-major (section 4.3): own row directly, earlier (bidirectional: other) rows from column `c`.

    A row is one set of members but has as many summaries as columns: span `(t, c)` is row `t` seen through
    its token at column `c`, which is its anchor. In a partial last row an anchor may be missing; a missing or
    padded anchor counts as a zero query and, for `token` keys, a zero key: this project's choice, so that
    padding never changes a result.
    """
    check_positive(length=length, columns=columns)
    row, column = np.divmod(np.arange(length), columns)
    rows = row[-1] + 1
    span_row, span_column = np.divmod(np.arange(rows * columns), columns)
    spans = span_row[:, None] == row
    visible = span_row < row[:, None] if causal else span_row != row[:, None]
    anchors = np.where(np.arange(rows * columns) < length, np.arange(rows * columns), NO_ANCHOR)
    direct = (row[:, None] == row) & support(length, causal=causal)
    return with_spans(direct, spans, visible & (span_column == column[:, None]), anchors)


def cost(length: int, columns: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`: `O(l (columns + l / columns))`."""
    terms = own_block_and_others(length, columns, causal=causal)
    whole, rest = divmod(length, columns)
    rows = whole + (rest > 0)
    if rows == 1:
        return Cost(terms, 0)
    if causal:
        used_of_last_but_one = rest or columns
        return Cost(terms, ((rows - 2) * columns + used_of_last_but_one) * columns)
    return Cost(terms, 2 * (rest or columns) * columns if rows == 2 else length * columns)


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
    the direct part (causal: a triangle). On a CPU some heads of some sequences are computed at a time.

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
    columns = clip_size(columns, q.shape[1])
    attend = partial(attend_rows, columns=columns, causal=causal, key=key, drop=drop)
    at_once = drop is not None or not isinstance(key, str)  # what is drawn, and what a function sees, is not by head
    return map_heads(attend, q, k, v, valid, segments, keys=columns + -(-q.shape[1] // columns), at_once=at_once)


def attend_rows(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    valid: Bool[Array, 'b l'] | None,
    segments: Int[Array, 'b l'] | None,
    *,
    columns: int,
    causal: bool,
    key: str | Callable[[Array], Array],
    drop: Drop | None,
) -> Float[Array, 'b l h d']:
    """`attend_combiner_axial_rowmajor`, all at once."""
    batch, length = q.shape[:2]
    segment_ids = block_segment_ids(batch, length, columns, causal=causal, valid=valid, segments=segments)
    q, k, v = (split_blocks(x, columns) for x in (scale_queries(q), k, v))
    rows = q.shape[1] // batch
    masks = summary_masks(segment_ids, batch=batch, blocks=rows, causal=causal, packed=segments is not None)
    own = einsum('hmqd,hmkd->hmqk', q, k)
    spans = [summarise_rows(own, k, v, key, rows * columns, mask.members) for mask in masks]
    span_k = jnp.concatenate([transpose_grid(span.k, rows) for span in spans], axis=2)
    span_v = jnp.concatenate([transpose_grid(span.v, rows) for span in spans], axis=2)

    far = transpose_grid(einsum('hknd,hkrd->hknr', transpose_grid(q, rows), span_k), columns)
    far = mask_logits(far, jnp.concatenate([mask.visible for mask in masks], axis=-1))
    own = mask_logits(own, same_segment(segment_ids, segment_ids, own_mask(columns, causal=causal)))
    own, far = (group if drop is None else drop(group) for group in joint_softmax(own, far))
    attended = einsum('hmqk,hmkd->hmqd', own.astype(v.dtype), v)
    from_rows = einsum('hknr,hkrd->hknd', transpose_grid(far.astype(v.dtype), rows), span_v)
    return merge_blocks((attended + transpose_grid(from_rows, columns)).astype(v.dtype), length)


def summarise_rows(
    own: Float[Array, 'h m c c'],
    k: Float[Array, 'h m c d'],
    v: Float[Array, 'h m c d'],
    key: str | Callable[[Array], Array],
    size: int,
    members: Bool[Array, 'm c'] | None = None,
) -> KeyGroup:
    """Summarises the `members` of every row for each cell of its grid of `size` cells, `h m c d`.

    `own` are the logits inside rows. A cell that is no member counts as a zero query and a zero key.
    """
    if members is not None:
        own, k = jnp.where(members[..., None], own, 0), jnp.where(members[..., None], k, 0)
    local = softmax(mask_logits(own, None if members is None else members[:, None])).astype(v.dtype)
    span_v = einsum('hmqk,hmkd->hmqd', local, v).astype(v.dtype)
    if key == 'token':
        return KeyGroup(k, span_v)
    if key == 'attended':
        return KeyGroup(einsum('hmqk,hmkd->hmqd', local, k).astype(k.dtype), span_v)
    if not isinstance(key, str):
        return KeyGroup(split_blocks(key(merge_blocks(span_v, size)), k.shape[2]), span_v)
    raise ValueError(f'unknown summary key {key!r}; choose {", ".join(reference.KEYS)} or, in a module, projected')


SpanKey = str | Callable[[Float[Array, 'h d'], Float[Array, ' e']], Float[Array, 'h d']]


class Cache(NamedTuple):
    """The open row and the row above it, the even one first, and the summaries of all rows above: O(l)."""

    x: Float[Array, 'b 2 c e']
    recent: Recent
    spans: KeyGroup


def init_cache(x: Float[Array, 'b l e'], tokens: Recent, spans: KeyGroup, counts: Int[Array, ' b'], rows: int) -> Cache:
    """The cache after `counts` positions, with room for `rows` rows.

    Args:
        x: input of the module.
        tokens: queries, not scaled, keys and values by row, as `split_blocks` gives them.
        spans: the summaries of all given rows.
        counts: how many positions of each sequence are there.
        rows: rows of the longest sequence.
    """
    columns = tokens.q.shape[2]
    given = -(-x.shape[1] // columns)
    open_row = counts[:, None] // columns
    kept = open_row - (open_row - jnp.arange(2)) % 2
    kept = jnp.clip(kept, 0, given - 1)[:, None, :, None, None]

    def last_two(a: Float[Array, 'h m c d']) -> Float[Array, 'b h 2 c d']:
        return jnp.take_along_axis(blocks_by_sequence(a, given), kept, axis=2)

    room = ((0, 0), (0, 0), (0, rows - given), (0, 0), (0, 0))
    return Cache(
        last_two(split_blocks(x[:, :, None], columns))[:, 0],
        jax.tree.map(last_two, tokens),
        jax.tree.map(lambda a: jnp.pad(blocks_by_sequence(a, given), room), spans),
    )


def decode_step(
    cache: Cache,
    index: Int[Array, ' b'],
    x: Float[Array, 'b e'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    key: SpanKey,
) -> tuple[Cache, Float[Array, 'b h d']]:
    """One token of each sequence, at position `index`; `q` is not scaled.

    The summary key is `token`, `attended` or a function of a row's local expectation and of its token's `x`.
    """
    return jax.vmap(partial(_decode_one, key=key))(cache, index, x, q, k, v)


def _decode_one(cache, index, x, q, k, v, key):
    columns, rows = cache.x.shape[1], cache.spans.k.shape[1]
    row, column = jnp.divmod(index, columns)
    here, above = row % 2, 1 - row % 2
    recent_x = cache.x.at[here, column].set(x)
    recent = jax.tree.map(lambda held, new: held.at[:, here, column].set(new), cache.recent, Recent(q, k, v))

    asking = scale_queries(recent.q[:, above, column])
    local = softmax(einsum('hd,hcd->hc', asking, recent.k[:, above])).astype(v.dtype)
    span_v = einsum('hc,hcd->hd', local, recent.v[:, above]).astype(v.dtype)
    if not isinstance(key, str):
        span_k = key(span_v, recent_x[above, column])
    elif key == 'token':
        span_k = recent.k[:, above, column]
    else:
        span_k = einsum('hc,hcd->hd', local, recent.k[:, above]).astype(k.dtype)
    row_above = (row - 1) % rows  # in row 0 the last row's place, which nothing ever reads
    new = KeyGroup(span_k, span_v)
    spans = jax.tree.map(lambda held, one: held.at[:, row_above, column].set(one), cache.spans, new)

    own = KeyGroup(recent.k[:, here], recent.v[:, here], jnp.arange(columns) <= column)
    others = KeyGroup(spans.k[:, :, column], spans.v[:, :, column], jnp.arange(rows) < row)
    return Cache(recent_x, recent, spans), attend_one(q, own, others)


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

    full_support = supports_segments = True

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
    def segments_supported(self):
        return self.key != 'projected'  # whose keys are made of the values of a whole row

    def pattern(self, length):
        return pattern(length, causal=self.causal, columns=self._columns(length))

    def cost(self, length):
        return cost(length, self._columns(length), causal=self.causal)

    def attend(self, q, k, v, **masks):
        if self.key == 'projected':
            raise ValueError(
                f"key='projected' owns parameters: use the Linen module {type(self).__name__}, "
                'or choose token or attended'
            )
        return self._attend(self.key, q, k, v, **masks)

    def attend_from(self, x, q, k, v, **masks):
        return self._attend(self._key(x), q, k, v, **masks)

    def init_cache(self, x, q, k, v, counts, capacity):
        columns = self._columns(capacity)
        tokens = Recent(*(split_blocks(a, columns) for a in (q, k, v)))
        own, size = einsum('hmqd,hmkd->hmqk', scale_queries(tokens.q), tokens.k), -(-x.shape[1] // columns) * columns
        spans = summarise_rows(own, *tokens[1:], self._key(x), size)
        return init_cache(x, tokens, spans, counts, rows=-(-capacity // columns))

    def decode_step(self, cache, index, x, q, k, v):
        key = self._project_keys if self.key == 'projected' else self.key
        return decode_step(cache, index, x, q, k, v, key)

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
        return self.size_or_cheapest(self.columns, cost, length)
