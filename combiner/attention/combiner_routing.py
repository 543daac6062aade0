"""Combiner-Routing: own cluster directly, other clusters through summaries (Combiner; Roy et al. 2021).

The tokens of each cluster, in their order, lie in blocks (`ClusterSlots`). Direct terms are computed by block. The
tokens of a block become summaries, to which positions attend in their own order. Both are merged into one softmax.

Letters: `h` head, `b` batch, `l` length, `d` head width, `g` clusters, `n` blocks of a sequence, `m = b·n` blocks or
stretches of consecutive positions of the whole batch, `c` place in one, `i` slots of a sequence, `s` summaries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner import patterns
from combiner.core.pooled import Pooled
from combiner.core.registry import register
from combiner.core.routed import Routed, directions, nearest_centroid
from combiner.ops.blocks import KeyGroup, clip_size, scale_queries
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.softmax import (
    Drop,
    PartialSoftmax,
    einsum,
    mask_logits,
    merge_partials,
    partial_softmax,
    softmax,
)
from combiner.ops.spans import summarise
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
        at: the position in each slot, block after block; the length where the slot is empty.
        following: the next position in the same block; the length for the last one.
    """

    slot: Int[Array, 'h b l']
    at: Int[Array, 'h b i']
    following: Int[Array, 'h b l']

    def by_slot(self, x: Float[Array, 'h b l d'], block: int) -> Float[Array, 'h m c d']:
        """Moves positions to their slots; an empty slot gets the values of an arbitrary token."""
        return take(x, self.at).reshape(len(x), -1, block, x.shape[-1])

    def by_position(self, x: Float[Array, 'h m c d']) -> Float[Array, 'h b l d']:
        """Moves slots back to their positions; padding gets arbitrary values."""
        return take(x.reshape(*self.slot.shape[:2], -1, x.shape[-1]), self.slot)


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
    length, heads = q.shape[1:3]
    block = clip_size(block, length)
    if valid is not None:
        clusters = jnp.where(valid[:, :, None], clusters, number)
    clusters = jnp.moveaxis(clusters, 2, 0)
    if number > length:
        clusters, number = by_first_token(clusters, number), length
    where = assign_slots(clusters, block, number)
    filled = (where.at < length).reshape(heads, -1, block)
    mask = filled[..., None, :] & jnp.tri(block, dtype=bool) if causal else filled[..., None, :]
    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q, k, v))
    slot_q, slot_k, slot_v = (where.by_slot(x, block) for x in (q, k, v))
    own = partial_softmax(scale_queries(slot_q), slot_k, slot_v, mask, drop)
    if causal:
        prefixes = summarise_prefixes(slot_q, slot_k, slot_v, filled, pools=pools)
        others = [full_blocks(prefixes, where), open_blocks(prefixes, where, clusters, number)]
    else:
        others = [other_blocks(KeyGroup(*summarise(slot_q, slot_k, slot_v, filled, pools=pools)), where)]
    own = PartialSoftmax(*(where.by_position(x) for x in own))
    attended = merge_partials(own, *(attend_summaries(scale_queries(q), group, drop) for group in others)).normalize()
    return jnp.moveaxis(attended.astype(v.dtype), 0, 2)


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


def summarise_prefixes(
    q: Float[Array, 'h m c d'],
    k: Float[Array, 'h m c d'],
    v: Float[Array, 'h m c d'],
    filled: Bool[Array, 'h m c'],
    *,
    pools: Pools,
) -> KeyGroup:
    """Summarises every beginning of a block: the summary at `c` is of the tokens up to `c`; zeros in an empty block.

    O(c) time and memory for each token, as its span has at most `c` members.
    """
    some = jnp.broadcast_to(filled[..., :1], filled.shape)

    def scan(pool, x):
        features = jax.lax.associative_scan(pool.combine, pool.encode_members(x, filled), axis=2)
        return pool.decode_or_zero(features, some).astype(x.dtype)

    members = filled[..., None, :] & jnp.tri(k.shape[2], dtype=bool)
    local = softmax(mask_logits(einsum('hmcd,hmkd->hmck', scale_queries(scan(pools.q, q)), k), members))
    return KeyGroup(scan(pools.k, k), einsum('hmck,hmkd->hmcd', local.astype(v.dtype), v).astype(v.dtype))


def attend_summaries(q: Float[Array, 'h b l d'], group: KeyGroup, drop: Drop | None) -> PartialSoftmax:
    """Attends from stretches of positions to the summaries of each stretch, `h m s d` with a mask `h m c s`."""
    by_stretch = q if group.mask is None else stretches(q, group.mask.shape[2])
    by_stretch = by_stretch.reshape(len(q), -1, *by_stretch.shape[-2:])
    sums = partial_softmax(by_stretch, group.k, group.v, group.mask, drop)
    return PartialSoftmax(*(x.reshape(*q.shape[:2], -1, x.shape[-1])[:, :, : q.shape[2]] for x in sums))


def stretches(x: Array, size: int, fill: int = 0) -> Array:
    """Cuts axis 2 into stretches of `size`, padding the last."""
    room = [(0, 0)] * x.ndim
    room[2] = (0, -x.shape[2] % size)
    x = jnp.pad(x, room, constant_values=fill)
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def full_blocks(prefixes: KeyGroup, where: ClusterSlots) -> KeyGroup:
    """Returns the summaries of whole blocks, in the order in which they fill up, for the positions after them."""
    length, size = where.slot.shape[-1], prefixes.k.shape[2]
    ends = where.at[..., size - 1 :: size]
    first = jnp.argsort(ends, axis=-1)[..., : max(1, length // size)]
    k, v = (take(x[:, :, -1].reshape(*ends.shape, -1), first) for x in (prefixes.k, prefixes.v))
    return KeyGroup(k, v, take(ends, first)[..., None, :] < jnp.arange(length)[:, None])


def other_blocks(spans: KeyGroup, where: ClusterSlots) -> KeyGroup:
    """Returns the summaries of all blocks `[h m d]`, for the positions of other blocks."""
    heads, batch, length = where.slot.shape
    blocks = spans.k.shape[1] // batch
    size = where.at.shape[-1] // blocks
    own = where.slot[..., None] // size == jnp.arange(blocks)
    some = where.at[..., None, ::size] < length
    k, v = (x.reshape(heads, batch, blocks, -1) for x in (spans.k, spans.v))
    return KeyGroup(k, v, some & ~own)


def open_blocks(prefixes: KeyGroup, where: ClusterSlots, clusters: Int[Array, 'h b l'], number: int) -> KeyGroup:
    """Returns the summaries of unfinished blocks, for the positions between one token of a block and its next.

    A position needs the summary at the last token before it in each other cluster. Such a token either lies in the
    same stretch of `number` positions, or was the last of its cluster when the stretch began: `2·number` candidates for
    a whole stretch, so that no position needs a gather of its own.
    """
    length, size = clusters.shape[-1], prefixes.k.shape[2]
    here = jnp.arange(length)[None, None]
    unfinished = (clusters < number) & (where.slot % size != size - 1)
    until = jnp.where(unfinished, where.following, 0)  # visible after `here` and before `until`

    position = stretches(here, number)
    in_cluster = stretches(clusters, number, fill=number)[..., None] == jnp.arange(number)
    last = jnp.where(in_cluster, position[..., None], -1).max(axis=3)
    before = jnp.pad(jax.lax.cummax(last, axis=2)[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=-1)

    def candidates(x: Array) -> Array:
        at_start = take(x, jnp.maximum(before, 0).reshape(*before.shape[:2], -1))
        found = jnp.concatenate([stretches(x, number), at_start.reshape(*before.shape, *x.shape[3:])], axis=3)
        return found.reshape(len(found), -1, *found.shape[3:])

    of = jnp.concatenate([jnp.broadcast_to(position, before.shape), before], axis=3)
    of = of.reshape(len(of), -1, 1, of.shape[-1])
    now = jnp.broadcast_to(position, before.shape).reshape(len(of), -1, number, 1)
    mask = (of >= 0) & (of < now) & (now < candidates(until)[..., None, :])
    k, v = (candidates(where.by_position(x)) for x in (prefixes.k, prefixes.v))
    return KeyGroup(k, v, mask)


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
        block, pools = self._block(q.shape[1]), self.pools(context)
        number, causal, valid, drop = self.number, self.causal, context.valid, context.drop
        return attend_combiner_routing(
            q, k, v, clusters, number=number, block=block, causal=causal, pools=pools, valid=valid, drop=drop
        )

    def _block(self, length):
        if self.block is not None:
            return self.block
        return 1 << (-(-(self.max_length or length) // self.number) - 1).bit_length()
