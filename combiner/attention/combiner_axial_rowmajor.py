"""Combiner-Axial, row-major: own grid row directly, other rows through the own column (Combiner, section 4.3).

Decoding takes O(columns + rows) work for a token. The summary of row `t` through column `c` is first needed at
`(t + 1, c)` and is computed there: one for each token.

Letters: as in `ops.blocks`, and `k = b·c` columns of all grids, `r` summaries that a column shares, `e` model width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from combiner import reference
from combiner.core.mechanism import Context, Mechanism
from combiner.core.registry import register
from combiner.costs import own_block_and_others
from combiner.kernels.choice import Implementation
from combiner.kernels.tpu.rowmajor.mechanism import ROWMAJOR
from combiner.layers import layer_norm, parameters
from combiner.ops import parts
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
from combiner.ops.spans import summary_masks
from combiner.patterns import NO_ANCHOR, Cost, Pattern, check_positive, support, with_spans

KEYS = (*reference.KEYS, 'projected')


def pattern(length: int, *, causal: bool, columns: int) -> Pattern:
    """Returns the pattern: own row directly, earlier (bidirectional: other) rows through column `c` (section 4.3).

    A row is one set of members but has as many summaries as columns. Span `(t, c)` is row `t` summarised by its token
    at column `c`, its anchor. In a partial last row an anchor may be missing. A missing or padded anchor counts as a
    zero query and, for `token` keys, a zero key: this project's choice, so that padding never changes a result.
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
    """Returns `pattern(…).cost()` in closed form: `O(l (columns + l / columns))`."""
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
    """Attends by equation (7) on a grid: directly within the own row (causal: up to `i`), to row `t` by span `(t, c)`.

        V_(t,c) = Σ_j softmax_j(q_(t,c)·k_(t,j)/√d) v_(t,j)
        K_(t,c) = k_(t,c) (`token`)   or   Σ_j softmax_j(q_(t,c)·k_(t,j)/√d) k_(t,j) (`attended`) or key(V)_(t,c)

    The token at `(t, c)` summarises its row for all positions of its column below. O(l·(columns + l/columns)) time and
    memory. The logits inside a row are computed once. The local expectations use all of them, the direct part too
    (causal: a triangle). On a CPU some heads of some sequences are computed at a time.

    Args:
        columns: length of a grid row; the last row may be partial.
        key: kind of summary key; a function takes the values `V` of every cell of the grid, also of a partial last row.
        segments: a token of another segment than the query's counts as a zero query and key. Not with a function as
            key.
        q, k, v, causal, valid, segments, drop: see `core.mechanism`.
    """
    if segments is not None and not isinstance(key, str):
        raise ValueError('segments need the summary key token or attended: a function sees tokens of other segments')
    length = q.shape[1]
    columns = clip_size(columns, length)
    rows = -(-length // columns)

    def attend(q: Array, k: Array, v: Array, valid: Array | None, segments: Array | None) -> Array:
        """Attends for some heads of some sequences."""
        batch = len(q)
        segment_ids = block_segment_ids(batch, length, columns, causal=causal, valid=valid, segments=segments)
        masks = summary_masks(segment_ids, batch=batch, blocks=rows, causal=causal, packed=segments is not None)
        q, k, v = (split_blocks(x, columns) for x in (scale_queries(q), k, v))
        direct = einsum('hmcd,hmsd->hmcs', q, k)
        spans = [summarise_rows(direct, k, v, key, rows * columns, mask.members) for mask in masks]
        span_k = jnp.concatenate([parts.gather(transpose_grid(span.k, rows), 2) for span in spans], axis=2)
        span_v = jnp.concatenate([parts.gather(transpose_grid(span.v, rows), 2) for span in spans], axis=2)

        in_column = einsum('hknd,hkrd->hknr', transpose_grid(q, rows), span_k)
        visible = jnp.concatenate([mask.visible for mask in masks], axis=-1)
        others = mask_logits(transpose_grid(in_column, columns), visible)
        direct = mask_logits(direct, same_segment(segment_ids, segment_ids, own_mask(columns, causal=causal)))
        direct, others = (weights if drop is None else drop(weights) for weights in joint_softmax(direct, others))
        in_row = einsum('hmcs,hmsd->hmcd', direct.astype(v.dtype), v)
        in_column = einsum('hknr,hkrd->hknd', transpose_grid(others.astype(v.dtype), rows), span_v)
        return merge_blocks((in_row + transpose_grid(in_column, columns)).astype(v.dtype), length)

    at_once = drop is not None or not isinstance(key, str)  # dropout and functions act on all heads
    return map_heads(attend, q, k, v, valid, segments, keys=columns + rows, at_once=at_once)


def summarise_rows(
    logits: Float[Array, 'h m c c'],
    k: Float[Array, 'h m c d'],
    v: Float[Array, 'h m c d'],
    key: str | Callable[[Array], Array],
    size: int,
    members: Bool[Array, 'm c'] | None = None,
) -> KeyGroup:
    """Summarises every row once for each of its cells, `h m c d`; only its `members`, if given.

    Args:
        logits: of the cells of a row for each other.
        k: keys.
        v: values.
        key: see `attend_combiner_axial_rowmajor`.
        size: cells of a grid.
        members: cells to summarise; a cell that is no member counts as a zero query and a zero key.
    """
    if members is not None:
        logits, k = jnp.where(members[..., None], logits, 0), jnp.where(members[..., None], k, 0)
    local = softmax(mask_logits(logits, None if members is None else members[:, None])).astype(v.dtype)
    span_v = einsum('hmcs,hmsd->hmcd', local, v).astype(v.dtype)
    if key == 'token':
        return KeyGroup(k, span_v)
    if key == 'attended':
        return KeyGroup(einsum('hmcs,hmsd->hmcd', local, k).astype(k.dtype), span_v)
    if not isinstance(key, str):
        return KeyGroup(split_blocks(key(merge_blocks(span_v, size)), k.shape[2]), span_v)
    raise ValueError(f'unknown summary key {key!r}; choose {", ".join(reference.KEYS)} or, in a module, projected')


def project_keys(
    values: Float[Array, '*b h d'], x: Float[Array, '*b e'], variables: Mapping[str, Array]
) -> Float[Array, '*b h d']:
    """Returns `W2·LayerNorm(W1·concat_heads(V) + x)`: the summary keys of the authors' language models."""
    inner = jnp.einsum('...hd,hde->...e', values, variables['span_inner_kernel'].astype(values.dtype)) + x
    normal = layer_norm(inner, variables['span_norm_scale'], variables['span_norm_bias'])
    return jnp.einsum('...e,ehd->...hd', normal, variables['span_outer_kernel'].astype(values.dtype))


SpanKey = str | Callable[[Float[Array, 'h d'], Float[Array, ' e']], Float[Array, 'h d']]


class Cache(NamedTuple):
    """The open row and the row above it, the even row first, and the summaries of all rows above: O(l).

    `x` is the module's input, which only a function as summary key reads; None for other keys.
    """

    x: Float[Array, 'b 2 c e'] | None
    recent: Recent
    spans: KeyGroup


def init_cache(
    x: Float[Array, 'b l e'] | None, tokens: Recent, spans: KeyGroup, counts: Int[Array, ' b'], rows: int
) -> Cache:
    """Returns the cache after `counts` positions, with room for `rows` rows.

    Args:
        x: input of the module; None unless the summary key is a function.
        tokens: queries, not scaled, keys and values by row, from `split_blocks`.
        spans: the summaries of all given rows.
        counts: number of cached positions of each sequence.
        rows: rows of the longest sequence.
    """
    _, blocks, columns, _ = tokens.q.shape
    given = blocks // len(counts)
    open_row = counts[:, None] // columns
    kept = open_row - (open_row - jnp.arange(2)) % 2
    kept = jnp.clip(kept, 0, given - 1)[:, None, :, None, None]

    def last_two(a: Float[Array, 'h m c d']) -> Float[Array, 'b h 2 c d']:
        return jnp.take_along_axis(blocks_by_sequence(a, given), kept, axis=2)

    room = ((0, 0), (0, 0), (0, rows - given), (0, 0), (0, 0))
    return Cache(
        None if x is None else last_two(split_blocks(x[:, :, None], columns))[:, 0],
        jax.tree.map(last_two, tokens),
        jax.tree.map(lambda a: jnp.pad(blocks_by_sequence(a, given), room), spans),
    )


def decode_step(
    cache: Cache,
    index: Int[Array, ' b'],
    x: Float[Array, 'b e'] | None,
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    key: SpanKey,
) -> tuple[Cache, Float[Array, 'b h d']]:
    """Decodes one token of each sequence, at position `index`; `q` is not scaled.

    The summary key is `token`, `attended` or a function of a row's local expectation and of its token's `x`, which is
    None for the first two.
    """
    return jax.vmap(partial(_decode_one, key=key))(cache, index, x, q, k, v)


def _decode_one(cache, index, x, q, k, v, key):
    columns, rows = cache.recent.k.shape[2], cache.spans.k.shape[1]
    row, column = jnp.divmod(index, columns)
    here, above = row % 2, 1 - row % 2
    recent_x = jax.tree.map(lambda held, new: held.at[here, column].set(new), cache.x, x)
    recent = jax.tree.map(lambda held, new: held.at[:, here, column].set(new), cache.recent, Recent(q, k, v))

    local_q = scale_queries(recent.q[:, above, column])
    local = softmax(einsum('hd,hcd->hc', local_q, recent.k[:, above])).astype(v.dtype)
    span_v = einsum('hc,hcd->hd', local, recent.v[:, above]).astype(v.dtype)
    if not isinstance(key, str):
        span_k = key(span_v, recent_x[above, column])
    elif key == 'token':
        span_k = recent.k[:, above, column]
    else:
        span_k = einsum('hc,hcd->hd', local, recent.k[:, above]).astype(k.dtype)
    row_above = (row - 1) % rows  # in row 0: the last row's slot, which is never read
    new = KeyGroup(span_k, span_v)
    spans = jax.tree.map(lambda held, one: held.at[:, row_above, column].set(one), cache.spans, new)

    own = KeyGroup(recent.k[:, here], recent.v[:, here], jnp.arange(columns) <= column)
    others = KeyGroup(spans.k[:, :, column], spans.v[:, :, column], jnp.arange(rows) < row)
    return Cache(recent_x, recent, spans), attend_one(q, own, others)


@register('combiner_axial_rowmajor')
class CombinerAxialRowmajor(Mechanism):
    """Combiner-Axial, row-major.

    Attributes:
        columns: length of a grid row; None for the cheapest power of two.
        key: `token`, `attended`, or `projected`: the authors' language-model setting, which has parameters,
            `K_(t,c) = W2·LayerNorm(W1·concat_heads(V_(t,c)) + x_(t,c))` with the module's input `x`.
        implementation: see `kernels.choice`.
    """

    columns: int | None = None
    key: Annotated[str, KEYS] = 'attended'
    implementation: str | None = None

    full_support = True
    supports_segments = True
    supports_context = True
    implementations = {  # noqa: RUF012
        'mosaic': ROWMAJOR,
        'xla': Implementation(attend_combiner_axial_rowmajor),
    }

    def __post_init__(self) -> None:
        """Marks what projected keys, made of the values of all heads in a whole row, do not support."""
        super().__post_init__()
        for feature in ('supports_segments', 'supports_context'):
            object.__setattr__(self, feature, self.key != 'projected')

    def variables(self, module):
        """Makes the projections of projected summary keys."""
        if self.key != 'projected':
            return {}
        heads, embed = (('heads', module.heads), ('head_dim', module.head_width)), ('embed', module.width)
        made = {
            'span_inner_kernel': (nn.initializers.lecun_normal(in_axis=(0, 1), out_axis=2), (*heads, embed)),
            'span_outer_kernel': (nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2)), (embed, *heads)),
            'span_norm_scale': (nn.initializers.ones, (embed,)),
            'span_norm_bias': (nn.initializers.zeros, (embed,)),
        }
        return parameters(module, made)

    def pattern(self, length):
        return pattern(length, causal=self.causal, columns=self._columns(length))

    def cost(self, length):
        return cost(length, self._columns(length), causal=self.causal)

    def attend(self, q, k, v, context):
        columns, key = self._columns(q.shape[1]), self._key_of_grid(context)
        return self.attend_by_best(q, k, v, context, columns=columns, key=key)

    def init_cache(self, q, k, v, context, counts, capacity):
        columns = self._columns(capacity)
        tokens = Recent(*(split_blocks(a, columns) for a in (q, k, v)))
        logits = einsum('hmcd,hmsd->hmcs', scale_queries(tokens.q), tokens.k)
        size = -(-q.shape[1] // columns) * columns
        spans = summarise_rows(logits, tokens.k, tokens.v, self._key_of_grid(context), size)
        return init_cache(self._input_of_key(context), tokens, spans, counts, rows=-(-capacity // columns))

    def decode_step(self, cache, index, q, k, v, context):
        return decode_step(cache, index, self._input_of_key(context), q, k, v, self._key(context))

    def _input_of_key(self, context: Context) -> Array | None:
        """Returns the input of the module if summary keys are made of it."""
        return context.x if self.key == 'projected' else None

    def _key(self, context: Context) -> SpanKey:
        """Returns the summary key; projected, a function of a row's local expectation and of its token's `x`.

        Raises:
            ValueError: it is projected, and the context has no parameters.
        """
        if self.key != 'projected':
            return self.key
        if not context.variables:
            raise ValueError(
                f"key='projected' owns parameters: use the Linen module combiner.Attention({type(self).__name__}(…), "
                'width=…, heads=…), or choose token or attended'
            )
        return partial(project_keys, variables=context.variables)

    def _key_of_grid(self, context: Context) -> str | Callable[[Array], Array]:
        """Returns the summary key; projected, a function of the local expectations of all cells of a grid."""
        key, x = self._key(context), context.x
        if isinstance(key, str):
            return key
        cells = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self._columns(x.shape[1])), (0, 0)))
        return lambda values: key(values, cells)

    def context_block(self, length, parts):
        return self._columns(length)

    def _columns(self, length):
        return self.size_or_cheapest(self.columns, cost, length)
