"""Longformer: a sliding window, and a few global positions, which see and are seen by all (Beltagy et al. 2020)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner.core.module import Attention
from combiner.core.registry import register
from combiner.ops.blocks import Blocks, KeyGroup, block_length
from combiner.ops.kv_cache import decode_window, init_window_cache
from combiner.ops.softmax import Drop, attend_full
from combiner.ops.windows import attend_window, neighbour_groups, window_mask
from combiner.patterns import Cost, check_positive, sparse


def attend_longformer(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    before: int,
    after: int,
    first: int,
    chunk: int,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """One softmax over a window and the `g` global positions, which come first; from those, over everything.

        A(i) = Σ_{j∈S(i)} softmax_j(q_i·k_j/√d) v_j
        S(i) = {j : i - before ≤ j ≤ i + after} ∪ {j < g} for i ≥ g        S(i) = [0, l) for i < g

    O(l·(before + after + chunk + g)) time and memory.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        before: how many positions before itself the window of a position holds.
        after: how many after it; 0, without global positions, is causal.
        first: the number `g` of global positions.
        chunk: a power of two, how many positions are computed at once. The result does not depend on it.
        valid: positions that are no padding; padding must hold finite numbers.
        segments: packed documents; they do not see each other.
        drop: dropout of the weights.
    """
    length = q.shape[1]
    first = min(first, length)
    blocks = Blocks.of(q, block_length(chunk, length), drop)
    tokens = blocks.tokens(q, k, v, causal=not (after or first), valid=valid, segments=segments)
    groups = neighbour_groups(blocks, tokens, before=before, after=after)
    if first:
        groups.append(_global_group(blocks, k[:, :first], v[:, :first], tokens.segment_ids, before))
    attended = attend_window(blocks, tokens, window_mask(blocks.size, before, after), groups, drop)
    if not first:
        return attended
    ids = tokens.segment_ids
    ids = None if ids is None else ids.reshape(blocks.batch, -1)[:, :length]
    mask = None if ids is None else ids[:, :first, None] == ids[:, None]
    return jnp.concatenate([attend_full(q[:, :first], k, v, mask, drop=drop), attended[:, first:]], axis=1)


def _global_group(blocks: Blocks, k: Array, v: Array, segment_ids: Array | None, before: int) -> KeyGroup:
    """The global positions, for every block, where they are not in the window anyway."""
    first = k.shape[1]
    position = jnp.arange(blocks.count * blocks.size).reshape(blocks.count, blocks.size, 1)
    mask = jnp.tile(position - before > jnp.arange(first), (blocks.batch, 1, 1))

    def spread(x: Array) -> Array:
        return jnp.repeat(x, blocks.count, axis=0)

    segment_ids = None if segment_ids is None else spread(segment_ids.reshape(blocks.batch, -1)[:, :first])
    return KeyGroup(spread(k), spread(v), mask, segment_ids)


@register('longformer')
class LongformerAttention(Attention):
    """Longformer's attention.

    Global positions share the projections of all others, so that this stays a function of q, k and v; the paper gives
    them their own. Windows are not dilated; the paper's are in a few heads of a causal model.

    Attributes:
        window: other positions that a position sees: half on each side, or (causal) all before.
        globals: how many positions, from the first on, see everyone and are seen by all. None for 1, as for a token CLS
            that is read out, and none if causal.
        chunk: a power of two, how many positions are computed at once.
    """

    window: int = 512
    globals: int | None = None
    chunk: int = 128

    zero_allowed = ('window', 'globals')
    supports_segments = True

    def pattern(self, length):
        reach, first = self._reach(), self._globals()
        check_positive(length=length)
        here = np.arange(length)
        distance = here - here[:, None]
        reached = (distance >= -reach['before']) & (distance <= reach['after'])
        return sparse(reached | (here < first) | (here[:, None] < first))

    def cost(self, length):
        reach, first = self._reach(), self._globals()
        check_positive(length=length)
        here = np.arange(min(first, length), length)
        start = np.maximum(here - reach['before'], 0)
        end = np.minimum(here + reach['after'] + 1, length)
        return Cost(int((end - start + np.minimum(start, first)).sum()) + min(first, length) * length, 0)

    def attend(self, q, k, v, **masks):
        return attend_longformer(q, k, v, **self._reach(), first=self._globals(), chunk=self.chunk, **masks)

    def init_cache(self, x, q, k, v, counts, capacity):
        return init_window_cache(k, v, counts, min(self.window + 1, capacity))

    def decode_step(self, cache, index, x, q, k, v):
        return decode_window(cache, index, q, k, v, index - self.window)

    def _reach(self) -> dict[str, int]:
        half = self.window // 2
        return {'before': self.window, 'after': 0} if self.causal else {'before': half, 'after': half}

    def _globals(self) -> int:
        if self.globals is None:
            return 0 if self.causal else 1
        if self.globals and self.causal:
            raise ValueError('global positions see what comes after them: leave globals unset, or use causal=False')
        return self.globals
