"""Combiner-Routing: own cluster directly, other clusters through summaries (Combiner; Roy et al. 2021).

The tokens of each cluster, in their order, lie in blocks (`ClusterSlots`). The tokens of a block become summaries, and
`VisibleSummaries` holds which positions attend to them.

Letters: `h` head, `b` batch, `l` length, `d` head width, `g` clusters, `n` blocks, `c` place in a block, `i = n·c`
slots, `t` stretches of consecutive positions, `s` summaries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner import patterns
from combiner.core.pooled import Pooled
from combiner.core.registry import register
from combiner.core.routed import Routed
from combiner.ops.blocks import KeyGroup, clip_size, scale_queries
from combiner.ops.kmeans import directions, nearest_centroid
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.softmax import Drop, einsum, mask_logits, softmax, unnormalized_softmax
from combiner.ops.summaries import summarise
from combiner.patterns import Cost, Pattern, check_positive, with_spans


def pattern(clusters: Int[np.ndarray, ' l'], *, causal: bool, block: int) -> Pattern:
    """Returns the pattern: own block of the own cluster directly, the tokens of each other block as a span.

    The tokens of a cluster, in their order, are cut into blocks of `block`, counted from the cluster's first token.
    Bidirectional, a span is a block. Causal, span `j` holds the tokens up to `j` of the block of token `j`; positions
    outside the block attend to this span until the block's next token. Negative clusters mark padding, which neither
    attends nor is attended to.
    """
    length = len(clusters)
    check_positive(length=length, block=block)
    real = clusters >= 0
    same = (clusters[:, None] == clusters) & real
    row = np.tril(same, -1).sum(axis=1) // block
    own = same & (row[:, None] == row)
    if not causal:
        spans = own[(own.argmax(axis=1) == np.arange(length)) & real]
        return with_spans(own, spans, ~spans.T & real[:, None])
    later = np.triu(own, 1)
    following = np.where(later.any(axis=1), later.argmax(axis=1), length)
    here = np.arange(length)[:, None]
    uses = (here > np.arange(length)) & (here < following) & real & real[:, None]
    return with_spans(np.tril(own), np.tril(own), uses)


def cost(length: int, block: int, clusters: int, *, causal: bool) -> Cost:
    """Returns the greatest cost of `pattern`, which the program always has, for any assignment to `clusters`."""
    blocks = (length + min(clusters, length) * (block - 1)) // block
    if not causal:
        return Cost(blocks * block**2 + length * blocks, blocks * block)
    return Cost(blocks * block**2 + length * (max(1, length // block) + 2 * min(clusters, length)), blocks * block**2)


class ClusterSlots(NamedTuple):
    """Positions by cluster: each cluster's tokens in their order, cut into blocks from the cluster's first token on.

    Blocks are numbered in the order of their first tokens, so that neither the block nor the place of a token
    depends on later tokens.

    Attributes:
        slot: the slot of each position; the number of slots for padding.
        at: the position in each slot; the length where the slot is empty.
        following: the next position in the same block; the length for the last one.
    """

    slot: Int[Array, 'h b l']
    at: Int[Array, 'h b i']
    following: Int[Array, 'h b l']


class Tokens(NamedTuple):
    """Queries (not scaled), keys and values by slot; an empty slot holds the values of an arbitrary token."""

    q: Float[Array, 'h b n c d']
    k: Float[Array, 'h b n c d']
    v: Float[Array, 'h b n c d']


def attend_combiner_routing(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    clusters: Int[Array, 'b l h'],
    *,
    number: int,
    block: int,
    causal: bool,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends by equation (7) for given clusters; the partition is `pattern`.

    The tokens of a cluster, in their order, are cut into blocks of `block`, counted from the cluster's first token.
    Direct is the own block (causal: up to `i`). Every other block is one span: all tokens, or causal the tokens
    before `i`. Where no cluster has more than `block` tokens this is the paper's partition: own cluster directly, each
    other cluster one span. Longer clusters are cut (this project's choice), so that the cost follows from the sizes.

    A block grows token by token: its spans are its beginnings, of at most `block` members. All later positions attend
    to the `l / block` full blocks. An unfinished block ends with its cluster's last token before `i`. This token lies
    in the same stretch of `number` positions, or was its cluster's last when the stretch began. So with `n` blocks,
    `n ≤ l/block + number`, time and memory are as follows, O(l^1.5) for both near √l:

        l·(block + l/block + 2·number)   logits        n·block²   logits inside blocks, direct and local

    Args:
        clusters: the cluster of each position, `0 … number - 1`; it must not depend on later positions.
        number: number of clusters.
        block: tokens of a cluster in a block.
        q, k, v, causal, pools, valid, drop: see `core.mechanism`; padding belongs to no cluster.
    """
    batch, length, heads, width = q.shape
    block = clip_size(block, length)
    if valid is not None:
        clusters = jnp.where(valid[:, :, None], clusters, number)
    clusters = jnp.moveaxis(clusters, 2, 0)
    if number > length:
        clusters, number = by_first_token(clusters, number), length
    where = assign_slots(clusters, block, number)
    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q, k, v))
    tokens = Tokens(*(take(x, where.at).reshape(heads, batch, -1, block, width) for x in (q, k, v)))
    filled = (where.at < length).reshape(heads, batch, -1, block)
    mask = filled[..., None, :] & jnp.tri(block, dtype=bool) if causal else filled[..., None, :]
    own = mask_logits(einsum('hbncd,hbnkd->hbnck', scale_queries(tokens.q), tokens.k), mask)
    far = _far(tokens, filled, where, clusters, number, causal, pools)
    own = take(own.reshape(heads, batch, -1, block), where.slot)  # by position, like the other logits
    logits = own, *(summaries.logits(scale_queries(q)) for summaries in far)
    (own, *weights), total = unnormalized_softmax(*logits, drop=drop)
    own = take(own.astype(v.dtype), where.at).reshape(*filled.shape, block)
    attended = take(einsum('hbnck,hbnkd->hbncd', own, tokens.v).reshape(heads, batch, -1, width), where.slot)
    attended += sum(summaries.read(weight) for summaries, weight in zip(far, weights, strict=True))
    return jnp.moveaxis((attended / total).astype(v.dtype), 0, 2)


def _far(tokens: Tokens, filled, where, clusters, number, causal, pools):
    """Returns the summaries of other blocks, with the positions that attend to them."""
    if not causal:
        return [other_blocks(KeyGroup(*summarise(*tokens, filled, pools=pools)), where, filled.shape[-1])]
    spans = prefixes(*tokens, filled, pools=pools)
    return [
        full_blocks(spans, where, clusters.shape[-1]),
        open_blocks(spans, where, clusters, number),
    ]


def assign_slots(clusters: Int[Array, 'h b l'], block: int, number: int) -> ClusterSlots:
    """Assigns slots to all positions; clusters from `number` on mark padding, which gets none.

    Room is for `(l + g·(block - 1)) // block` blocks, the greatest possible number, `g = min(number, l)`. O(l log l).
    """
    if block < 1 or number < 1:
        raise ValueError(f'block={block} and number={number} of clusters must be at least 1')
    length = clusters.shape[-1]
    slots = (length + min(number, length) * (block - 1)) // block * block
    here = jnp.arange(length)
    order = jnp.argsort(clusters, axis=-1, stable=True)  # from here on `x_` is x in this order
    clusters_ = take(clusters, order)
    goes_on_ = jnp.pad(clusters_[..., 1:] == clusters_[..., :-1], ((0, 0), (0, 0), (1, 0)))
    rank_ = here - jax.lax.cummax(jnp.where(goes_on_, 0, here), axis=2)
    opens_ = rank_ % block == 0
    back = jnp.argsort(order, axis=-1)
    opened = jnp.cumsum(take(opens_ & (clusters_ < number), back), axis=-1) - 1
    block_ = take(opened, take(order, here - rank_ % block))
    slot = take(jnp.where(clusters_ < number, block_ * block + rank_ % block, slots), back)
    last = jnp.full_like(order[..., :1], length)
    following_ = jnp.concatenate([jnp.where(opens_[..., 1:], length, order[..., 1:]), last], axis=-1)
    empty = jnp.full(slots, length)
    # Mapped: with heads and batch as indices of the scatter, XLA would gather them from all devices.
    at = jax.vmap(jax.vmap(lambda slot: empty.at[slot].set(here, mode='drop')))(slot)
    return ClusterSlots(slot, at, take(following_, back))


def by_first_token(clusters: Int[Array, 'h b l'], number: int) -> Int[Array, 'h b l']:
    """Renames clusters by the positions of their first tokens, so that no more clusters than tokens are counted.

    No token's name depends on later tokens. Clusters from `number` on, which mark padding, become the length.
    """
    length = clusters.shape[-1]
    here = jnp.arange(length)
    order = jnp.argsort(clusters, axis=-1, stable=True)
    clusters_ = take(clusters, order)
    goes_on_ = jnp.pad(clusters_[..., 1:] == clusters_[..., :-1], ((0, 0), (0, 0), (1, 0)))
    first_ = take(order, jax.lax.cummax(jnp.where(goes_on_, 0, here), axis=2))
    return jnp.where(clusters < number, take(first_, jnp.argsort(order, axis=-1)), length)


def take(x: Array, index: Int[Array, 'h b k']) -> Array:
    """Returns the rows `x[h, b, index[h, b]]` of `x` `[h b l …]`; indices beyond the end give the last row."""
    index = index.reshape(index.shape + (1,) * (x.ndim - index.ndim))
    return jnp.take_along_axis(x, index, axis=2, mode='clip')


def prefixes(
    q: Float[Array, 'h b n c d'],
    k: Float[Array, 'h b n c d'],
    v: Float[Array, 'h b n c d'],
    filled: Bool[Array, 'h b n c'],
    *,
    pools: Pools,
) -> KeyGroup:
    """Summarises every beginning of a block: the summary at `c` is of the tokens up to `c`; zeros in an empty block.

    O(c) time and memory for each token, as its span has at most `c` members.
    """
    some = jnp.broadcast_to(filled[..., :1], filled.shape)

    def scan(pool, x):
        features = jax.lax.associative_scan(pool.combine, pool.encode_members(x, filled), axis=3)
        return pool.decode_or_zero(features, some).astype(x.dtype)

    logits = mask_logits(einsum('hbncd,hbnkd->hbnck', scale_queries(scan(pools.q, q)), k), filled[..., None, :])
    local = softmax(mask_logits(logits, jnp.tri(k.shape[3], dtype=bool))).astype(v.dtype)
    return KeyGroup(scan(pools.k, k), einsum('hbnck,hbnkd->hbncd', local, v).astype(v.dtype))


class VisibleSummaries(NamedTuple):
    """Summaries, and which of them each position of a stretch attends to."""

    key: Float[Array, 'h b t s d']
    value: Float[Array, 'h b t s d']
    visible: Bool[Array, 'h b t c s']

    def logits(self, q: Float[Array, 'h b l d']) -> Float[Array, 'h b l s']:
        """Returns the logits of each position for the summaries of its stretch."""
        logits = mask_logits(einsum('hbtcd,hbtsd->hbtcs', self._stretches(q), self.key), self.visible)
        return logits.reshape(*q.shape[:2], -1, logits.shape[-1])[:, :, : q.shape[2]]

    def read(self, weights: Float[Array, 'h b l s']) -> Float[Array, 'h b l d']:
        """Returns the weighted sums of the summaries' values."""
        values = einsum('hbtcs,hbtsd->hbtcd', self._stretches(weights.astype(self.value.dtype)), self.value)
        return values.reshape(*weights.shape[:2], -1, values.shape[-1])[:, :, : weights.shape[2]]

    def _stretches(self, x):
        return stretches(x, self.visible.shape[3])


def stretches(x: Array, size: int, fill: int = 0) -> Array:
    """Cuts axis 2 into stretches of `size`, padding the last."""
    room = [(0, 0)] * x.ndim
    room[2] = (0, -x.shape[2] % size)
    x = jnp.pad(x, room, constant_values=fill)
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def full_blocks(spans: KeyGroup, where: ClusterSlots, length: int) -> VisibleSummaries:
    """Returns the summaries of whole blocks, in the order in which they fill up, for the positions after them."""
    size = spans.k.shape[3]
    ends = where.at[..., size - 1 :: size]
    first = jnp.argsort(ends, axis=-1)[..., : max(1, length // size)]
    key, value = (take(x[:, :, :, -1], first)[:, :, None] for x in spans[:2])
    return VisibleSummaries(key, value, (take(ends, first)[..., None, :] < jnp.arange(length)[:, None])[:, :, None])


def other_blocks(spans: KeyGroup, where: ClusterSlots, size: int) -> VisibleSummaries:
    """Returns the summaries of all blocks `[h b n d]`, for the positions of other blocks."""
    blocks = spans.k.shape[2]
    own = where.slot[..., None] // size == jnp.arange(blocks)
    some = where.at[..., None, ::size] < where.slot.shape[-1]
    return VisibleSummaries(spans.k[:, :, None], spans.v[:, :, None], (some & ~own)[:, :, None])


def open_blocks(spans: KeyGroup, where: ClusterSlots, clusters: Int[Array, 'h b l'], number: int) -> VisibleSummaries:
    """Returns the summaries of unfinished blocks, for the positions between one token of a block and its next.

    A position needs the summary at the last token before it in each other cluster. Such a token either lies in the
    same stretch of `number` positions, or was the last of its cluster when the stretch began: `2·number` candidates for
    a whole stretch, so that no position needs a gather of its own.
    """
    length, size = clusters.shape[-1], spans.k.shape[3]
    key, value = (take(x.reshape(*x.shape[:2], -1, x.shape[-1]), where.slot) for x in spans[:2])
    unfinished = (clusters < number) & (where.slot % size != size - 1)
    here = jnp.arange(length)[None, None]
    until = jnp.where(unfinished, where.following, 0)  # visible after `here` and before `until`

    segment_ids = stretches(clusters, number, fill=number)
    held = segment_ids[..., None] == jnp.arange(number)
    places_ = stretches(here, number)
    latest = jnp.where(held, places_[..., None], -1).max(axis=3)
    before = jnp.pad(jax.lax.cummax(latest, axis=2)[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=-1)

    def candidates(x: Array) -> Array:
        at_start = take(x, jnp.maximum(before, 0).reshape(*before.shape[:2], -1))
        return jnp.concatenate([stretches(x, number), at_start.reshape(*before.shape, *x.shape[3:])], axis=3)

    of = jnp.concatenate([jnp.broadcast_to(places_, segment_ids.shape), before], axis=3)[..., None, :]
    now = places_[..., None]
    visible = (of >= 0) & (of < now) & (now < candidates(until)[..., None, :])
    return VisibleSummaries(candidates(key), candidates(value), visible)


@register('combiner_routing')
class CombinerRouting(Routed, Pooled):
    """Combiner-Routing; a token's cluster is the one whose centroid is nearest to its query and key together.

    Attributes:
        block: tokens of a cluster in a block; None for the least power of two that holds `max_length / clusters`,
            a cluster of average size.
    """

    block: int | None = None

    full_support = True

    def pattern_for(self, clusters: Int[np.ndarray, ' l']) -> patterns.Pattern:
        """Returns the partition of the support for a sequence of these clusters; negative clusters mark padding."""
        return pattern(clusters, causal=self.causal, block=self._block(len(clusters)))

    def cost(self, length):
        return cost(length, self._block(length), self.number, causal=self.causal)

    def attend(self, q, k, v, context):
        clusters = nearest_centroid(directions(q, k), self.own_variables(context)['centroids'])
        options = {'number': self.number, 'block': self._block(q.shape[1]), 'causal': self.causal}
        return attend_combiner_routing(
            q, k, v, clusters, **options, pools=self.pools(context), valid=context.valid, drop=context.drop
        )

    def _block(self, length):
        if self.block is not None:
            return self.block
        return 1 << (-(-(self.max_length or length) // self.number) - 1).bit_length()
