"""Kernel attention over packed documents: sums that begin anew with each (see `kernel_attention`).

A document is a contiguous run of positions. So of what is before a chunk of positions, they can share only the document
that is open at its end, and of what is after it, only the one at its beginning.

Letters: as in `kernel_attention`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from combiner.attention.folds import NOBODY, edge, label, of_same
from combiner.attention.joint import dot, roomy
from combiner.attention.layout import fit, flatten, merge, split
from combiner.attention.steps import divide, visit
from combiner.baselines.feature_kernels import Kernel, State, nothing_like, plus, quotient, summed


class Open(NamedTuple):
    """The sums over one document so far, and its label (see `folds`): of every chunk, chunks first."""

    sums: State
    label: Int[Array, '*m']


def attend_documents(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    kernel: Kernel,
    *,
    chunk: int,
    causal: bool,
    segments: Int[Array, 'b l'],
    valid: Bool[Array, 'b l'] | None = None,
) -> Float[Array, 'b l h d']:
    """As `kernel_attention.attend_kernel`, over the `j` of the document of `i`; O(l·f·(d + chunk)) time in any case.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        kernel: the feature maps.
        chunk: positions that are computed at once. The result does not depend on it.
        causal: whether a position sees only itself and what is before it.
        segments: packed documents, each a contiguous run of positions with one number; they do not see each other.
        valid: positions that are no padding; padding must hold finite numbers.
    """
    batch, length, heads, width = q.shape
    chunk = fit(chunk, length)
    labels = label(batch, length, chunk, causal=causal, valid=valid, segments=segments)
    q, k, v = (flatten(x, chunk) for x in (q, k, v))
    chunks = len(q) // (batch * chunk)
    steps = divide(len(q) * heads * (2 * kernel.size + chunk), chunks)

    def collect(k, v, labels):
        """The sums over the last document of each of some chunks, and (bidirectional) over the first."""
        k, v = (split(x[None], chunk) for x in (k, v))
        found = []
        for last in (True,) if causal else (True, False):
            shared = edge(labels, last=last)
            sums = summed(kernel, k, v, (labels == shared[:, None]) & (labels != NOBODY))
            found.append(Open(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), sums), shared))
        return found

    def attend(q, k, v, labels, around):
        """The attended values of some chunks."""
        q, k, v = (split(x[None], chunk) for x in (q, k, v))
        around = [one._replace(sums=jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), one.sums)) for one in around]
        return merge(_attend_chunks(kernel, q, k, v, labels, around, causal=causal), q.shape[1] * chunk)[0]

    ends = visit(collect, steps, batch, k, v, labels)
    around = [_reaching(one, batch, reverse=reverse) for one, reverse in zip(ends, (False, True), strict=False)]
    attended = visit(attend, steps, batch, q, k, v, labels, around)
    return attended.reshape(batch, -1, heads, width)[:, :length]


def _reaching(ends: Open, batch: int, *, reverse: bool) -> Open:
    """The document that is open where each chunk begins (`reverse`: ends), with its sums over all other chunks."""

    def follow(past: Open, one: Open) -> Open:
        """What is open after one more chunk."""
        goes_on = (one.label == past.label) | (one.label == NOBODY)
        kept = (jnp.where(_expand(goes_on, x), x, y) for x, y in zip(past.sums, nothing_like(past.sums), strict=True))
        return Open(plus(State(*kept), one.sums), jnp.where(goes_on, past.label, one.label))

    in_order = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 0), ends)
    first = jax.tree.map(lambda x: x[0], in_order)
    nothing = Open(nothing_like(first.sums), jnp.full_like(first.label, NOBODY))
    _, before = lax.scan(lambda past, one: (follow(past, one), past), nothing, in_order, reverse=reverse)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), before)


def _attend_chunks(kernel, q, k, v, labels, around: list[Open], *, causal: bool) -> Float[Array, 'h m c d']:
    """Attention of every chunk to its own positions and to the sums `around` it, each of the query's own document."""
    kind = roomy(v.dtype)
    query = kernel.query(q).astype(kind)
    features, log = kernel.keys(k, labels != NOBODY)
    size = q.shape[2]
    own = of_same(labels, labels, jnp.tri(size, dtype=bool) if causal else jnp.ones((size, size), bool))
    seen = [(labels == one.label[:, None]) & (labels != NOBODY) for one in around]
    lowest = jnp.finfo(log.dtype).min
    tops = [jnp.where(mask, one.sums.top[..., None], lowest) for one, mask in zip(around, seen, strict=True)]
    top = functools.reduce(jnp.maximum, tops, jnp.where(own, log[..., None, :], lowest).max(axis=-1))
    factor = jnp.exp(jnp.minimum(log[..., None, :] - top[..., None], 0))  # above 0 only where it is masked
    weights = jnp.where(own, dot('hmqf,hmkf->hmqk', query, features.astype(kind)) * factor, 0)
    values, total = dot('hmqk,hmkd->hmqd', weights.astype(kind), v), weights.sum(axis=-1)
    for one, mask, other in zip(around, seen, tops, strict=True):
        more_values, more = one.sums.read(query)
        far = jnp.where(mask, jnp.exp(other - top), 0)
        values, total = values + far[..., None] * more_values, total + far * more
    return quotient(values, total).astype(v.dtype)


def _expand(x: Array, like: Array) -> Array:
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
