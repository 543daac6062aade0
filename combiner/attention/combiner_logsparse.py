"""Combiner-Logsparse: one summary for each scale of distance (Combiner, section 4.2)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner import costs, patterns
from combiner.attention import combiner_logsparse_cache as logsparse_cache
from combiner.attention.distant_siblings import beyond_blocks
from combiner.attention.folds import label
from combiner.attention.joint import Drop
from combiner.attention.layout import flatten, scaled, split_all
from combiner.attention.pooled import PooledAttention
from combiner.attention.pooling import PLAIN, Pools
from combiner.attention.registry import register
from combiner.attention.siblings import LEFT, RIGHT, attend_blocks, block_length, within_blocks
from combiner.attention.steps import divide, visit


def attend_combiner_logsparse(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    chunk: int,
    causal: bool,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Equation (7) with one span for each level `t ≥ 1`: the sibling `((i >> t) ^ 1) << t` of `i`'s block of `2^t`.

    Direct are `i` and its sibling at level 0. Causal: only siblings before `i`. O(l log l) time, O(l) memory.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        chunk: a power of two, the length of the blocks that are computed at once. The result does not depend on it.
        causal: whether a position sees only itself and what is before it.
        pools: how the members of a span become its summary query and key.
        valid: positions that are no padding; padding must hold finite numbers.
        segments: packed documents, each a contiguous run of positions with one number; they do not see each other.
        drop: dropout of the joint weights.
    """
    batch, length, heads, width = q.shape
    block = block_length(chunk, length)
    labels = label(batch, length, block, causal=causal, valid=valid, segments=segments)
    q, k, v = (flatten(x, block) for x in (q, k, v))
    sides = (LEFT,) if causal else (LEFT, RIGHT)
    blocks = len(q) // (batch * block)
    steps = divide(len(q) * heads * 2 * block, blocks, at_once=drop is not None)
    options = {'block': block, 'batch': batch, 'steps': steps}
    far = [beyond_blocks(q, k, v, labels, side, pools, **options) for side in sides if blocks > 1]
    pairs = jnp.asarray(patterns.combiner_logsparse(block, causal=causal).direct)

    def attend(q, k, v, labels, far):
        """The attended values of some blocks."""
        q, k, v = split_all(block, q, k, v)
        groups = [within_blocks(q, k, v, labels, side, pools) for side in sides if block > 2]
        groups += [group.turn() for group in far]
        return attend_blocks(scaled(q), k, v, labels, pairs, groups, drop)

    attended = visit(attend, steps, batch, q, k, v, labels, far)
    return attended.reshape(batch, -1, heads, width)[:, :length]


@register('combiner_logsparse')
class CombinerLogsparseAttention(PooledAttention):
    """Combiner-Logsparse; `chunk`, a power of two, is how many positions are computed at once, for speed alone."""

    chunk: int = 64

    full_support = packs = True

    def pattern(self, length):
        return patterns.combiner_logsparse(length, causal=self.causal)

    def cost(self, length):
        return costs.combiner_logsparse(length, causal=self.causal)

    def attend_pooled(self, pools, q, k, v, **masks):
        return attend_combiner_logsparse(q, k, v, chunk=self.chunk, causal=self.causal, pools=pools, **masks)

    def start(self, x, q, k, v, counts, capacity):
        return logsparse_cache.start(q, k, v, counts, capacity, self.pools)

    def step(self, cache, index, x, q, k, v):
        return logsparse_cache.step(cache, index, q, k, v, self.pools)
