"""Weights that are products of features, and the sums from which such attention is read (Katharopoulos et al. 2020).

    out_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j) = φ(q_i)ᵀ S / φ(q_i)ᵀ z      S = Σ_j φ(k_j) v_jᵀ, z = Σ_j φ(k_j)

Features may be exponentials that no float holds. A query's features may have any factor, it cancels. Those of a key
come with the logarithm `s_j` of a factor, which is taken relative to the greatest so far, `t_i = max_{j ≤ i} s_j`:

    φ(q_i)·φ(k_j) exp(s_j - t_i)

A maximum over all keys would cancel too, but not in the last bits: a later key would change what comes before it, and
one great enough would make it all vanish. A maximum over the keys so far does neither.

Features, weights and sums are not bounded as those of a softmax are: in float16, which holds no number above 65,504,
they are float32.

Over packed documents the sums begin again with each. A document is a contiguous run of positions. So of what is before
a chunk of positions, they can share only the document that is open at its end, and of what is after it, only the one at
its beginning.

Letters: as in `blocks`, and `f` features.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from combiner.ops.blocks import fit, flatten, label, merge, split, split_valid
from combiner.ops.chunking import divide, visit
from combiner.ops.segments import NOBODY, edge, of_same
from combiner.ops.softmax import dot, roomy

LEAST = 1e-30  # a sum of weights below this is one of underflows: its reciprocal would soon be infinite


class Kernel(NamedTuple):
    """A feature map for queries and one for keys, both of single vectors, to float32.

    Attributes:
        size: how many features there are.
        query: features of queries, up to a factor for each query.
        key: features of keys, and the logarithm of the factor that each key's features are still to get.
    """

    size: int
    query: Callable[[Array], Array]
    key: Callable[[Array], tuple[Array, Array]]

    def keys(
        self, k: Float[Array, '*n d'], members: Bool[Array, '...'] | None
    ) -> tuple[Float[Array, '*n f'], Float[Array, '*n']]:
        """As `key`, of no weight where a position is no member; the logarithm without a gradient, as it cancels."""
        features, log = self.key(k)
        log = lax.stop_gradient(log)
        if members is None:
            return features, log
        return jnp.where(members[..., None], features, 0), jnp.where(members, log, jnp.finfo(log.dtype).min)


class State(NamedTuple):
    """Sums over keys, `exp(top)` times smaller than they are: `S`, `z`, and the greatest `s_j`."""

    values: Float[Array, '*n f d']
    total: Float[Array, '*n f']
    top: Float[Array, '*n']

    def at(self, top: Float[Array, '*n']) -> 'State':
        """The same sums relative to another `top`, at least as great."""
        scale = jnp.exp(self.top - top)
        return State(scale[..., None, None] * self.values, scale[..., None] * self.total, top)

    def read(self, query: Float[Array, '*n q f']) -> tuple[Float[Array, '*n q d'], Float[Array, '*n q']]:
        """Weighted values and sums of weights for the features of queries."""
        return dot('...qf,...fd->...qd', query, self.values), dot('...qf,...f->...q', query, self.total)


def summed(
    kernel: Kernel, k: Float[Array, '*n c d'], v: Float[Array, '*n c d'], members: Bool[Array, '...'] | None = None
) -> State:
    """The sums over the last axis but one, of members only."""
    features, log = kernel.keys(k, members)
    top = log.max(axis=-1)
    features = features * jnp.exp(log - top[..., None])[..., None]
    return State(dot('...cf,...cd->...fd', features.astype(roomy(v.dtype)), v), features.sum(axis=-2), top)


def nothing_like(state: State) -> State:
    """The sums over no key."""
    values, total, top = map(jnp.zeros_like, state)
    return State(values, total, top + jnp.finfo(top.dtype).min)


def plus(one: State, other: State) -> State:
    """The sums over both."""
    top = jnp.maximum(one.top, other.top)
    one, other = one.at(top), other.at(top)
    return State(one.values + other.values, one.total + other.total, top)


def attend_chunks(
    kernel: Kernel,
    q: Float[Array, 'h m c d'],
    k: Float[Array, 'h m c d'],
    v: Float[Array, 'h m c d'],
    inside: Bool[Array, 'm c'] | None,
    past: State,
) -> Float[Array, 'h m c d']:
    """Causal attention of every chunk to its own positions and to the sums `past` of what is before it."""
    kind = roomy(v.dtype)
    query = kernel.query(q).astype(kind)
    features, log = kernel.keys(k, inside)
    so_far = jnp.maximum(lax.cummax(log, axis=2), past.top[..., None])
    factor = jnp.exp(jnp.minimum(log[..., None, :] - so_far[..., :, None], 0))  # above 0 only where it is masked
    weights = dot('hmqf,hmkf->hmqk', query, features.astype(kind)) * factor
    weights = jnp.where(jnp.tri(q.shape[2], dtype=bool), weights, 0)
    values, total = past.read(query)
    far = jnp.exp(past.top[..., None] - so_far)
    values = dot('hmqk,hmkd->hmqd', weights.astype(kind), v) + far[..., None] * values
    return quotient(values, weights.sum(axis=-1) + far * total).astype(v.dtype)


@jax.custom_jvp
def quotient(values: Float[Array, '*n d'], total: Float[Array, '*n']) -> Float[Array, '*n d']:
    """`values / total`, zeros where the total is less than `LEAST`.

    The derivative is written as `(dvalues - out·dtotal) / total`: that of the quotient divides by the square.
    """
    return values * _reciprocal(total)


@quotient.defjvp
def _quotient_tangents(primals, tangents):
    out, reciprocal = quotient(*primals), _reciprocal(primals[1])
    return out, reciprocal * (tangents[0] - out * tangents[1][..., None])


def _reciprocal(total: Float[Array, '*n']) -> Float[Array, '*n 1']:
    total = total[..., None]
    return jnp.where(total > LEAST, 1 / jnp.where(total > LEAST, total, 1), 0)


def attend_kernel(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    kernel: Kernel,
    *,
    chunk: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
) -> Float[Array, 'b l h d']:
    """Attention with weights `φ(q_i)·φ(k_j)`, divided by their sum, over all `j`, or if causal `j ≤ i`.

    Within a chunk one masked product of its queries and keys, and the sums over all chunks before. O(l·f·(d + chunk))
    time if causal, else O(l·f·d), and O(l·f·d / chunk) memory. A query whose weights all vanish, because it sees only
    padding or they are too small for float32, gets zeros. On a CPU the chunks are visited in steps (see `chunking`).

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        kernel: the feature maps.
        chunk: positions that are computed at once. The result does not depend on it.
        causal: whether a position sees only itself and what is before it.
        valid: positions that are no padding; padding must hold finite numbers.
    """
    batch, length, heads, width = q.shape
    chunk = fit(chunk, length)
    inside = split_valid(valid, batch, length, chunk, causal=causal)
    q, k, v = (flatten(x, chunk) for x in (q, k, v))
    chunks = len(q) // (batch * chunk)
    steps = divide(len(q) * heads * (2 * kernel.size + chunk), chunks)

    def collect(k, v, inside):
        """The sums over each of some chunks, chunks first."""
        k, v = (split(x[None], chunk) for x in (k, v))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), summed(kernel, k, v, inside))

    def attend_all(q):
        """The attended values of some positions, which see everything."""
        by_row = jnp.moveaxis(q.reshape(batch, -1, heads, width), 2, 1)
        attended = quotient(*everything.read(kernel.query(by_row).astype(roomy(v.dtype))))
        return jnp.moveaxis(attended, 1, 2).reshape(q.shape).astype(v.dtype)

    def attend_past(q, k, v, inside, past):
        """The attended values of some chunks, which see what is before."""
        q, k, v = (split(x[None], chunk) for x in (q, k, v))
        past = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), past)
        return merge(attend_chunks(kernel, q, k, v, inside, past), q.shape[1] * chunk)[0]

    sums = visit(collect, steps, batch, k, v, inside)
    in_order = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(batch, chunks, *x.shape[1:]), 1, 0), sums)
    nothing = nothing_like(jax.tree.map(lambda x: x[0], in_order))
    everything, before = lax.scan(lambda sums, one: (plus(sums, one), sums if causal else None), nothing, in_order)
    if causal:
        past = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), before)
        attended = visit(attend_past, steps, batch, q, k, v, inside, past)
    else:
        attended = visit(attend_all, steps, batch, q)
    return attended.reshape(batch, -1, heads, width)[:, :length]


class Open(NamedTuple):
    """The sums over one document so far, and its label (see `segments`): of every chunk, chunks first."""

    sums: State
    label: Int[Array, '*m']


def _attend_document_chunks(kernel, q, k, v, labels, around: list[Open], *, causal: bool) -> Float[Array, 'h m c d']:
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
    """As `attend_kernel`, over the `j` of the document of `i`; O(l·f·(d + chunk)) time in any case.

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
        return merge(_attend_document_chunks(kernel, q, k, v, labels, around, causal=causal), q.shape[1] * chunk)[0]

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


def _expand(x: Array, like: Array) -> Array:
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
