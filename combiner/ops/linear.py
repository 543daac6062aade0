"""Attention whose weights are products of features, and the sums that it needs (Katharopoulos et al. 2020).

    out_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j) = φ(q_i)ᵀ S / φ(q_i)ᵀ z      S = Σ_j φ(k_j) v_jᵀ, z = Σ_j φ(k_j)

Features may be exponentials beyond the range of floats. A query's features may have any factor, as it cancels. Features
of a key come with the logarithm `s_j` of a factor, relative to the greatest so far, `t_i = max_{j ≤ i} s_j`:

    φ(q_i)·φ(k_j) exp(s_j - t_i)

A maximum over all keys would cancel too, but not in the last bits: a later key would change earlier outputs, and a
very great one would make them vanish. A maximum over the keys so far does neither.

Features, weights and sums are not bounded as in a softmax. Float16 holds no number above 65,504, so for float16 inputs
they are float32.

Over packed documents the sums restart at each document, a contiguous run of positions. So a chunk of positions shares
with earlier positions only the document that is open at their end, and with later positions only the one at their
beginning.

Letters: as in `blocks`, and `f` features.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from combiner.ops.blocks import Blocks, clip_size, swap_heads
from combiner.ops.segments import PADDING_ID, edge_id
from combiner.ops.softmax import einsum, wide_dtype

LEAST = 1e-30  # a lesser sum of weights is a sum of underflows: its reciprocal would soon be infinite


class Kernel(NamedTuple):
    """A feature map for queries and one for keys, both of single vectors, to float32.

    Attributes:
        size: the number of features.
        query: features of queries, up to a factor for each query.
        key: features of keys, and the logarithm of the factor that is still to be applied to each key's features.
    """

    size: int
    query: Callable[[Array], Array]
    key: Callable[[Array], tuple[Array, Array]]

    def keys(
        self, k: Float[Array, '*n d'], members: Bool[Array, '...'] | None
    ) -> tuple[Float[Array, '*n f'], Float[Array, '*n']]:
        """Computes `key`, with weight zero for non-members; the logarithm has no gradient, as it cancels."""
        features, log = self.key(k)
        log = lax.stop_gradient(log)
        if members is None:
            return features, log
        return jnp.where(members[..., None], features, 0), jnp.where(members, log, jnp.finfo(log.dtype).min)


class State(NamedTuple):
    """Sums over keys, divided by `exp(top)`: `S`, `z`, and the greatest `s_j`."""

    values: Float[Array, '*n f d']
    total: Float[Array, '*n f']
    top: Float[Array, '*n']

    def at(self, top: Float[Array, '*n']) -> 'State':
        """Returns the same sums relative to another `top`, at least as great."""
        scale = jnp.exp(self.top - top)
        return State(scale[..., None, None] * self.values, scale[..., None] * self.total, top)

    def read(self, query: Float[Array, '*n q f']) -> tuple[Float[Array, '*n q d'], Float[Array, '*n q']]:
        """Returns weighted values and sums of weights for the features of queries."""
        return einsum('...qf,...fd->...qd', query, self.values), einsum('...qf,...f->...q', query, self.total)


def sum_features(
    kernel: Kernel, k: Float[Array, '*n c d'], v: Float[Array, '*n c d'], members: Bool[Array, '...'] | None = None
) -> State:
    """Sums over the last axis but one, of members only."""
    features, log = kernel.keys(k, members)
    top = log.max(axis=-1)
    features = features * jnp.exp(log - top[..., None])[..., None]
    return State(einsum('...cf,...cd->...fd', features.astype(wide_dtype(v.dtype)), v), features.sum(axis=-2), top)


def zero_sums(state: State) -> State:
    """Returns the sums over no key."""
    values, total, top = map(jnp.zeros_like, state)
    return State(values, total, top + jnp.finfo(top.dtype).min)


def add_sums(one: State, other: State) -> State:
    """Adds the sums over two sets of keys."""
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
    """Attends causally from every chunk to its own positions and to the sums `past` of earlier positions."""
    kind = wide_dtype(v.dtype)
    query = kernel.query(q).astype(kind)
    features, log = kernel.keys(k, inside)
    so_far = jnp.maximum(lax.cummax(log, axis=2), past.top[..., None])
    factor = jnp.exp(jnp.minimum(log[..., None, :] - so_far[..., :, None], 0))  # above 0 only where it is masked
    weights = einsum('hmqf,hmkf->hmqk', query, features.astype(kind)) * factor
    weights = jnp.where(jnp.tri(q.shape[2], dtype=bool), weights, 0)
    values, total = past.read(query)
    far = jnp.exp(past.top[..., None] - so_far)
    values = einsum('hmqk,hmkd->hmqd', weights.astype(kind), v) + far[..., None] * values
    return safe_quotient(values, weights.sum(axis=-1) + far * total).astype(v.dtype)


@jax.custom_jvp
def safe_quotient(values: Float[Array, '*n d'], total: Float[Array, '*n']) -> Float[Array, '*n d']:
    """Returns `values / total`, zeros where the total is less than `LEAST`.

    The derivative is written as `(dvalues - out·dtotal) / total`: the derivative of the quotient divides by the square.
    """
    return values * _reciprocal(total)


@safe_quotient.defjvp
def _quotient_tangents(primals, tangents):
    out, reciprocal = safe_quotient(*primals), _reciprocal(primals[1])
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
    """Attends with weights `φ(q_i)·φ(k_j)`, divided by their sum, over all `j`, or if causal `j ≤ i`.

    Within a chunk, one masked product of its queries and keys, and the sums over all earlier chunks. O(l·f·(d + chunk))
    time if causal, else O(l·f·d), and O(l·f·d / chunk) memory. A query whose weights all vanish, as it reaches only
    padding or they are too small for float32, gets zeros. On a CPU in chunks (see `chunking`).

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        kernel: the feature maps.
        chunk: positions computed at once. The result does not depend on it.
        causal: whether a position attends to itself and earlier positions only.
        valid: positions that are no padding; padding must hold finite numbers.
    """
    chunks = Blocks.of(q, clip_size(chunk, q.shape[1]))
    tokens = chunks.tokens(q, k, v, causal=causal, valid=valid)
    keys = 2 * kernel.size + chunks.size

    def collect(tokens):
        return sum_features(kernel, tokens.k, tokens.v, tokens.inside)

    def attend_all(tokens):
        q = tokens.q
        query = kernel.query(q.reshape(len(q), chunks.batch, -1, q.shape[-1])).astype(wide_dtype(v.dtype))
        return safe_quotient(*everything.read(query)).reshape(*q.shape[:3], -1).astype(v.dtype)

    def attend_past(tokens, past):
        return attend_chunks(kernel, tokens.q, tokens.k, tokens.v, tokens.inside, past)

    sums = chunks.map(collect, tokens._replace(q=None), keys=keys)
    in_order = _in_order(sums, chunks.batch)
    nothing = zero_sums(jax.tree.map(lambda x: x[0], in_order))
    everything, before = lax.scan(lambda sums, one: (add_sums(sums, one), sums if causal else None), nothing, in_order)
    if causal:
        return chunks.attend(attend_past, tokens, _by_chunk(before), keys=keys)
    everything = swap_heads(everything)
    return chunks.attend(attend_all, tokens._replace(k=None, v=None, segment_ids=None), keys=keys)


def _in_order(of_chunks: Any, batch: int) -> Any:
    """Reorders arrays of chunks, `m …`, into the chunks of all sequences one after the other, `n b …`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 0), of_chunks)


def _by_chunk(in_order: Any) -> Any:
    """Inverts `_in_order`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), in_order)


class OpenDocument(NamedTuple):
    """The sums over one document so far, and its segment id (see `segments`): of every chunk, chunks first."""

    sums: State
    segment_id: Int[Array, '*m']


def _attend_document_chunks(
    kernel, q, k, v, segment_ids, around: list[OpenDocument], *, causal: bool
) -> Float[Array, 'h m c d']:
    """Attends from every chunk to its own positions and to the sums `around` it, within the query's own document."""
    kind = wide_dtype(v.dtype)
    query = kernel.query(q).astype(kind)
    features, log = kernel.keys(k, segment_ids != PADDING_ID)
    size = q.shape[2]
    own = segment_ids[:, :, None] == segment_ids[:, None]
    own = own & jnp.tri(size, dtype=bool) if causal else own
    visible = [(segment_ids == one.segment_id[:, None]) & (segment_ids != PADDING_ID) for one in around]
    lowest = jnp.finfo(log.dtype).min
    tops = [jnp.where(mask, one.sums.top[..., None], lowest) for one, mask in zip(around, visible, strict=True)]
    top = functools.reduce(jnp.maximum, tops, jnp.where(own, log[..., None, :], lowest).max(axis=-1))
    factor = jnp.exp(jnp.minimum(log[..., None, :] - top[..., None], 0))  # above 0 only where it is masked
    weights = jnp.where(own, einsum('hmqf,hmkf->hmqk', query, features.astype(kind)) * factor, 0)
    values, total = einsum('hmqk,hmkd->hmqd', weights.astype(kind), v), weights.sum(axis=-1)
    for one, mask, other in zip(around, visible, tops, strict=True):
        more_values, more = one.sums.read(query)
        far = jnp.where(mask, jnp.exp(other - top), 0)
        values, total = values + far[..., None] * more_values, total + far * more
    return safe_quotient(values, total).astype(v.dtype)


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
    """Attends as `attend_kernel` does, over the `j` of the document of `i`; O(l·f·(d + chunk)) time in any case.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        kernel: the feature maps.
        chunk: positions computed at once. The result does not depend on it.
        causal: whether a position attends to itself and earlier positions only.
        segments: packed documents, each a contiguous run of positions with one number; none attends to another.
        valid: positions that are no padding; padding must hold finite numbers.
    """
    chunks = Blocks.of(q, clip_size(chunk, q.shape[1]))
    tokens = chunks.tokens(q, k, v, causal=causal, valid=valid, segments=segments)
    keys = 2 * kernel.size + chunks.size

    def collect(tokens):
        """Sums over the last document of each of some chunks, and (bidirectional) over the first."""
        segment_ids, found = tokens.segment_ids, []
        for last in (True,) if causal else (True, False):
            shared = edge_id(segment_ids, last=last)
            members = (segment_ids == shared[:, None]) & (segment_ids != PADDING_ID)
            found.append(OpenDocument(sum_features(kernel, tokens.k, tokens.v, members), shared))
        return found

    def attend(tokens, around):
        q, k, v, segment_ids = tokens
        return _attend_document_chunks(kernel, q, k, v, segment_ids, around, causal=causal)

    ends = chunks.map(collect, tokens._replace(q=None), keys=keys)
    around = [_reaching(one, chunks.batch, reverse=reverse) for one, reverse in zip(ends, (False, True), strict=False)]
    return chunks.attend(attend, tokens, around, keys=keys)


def _reaching(ends: OpenDocument, batch: int, *, reverse: bool) -> OpenDocument:
    """Returns the open document where each chunk begins (`reverse`: ends), with its sums over all other chunks."""

    def follow(past: OpenDocument, one: OpenDocument) -> OpenDocument:
        """Returns the open document after one more chunk."""
        goes_on = (one.segment_id == past.segment_id) | (one.segment_id == PADDING_ID)
        kept = (jnp.where(_expand(goes_on, x), x, y) for x, y in zip(past.sums, zero_sums(past.sums), strict=True))
        return OpenDocument(add_sums(State(*kept), one.sums), jnp.where(goes_on, past.segment_id, one.segment_id))

    in_order = _in_order(ends, batch)
    first = jax.tree.map(lambda x: x[0], in_order)
    nothing = OpenDocument(zero_sums(first.sums), jnp.full_like(first.segment_id, PADDING_ID))
    _, before = lax.scan(lambda past, one: (follow(past, one), past), nothing, in_order, reverse=reverse)
    return _by_chunk(before)


def _expand(x: Array, like: Array) -> Array:
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
