"""Longformer: a window, and a few global positions, which attend to all, and all to them (Beltagy et al. 2020)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner.core.mechanism import Count, Mechanism
from combiner.core.registry import register
from combiner.ops.blocks import Blocks, KeyGroup, block_length
from combiner.ops.softmax import Drop, attend_full
from combiner.ops.windows import attend_window, decode_window, init_window_cache, neighbour_groups, window_mask
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
    """Attends in one softmax to a window and the `g` global positions, the first ones; these attend to all positions.

        A(i) = Σ_{j∈S(i)} softmax_j(q_i·k_j/√d) v_j
        S(i) = {j : i - before ≤ j ≤ i + after} ∪ {j < g} for i ≥ g        S(i) = [0, l) for i < g

    O(l·(before + after + chunk + g)) time and memory.

    Args:
        before: number of positions in a window before its own.
        after: number of positions after it; 0, without global positions, is causal.
        first: the number `g` of global positions.
        chunk: a power of two, the number of positions computed at once. The result does not depend on it.
        q, k, v, valid, segments, drop: see `core.mechanism`.
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
    """Returns the global positions for every block, masked where they are in the window."""
    first = k.shape[1]
    position = jnp.arange(blocks.count * blocks.size).reshape(blocks.count, blocks.size, 1)
    mask = jnp.tile(position - before > jnp.arange(first), (blocks.batch, 1, 1))

    def spread(x: Array) -> Array:
        return jnp.repeat(x, blocks.count, axis=0)

    segment_ids = None if segment_ids is None else spread(segment_ids.reshape(blocks.batch, -1)[:, :first])
    return KeyGroup(spread(k), spread(v), mask, segment_ids)


@register('longformer')
class Longformer(Mechanism):
    """Longformer's attention.

    Global positions share the projections of all others, so that this stays a function of q, k and v; the paper gives
    them their own. Windows are not dilated; the paper dilates them in a few heads of a causal model.

    Attributes:
        window: number of other positions in a window: half on each side, or (causal) all before.
        globals: number of global positions, the first ones. They attend to all, and all to them. None for 1, as for a
            token CLS whose output is used, and for 0 if causal.
        chunk: a power of two, the number of positions computed at once.
    """

    window: Count = 512
    globals: Count | None = None
    chunk: int = 128

    supports_segments = True

    def pattern(self, length):
        (before, after), first = self._reach(), self._globals()
        check_positive(length=length)
        here = np.arange(length)
        distance = here - here[:, None]
        reached = (distance >= -before) & (distance <= after)
        return sparse(reached | (here < first) | (here[:, None] < first))

    def cost(self, length):
        (before, after), first = self._reach(), self._globals()
        check_positive(length=length)
        here = np.arange(min(first, length), length)
        start = np.maximum(here - before, 0)
        end = np.minimum(here + after + 1, length)
        return Cost(int((end - start + np.minimum(start, first)).sum()) + min(first, length) * length, 0)

    def attend(self, q, k, v, context):
        before, after = self._reach()
        first, chunk = self._globals(), self.chunk
        valid, segments, drop = context.valid, context.segments, context.drop
        return attend_longformer(
            q, k, v, before=before, after=after, first=first, chunk=chunk, valid=valid, segments=segments, drop=drop
        )

    def init_cache(self, q, k, v, context, counts, capacity):
        return init_window_cache(k, v, counts, min(self.window + 1, capacity))

    def decode_step(self, cache, index, q, k, v, context):
        return decode_window(cache, index, q, k, v, index - self.window)

    def _reach(self) -> tuple[int, int]:
        """Returns the number of positions before and after its own in a window."""
        return (self.window, 0) if self.causal else (self.window // 2, self.window // 2)

    def _globals(self) -> int:
        if self.globals is None:
            return 0 if self.causal else 1
        if self.globals and self.causal:
            raise ValueError('global positions see what comes after them: leave globals unset, or use causal=False')
        return self.globals
