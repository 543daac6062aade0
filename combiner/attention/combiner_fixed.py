"""Combiner-Fixed: own block directly, other blocks through one max-pooled summary each (Combiner, section 4.1)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner import patterns
from combiner.core.pooled import PooledAttention
from combiner.core.registry import register
from combiner.costs import own_block_and_others
from combiner.ops.blocks import (
    Recent,
    Summary,
    blocks_by_sequence,
    clip_size,
    flatten_blocks,
    mask_own,
    merge_blocks,
    scale_queries,
    spans_by_head,
    split_blocks,
    split_each,
    split_each_scaled,
    split_ids,
    split_valid,
    summarise,
    summary_masks,
)
from combiner.ops.chunking import map_chunks, plan_chunks
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.softmax import Drop, einsum, mask_logits, unnormalized_softmax
from combiner.patterns import Cost, Pattern, check_positive, support, with_spans


def pattern(length: int, *, causal: bool, block: int) -> Pattern:
    """Combiner-Fixed (section 4.1): own block directly, every earlier (bidirectional: other) block as a span."""
    check_positive(length=length, block=block)
    row = np.arange(length) // block
    rows = np.arange(row[-1] + 1)
    spans = rows[:, None] == row
    uses = rows < row[:, None] if causal else rows != row[:, None]
    return with_spans((row[:, None] == row) & support(length, causal=causal), spans, uses)


def cost(length: int, block: int, *, causal: bool) -> Cost:
    """Closed form of `pattern(…).cost()`: `O(l (block + l / block))`."""
    blocks = -(-length // block)
    members = (blocks - 1) * block if causal else length if blocks > 1 else 0
    return Cost(own_block_and_others(length, block, causal=causal), members)


def attend_combiner_fixed(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    block: int,
    causal: bool,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Equation (7) with `Ω_i^0` = own block (causal: up to `i`), one span per earlier (bidirectional: other) block.

    O(l·(block + l/block)) time and memory, least at `block = √l`. `block ≥ l` and `block = 1` are softmax
    attention. The summaries of a sequence are one matrix `[n d]` for each head: one product has all span logits.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        block: positions in a block; the last block may be partial.
        causal: whether a position sees only itself and what is before it.
        pools: how the members of a block become its summary query and key.
        valid: positions that are no padding; padding must hold finite numbers.
        segments: packed documents, each a contiguous run of positions with one number; they do not see each other.
        drop: dropout of the joint weights.
    """
    batch, length, heads, width = q.shape
    block = clip_size(block, length)
    inside = split_valid(valid, batch, length, block, causal=causal)
    segments = None if segments is None else split_ids(segments, block)
    q, k, v = (flatten_blocks(x, block) for x in (q, k, v))
    blocks = len(q) // (batch * block)
    masks = summary_masks(batch, blocks, causal=causal, inside=inside, segments=segments)
    steps = plan_chunks(len(q) * heads * (block + blocks), blocks, at_once=drop is not None)

    def summarise_blocks(q, k, v, masks):
        """The summaries of some blocks, blocks first."""
        tokens = split_each(block, q, k, v)
        spans = [summarise(*tokens, members=mask.members, pools=pools) for mask in masks]
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), spans)

    spans = map_chunks(summarise_blocks, steps, batch, q, k, v, masks)
    span_k, span_v = (jnp.concatenate([spans_by_head(span[i], batch) for span in spans], axis=2) for i in range(2))

    def attend(q, k, v, inside, segments, visible):
        """The attended values of some blocks, which see the summaries of all."""
        q, k, v = split_each_scaled(block, q, k, v)
        own = mask_own(einsum('hmqd,hmkd->hmqk', q, k), causal=causal, inside=inside, segments=segments)
        far = einsum('hbld,hbnd->hbln', q.reshape(heads, batch, -1, width), span_k).reshape(*own.shape[:-1], -1)
        (own, far), total = unnormalized_softmax(own, mask_logits(far, visible), drop=drop)
        attended = einsum('hmqk,hmkd->hmqd', own.astype(v.dtype), v)
        far = far.astype(v.dtype).reshape(heads, batch, -1, far.shape[-1])
        attended += einsum('hbln,hbnd->hbld', far, span_v).reshape(v.shape)
        return merge_blocks((attended / total).astype(v.dtype), len(visible) * block)[0]

    visible = jnp.concatenate([mask.visible for mask in masks], axis=-1)
    attended = map_chunks(attend, steps, batch, q, k, v, inside, segments, visible)
    return attended.reshape(batch, -1, heads, width)[:, :length]


class Cache(NamedTuple):
    """The open block, and the summaries of the closed ones, whose keys are dropped: O(block + l/block)."""

    recent: Recent
    spans: Summary


def _decode_one(cache, index, q, k, v, pools):
    """One token of one sequence; `q`, `k`, `v` are `[h, d]`, `q` not scaled."""
    block = cache.recent.k.shape[1]
    own, here = index // block, index % block
    recent = jax.tree.map(lambda held, new: held.at[:, here].set(new), cache.recent, Recent(q, k, v))
    inside = jnp.arange(block) <= here
    near = mask_logits(einsum('hd,hcd->hc', scale_queries(q), recent.k), inside)
    far = einsum('hd,hnd->hn', scale_queries(q), cache.spans.key)
    (near, far), total = unnormalized_softmax(near, mask_logits(far, jnp.arange(far.shape[-1]) < own))
    attended = einsum('hc,hcd->hd', near.astype(v.dtype), recent.v)
    attended += einsum('hn,hnd->hd', far.astype(v.dtype), cache.spans.value)
    open_span = summarise(*recent, members=inside, pools=pools)  # final, and first visible, once the block is full
    spans = jax.tree.map(lambda closed, one: closed.at[:, own].set(one), cache.spans, open_span)
    return Cache(recent, spans), (attended / total).astype(v.dtype)


@register('combiner_fixed')
class CombinerFixedAttention(PooledAttention):
    """Combiner-Fixed with blocks of `block` positions; None for the power of two that costs least."""

    block: int | None = None

    full_support = True
    supports_segments = True

    def pattern(self, length: int) -> patterns.Pattern:
        return pattern(length, causal=self.causal, block=self._block(length))

    def cost(self, length: int) -> patterns.Cost:
        return cost(length, self._block(length), causal=self.causal)

    def attend_pooled(self, pools, q, k, v, **masks):
        return attend_combiner_fixed(q, k, v, block=self._block(q.shape[1]), causal=self.causal, pools=pools, **masks)

    def init_cache(self, x, q, k, v, counts, capacity):
        """Keeps the open block of each sequence, and the summaries of all blocks with room for later ones."""
        block = self._block(capacity)
        blocks = -(-x.shape[1] // block)
        tokens = Recent(*(split_blocks(a, block) for a in (q, k, v)))
        spans = summarise(*tokens, pools=self.pools)
        tokens, spans = (jax.tree.map(lambda a: blocks_by_sequence(a, blocks), kept) for kept in (tokens, spans))
        number = jnp.minimum(counts // block, blocks - 1)[:, None, None, None, None]
        recent = jax.tree.map(lambda a: jnp.take_along_axis(a, number, 2)[:, :, 0], tokens)
        room = ((0, 0), (0, 0), (0, -(-capacity // block) - blocks), (0, 0))
        return Cache(recent, jax.tree.map(lambda a: jnp.pad(a, room), spans))

    def decode_step(self, cache, index, x, q, k, v):
        return jax.vmap(partial(_decode_one, pools=self.pools))(cache, index, q, k, v)

    def _block(self, length):
        return self.size_or_cheapest(self.block, cost, length)
