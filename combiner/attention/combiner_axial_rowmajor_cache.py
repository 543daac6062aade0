"""Incremental decoding of `combiner_axial_rowmajor`: O(columns + rows) work for a token.

The summary of row `t` through column `c` is first needed at `(t + 1, c)`, so it is computed there: one for each token.
Letters: as in `layout`, and `e` model width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.attention.joint import dot, joint_exp, masked, softmax
from combiner.attention.layout import Recent, Summary, by_sequence, split

SpanKey = str | Callable[[Float[Array, 'h d'], Float[Array, ' e']], Float[Array, 'h d']]


class Cache(NamedTuple):
    """The open row and the row above it, the even one first, and the summaries of all rows above: O(l)."""

    x: Float[Array, 'b 2 c e']
    recent: Recent
    spans: Summary


def start(x: Float[Array, 'b l e'], tokens: Recent, spans: Summary, counts: Int[Array, ' b'], rows: int) -> Cache:
    """The cache after `counts` positions, with room for `rows` rows.

    Args:
        x: input of the module.
        tokens: queries (scaled), keys and values by row, as `split` gives them.
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
        return jnp.take_along_axis(by_sequence(a, given), kept, axis=2)

    room = ((0, 0), (0, 0), (0, rows - given), (0, 0), (0, 0))
    return Cache(
        last_two(split(x[:, :, None], columns))[:, 0],
        jax.tree.map(last_two, tokens),
        jax.tree.map(lambda a: jnp.pad(by_sequence(a, given), room), spans),
    )


def step(
    cache: Cache,
    index: Int[Array, ' b'],
    x: Float[Array, 'b e'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    key: SpanKey,
) -> tuple[Cache, Float[Array, 'b h d']]:
    """One token of each sequence, at position `index`, with `q` scaled.

    The summary key is `token`, `attended` or a function of a row's local expectation and of its token's `x`.
    """
    return jax.vmap(partial(_step, key=key))(cache, index, x, q, k, v)


def _step(cache, index, x, q, k, v, key):
    columns, rows = cache.x.shape[1], cache.spans.key.shape[1]
    row, column = jnp.divmod(index, columns)
    here, above = row % 2, 1 - row % 2
    recent_x = cache.x.at[here, column].set(x)
    recent = jax.tree.map(lambda held, new: held.at[:, here, column].set(new), cache.recent, Recent(q, k, v))

    local = softmax(dot('hd,hcd->hc', recent.q[:, above, column], recent.k[:, above])).astype(v.dtype)
    span_v = dot('hc,hcd->hd', local, recent.v[:, above]).astype(v.dtype)
    if not isinstance(key, str):
        span_k = key(span_v, recent_x[above, column])
    elif key == 'token':
        span_k = recent.k[:, above, column]
    else:
        span_k = dot('hc,hcd->hd', local, recent.k[:, above]).astype(k.dtype)
    row_above = (row - 1) % rows  # in row 0 the last row's place, which nothing ever reads
    new = Summary(span_k, span_v)
    spans = jax.tree.map(lambda held, one: held.at[:, row_above, column].set(one), cache.spans, new)

    own = masked(dot('hd,hcd->hc', q, recent.k[:, here]), jnp.arange(columns) <= column)
    far = masked(dot('hd,hnd->hn', q, spans.key[:, :, column]), jnp.arange(rows) < row)
    (own, far), total = joint_exp(own, far)
    attended = dot('hc,hcd->hd', own.astype(v.dtype), recent.v[:, here])
    attended += dot('hn,hnd->hd', far.astype(v.dtype), spans.value[:, :, column])
    return Cache(recent_x, recent, spans), (attended / total).astype(v.dtype)
