"""Local attention: a block of positions attends to itself and its neighbourhood (Parmar et al. 2018)."""

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner.core.mechanism import Count, Mechanism
from combiner.core.registry import register
from combiner.ops.blocks import Blocks, clip_size, own_mask
from combiner.ops.softmax import Drop
from combiner.ops.windows import attend_window, decode_window, init_window_cache, neighbour_groups
from combiner.patterns import Cost, check_positive, sparse


def attend_local(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    block: int,
    causal: bool,
    overlap: int = 0,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends to the own block of queries and the `overlap` positions before it (bidirectional: and after it).

        A(i) = Σ_{j∈M(i)} softmax_j(q_i·k_j/√d) v_j        M(i) = [s - overlap, s + block) ∩ [0, i]
        s = ⌊i / block⌋ block                              bidirectional: M(i) = [s - overlap, s + block + overlap)

    O(l·(block + overlap)) time and memory. In the paper, `block` is `l_q` and `overlap` is `l_m`.

    Args:
        block: positions in a block; the last block may be partial.
        overlap: positions of the memory beyond the block.
        q, k, v, causal, valid, segments, drop: see `core.mechanism`.
    """
    check_sizes(block, overlap)
    blocks = Blocks.of(q, clip_size(block, q.shape[1]), drop)
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments)
    after = 0 if causal else overlap
    groups = neighbour_groups(blocks, tokens, before=overlap, after=after, sliding=False)
    return attend_window(blocks, tokens, own_mask(blocks.size, causal=causal), groups, drop)


def check_sizes(block: int, overlap: int) -> None:
    """Refuses invalid sizes.

    Raises:
        ValueError: the block is empty, or the overlap negative.
    """
    check_positive(block=block)
    if overlap < 0:
        raise ValueError(f'overlap must be at least 0, got {overlap}')


@register('local')
class Local(Mechanism):
    """Local attention in blocks of `block` positions, which attend to `overlap` positions beyond their block.

    Without overlap, the default, blocks do not attend to each other: as in Long Range Arena (Tay et al. 2021).
    """

    block: int = 64
    overlap: Count = 0

    supports_segments = True

    def pattern(self, length):
        first, end = self._memory(length)
        here = np.arange(length)
        return sparse((here >= first[:, None]) & (here < end[:, None]))

    def cost(self, length):
        first, end = self._memory(length)
        return Cost(int((end - first).sum()), 0)

    def attend(self, q, k, v, context):
        block, overlap = self.block, self.overlap
        valid, segments, drop = context.valid, context.segments, context.drop
        return attend_local(
            q, k, v, block=block, causal=self.causal, overlap=overlap, valid=valid, segments=segments, drop=drop
        )

    def init_cache(self, q, k, v, context, counts, capacity):
        return init_window_cache(k, v, counts, min(self.block + self.overlap, capacity))

    def decode_step(self, cache, index, q, k, v, context):
        return decode_window(cache, index, q, k, v, index // self.block * self.block - self.overlap)

    def _memory(self, length: int) -> tuple[Int[np.ndarray, ' l'], Int[np.ndarray, ' l']]:
        """Returns for each position the range to which it attends: its first position, and its end (exclusive)."""
        check_sizes(self.block, self.overlap)
        check_positive(length=length)
        here = np.arange(length)
        block = here // self.block * self.block
        end = here + 1 if self.causal else np.minimum(block + self.block + self.overlap, length)
        return np.maximum(block - self.overlap, 0), end
