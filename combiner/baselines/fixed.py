"""Sparse Transformer's "fixed" attention: own block, and the last positions of every block (Child et al. 2019)."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.costs import triangle
from combiner.ops.blocks import Blocks, KeyGroup, clip_size, own_mask
from combiner.ops.segments import same_segment
from combiner.ops.softmax import Drop
from combiner.ops.spans import other_blocks_mask
from combiner.ops.windows import attend_window, decode_gathered, init_full_cache
from combiner.patterns import Cost, Pattern, check_positive, sparse, support


def pattern(length: int, *, causal: bool, block: int, summary: int = 1) -> Pattern:
    """Returns the pattern of "fixed" attention (Child et al. 2019): own block, last `summary` positions of each block.

    Args:
        length: number of positions.
        causal: whether a position attends to itself and earlier positions only.
        block: positions in a block; the last block may be partial.
        summary: number of last positions of each block to which every position attends.
    """
    check_positive(block=block, summary=summary)
    row, column = np.divmod(np.arange(length), block)
    own_block = row[:, None] == row
    last = column >= block - summary
    return sparse((own_block | last[None, :]) & support(length, causal=causal))


def cost(length: int, block: int, summary: int = 1, *, causal: bool) -> Cost:
    """Returns `pattern(…).cost()` in closed form."""
    whole, rest = divmod(length, block)
    summary = min(summary, block)
    if causal:
        direct = whole * triangle(block) + triangle(rest)
        return Cost(direct + summary * (block * triangle(whole - 1) + rest * whole), 0)
    direct = whole * block**2 + rest**2
    visible_of_rest = max(0, rest - (block - summary))
    return Cost(direct + whole * block * ((whole - 1) * summary + visible_of_rest) + rest * whole * summary, 0)


def attend_fixed(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    block: int,
    causal: bool,
    summary: int = 1,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends to the own block and the last `summary` positions of every other block (causal: `j ≤ i`).

    O(l·(block + summary·l/block)) time and memory. These last positions must carry all information of their block;
    `combiner_fixed` replaces them by summaries of the whole block.

    Args:
        block: positions in a block; the last block may be partial.
        summary: positions at the end of each block to which every position attends.
        q, k, v, causal, valid, segments, drop: see `core.mechanism`.
    """
    if summary < 1:
        raise ValueError(f'summary must be at least 1, got {summary}')
    block = clip_size(block, q.shape[1])
    summary = min(summary, block)
    blocks = Blocks.of(q, block, drop)
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments)
    last_k, last_v = (blocks.by_sequence(blocks.split(x)[:, -summary:].swapaxes(1, 2)) for x in (k, v))
    others = jnp.repeat(other_blocks_mask(blocks.batch, blocks.count, causal=causal), summary, axis=-1)
    last_ids = None if tokens.segment_ids is None else tokens.segment_ids[:, -summary:].reshape(blocks.batch, -1)
    last_ids = None if last_ids is None else jnp.repeat(last_ids, blocks.count, axis=0)
    visible = same_segment(tokens.segment_ids, last_ids, others)
    shared = KeyGroup(last_k, last_v, visible)
    return attend_window(blocks, tokens, own_mask(block, causal=causal), [], drop, shared=shared)


@register('fixed')
class Fixed(Mechanism):
    """Sparse "fixed" attention; `block` None for the cheapest power of two."""

    block: int | None = None
    summary: int = 1

    supports_segments = True

    def pattern(self, length):
        return pattern(length, causal=self.causal, block=self._block(length), summary=self.summary)

    def cost(self, length):
        return cost(length, self._block(length), self.summary, causal=self.causal)

    def attend(self, q, k, v, context):
        block, summary = self._block(q.shape[1]), self.summary
        valid, segments, drop = context.valid, context.segments, context.drop
        return attend_fixed(
            q, k, v, block=block, causal=self.causal, summary=summary, valid=valid, segments=segments, drop=drop
        )

    def init_cache(self, q, k, v, context, counts, capacity):
        return init_full_cache(k, v, capacity)

    def decode_step(self, cache, index, q, k, v, context):
        """Attends to the own block so far and to the last positions of the blocks before it."""
        block = self._block(cache.k.shape[2])
        blocks = -(-cache.k.shape[2] // block)
        first = index[:, None] // block * block
        own = first + jnp.arange(block)
        last = (jnp.arange(blocks)[:, None] * block + jnp.arange(max(0, block - self.summary), block)).reshape(1, -1)
        at = jnp.concatenate([own, jnp.broadcast_to(last, (len(index), last.shape[1]))], axis=1)
        visible = jnp.concatenate([own <= index[:, None], last < first], axis=1)
        return decode_gathered(cache, index, q, k, v, at, visible)

    def _block(self, length):
        return self.size_or_cheapest(self.block, partial(cost, summary=self.summary), length)
