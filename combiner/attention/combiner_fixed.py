"""Combiner-Fixed: own block directly, every other block through one max-pooled summary (Combiner, section 4.1)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner import patterns
from combiner.core.pooled import Pooled
from combiner.core.registry import register
from combiner.costs import own_block_and_others
from combiner.kernels.choice import Implementation
from combiner.kernels.gpu import mechanisms as gpu
from combiner.kernels.tpu import mechanisms as tpu
from combiner.ops.blocks import (
    Blocks,
    KeyGroup,
    Recent,
    attend_groups,
    attend_one,
    blocks_by_sequence,
    clip_size,
    own_mask,
    split_blocks,
)
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.softmax import Drop
from combiner.ops.spans import summarise, summary_masks
from combiner.patterns import Cost, Pattern, check_positive, support, with_spans


def pattern(length: int, *, causal: bool, block: int) -> Pattern:
    """Returns the pattern: own block directly, every earlier (bidirectional: other) block as a span (section 4.1)."""
    check_positive(length=length, block=block)
    row = np.arange(length) // block
    rows = np.arange(row[-1] + 1)
    spans = rows[:, None] == row
    uses = rows < row[:, None] if causal else rows != row[:, None]
    return with_spans((row[:, None] == row) & support(length, causal=causal), spans, uses)


def cost(length: int, block: int, *, causal: bool) -> Cost:
    """Returns `pattern(…).cost()` in closed form: `O(l (block + l / block))`."""
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
    """Attends by equation (7): directly in the own block, through one span per earlier (bidirectional: other) block.

    Causal, the direct part ends at `i`. O(l·(block + l/block)) time and memory, least at `block = √l`. `block ≥ l` and
    `block = 1` are softmax attention. The summaries of a sequence are one matrix `[n d]` for each head: one product
    computes all span logits.

    Args:
        block: positions in a block; the last block may be partial.
        q, k, v, causal, pools, valid, segments, drop: see `core.mechanism`.
    """
    blocks = Blocks.of(q, clip_size(block, q.shape[1]), drop)
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments)
    counts = {'batch': blocks.batch, 'blocks': blocks.count}
    masks = summary_masks(tokens.segment_ids, causal=causal, packed=segments is not None, **counts)
    keys = blocks.size + sum(mask.visible.shape[-1] for mask in masks)

    def summarise_blocks(tokens, members):
        return [summarise(tokens.q, tokens.k, tokens.v, some, pools=pools) for some in members]

    def attend(tokens, visible):
        own, others = tokens.group(own_mask(blocks.size, causal=causal)), KeyGroup(span_k, span_v, visible)
        return attend_groups(tokens.q, [own, others], tokens.segment_ids, drop)

    spans = blocks.map(summarise_blocks, tokens, [mask.members for mask in masks], keys=keys)
    span_k, span_v = (jnp.concatenate(some, axis=2) for some in zip(*blocks.by_sequence(spans), strict=True))
    return blocks.attend(attend, tokens, jnp.concatenate([mask.visible for mask in masks], axis=-1), keys=keys)


class Cache(NamedTuple):
    """The open block, and the summaries of closed blocks, whose keys are dropped: O(block + l/block)."""

    recent: Recent
    spans: KeyGroup


def _decode_one(cache, index, q, k, v, pools):
    """Decodes one token of one sequence; `q`, `k`, `v` are `[h, d]`, `q` not scaled."""
    block, blocks = cache.recent.k.shape[1], cache.spans.k.shape[1]
    number, here = index // block, index % block
    recent = jax.tree.map(lambda held, new: held.at[:, here].set(new), cache.recent, Recent(q, k, v))
    inside = jnp.arange(block) <= here
    own, others = KeyGroup(recent.k, recent.v, inside), cache.spans._replace(mask=jnp.arange(blocks) < number)
    # Final, and first used, when the block is full.
    open_span = KeyGroup(*summarise(recent.q, recent.k, recent.v, inside, pools=pools))
    spans = jax.tree.map(lambda closed, one: closed.at[:, number].set(one), cache.spans, open_span)
    return Cache(recent, spans), attend_one(q, own, others)


@register('combiner_fixed')
class CombinerFixed(Pooled):
    """Combiner-Fixed with blocks of `block` positions, None for the cheapest power of two.

    See `kernels.choice` for `implementation`.
    """

    block: int | None = None
    implementation: str | None = None

    full_support = True
    supports_segments = True
    supports_context = True
    implementations = {  # noqa: RUF012
        'mosaic': tpu.FIXED,
        'triton': gpu.FIXED,
        'xla': Implementation(attend_combiner_fixed),
    }

    def pattern(self, length: int) -> patterns.Pattern:
        return pattern(length, causal=self.causal, block=self._block(length))

    def cost(self, length: int) -> patterns.Cost:
        return cost(length, self._block(length), causal=self.causal)

    def attend(self, q, k, v, context):
        return self.attend_by_best(q, k, v, context, block=self._block(q.shape[1]), pools=self.pools(context))

    def init_cache(self, q, k, v, context, counts, capacity):
        """Returns the open block of each sequence, and the summaries of all blocks with room for later ones."""
        block = self._block(capacity)
        blocks = -(-q.shape[1] // block)
        tokens = Recent(*(split_blocks(a, block) for a in (q, k, v)))
        spans = KeyGroup(*summarise(*tokens, pools=self.pools(context)))
        tokens, spans = (jax.tree.map(lambda a: blocks_by_sequence(a, blocks), kept) for kept in (tokens, spans))
        number = jnp.minimum(counts // block, blocks - 1)[:, None, None, None, None]
        recent = jax.tree.map(lambda a: jnp.take_along_axis(a, number, 2)[:, :, 0], tokens)
        room = ((0, 0), (0, 0), (0, -(-capacity // block) - blocks), (0, 0))
        return Cache(recent, jax.tree.map(lambda a: jnp.pad(a, room), spans))

    def decode_step(self, cache, index, q, k, v, context):
        return jax.vmap(partial(_decode_one, pools=self.pools(context)))(cache, index, q, k, v)

    def context_block(self, length, parts):
        return self._block(length)

    def _block(self, length):
        return self.size_or_cheapest(self.block, cost, length)
