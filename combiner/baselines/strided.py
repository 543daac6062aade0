"""Sparse Transformer's "strided" attention: the last positions, and every `stride`-th before (Child et al. 2019)."""

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.ops.blocks import Blocks, clip_size, heads_first, merge_blocks, scale_queries
from combiner.ops.chunking import map_heads
from combiner.ops.grid import direct_in_column, make_grid, transpose_lines
from combiner.ops.segments import same_segment
from combiner.ops.softmax import Drop, merge_partials, partial_softmax
from combiner.ops.windows import decode_gathered, init_full_cache, neighbour_groups, window_mask
from combiner.patterns import Cost, check_positive, sparse, support


def attend_strided(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    stride: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends in one softmax to the last `stride` positions and every `stride`-th one before (the paper's merged head).

        A(i) = Σ_{j∈S(i)} softmax_j(q_i·k_j/√d) v_j        S(i) = {j ≤ i : i - j < stride or stride divides i - j}

    O(l·(stride + l/stride)) time and memory. In a grid of `stride` columns, the far positions are in the own column
    above, and the last `stride` are in the own row and the row above.

    Args:
        stride: length of a grid row.
        causal: whether a position attends to itself and earlier positions only; if not, `|i - j|` replaces `i - j`:
            this project's choice.
        q, k, v, valid, segments, drop: see `core.mechanism`.
    """
    check_positive(stride=stride)
    length = q.shape[1]
    columns = clip_size(stride, length)

    def attend(q: Array, k: Array, v: Array, valid: Array | None, segments: Array | None) -> Array:
        """Attends for some heads of some sequences."""
        cells = make_grid(q, k, v, columns=columns, causal=causal, valid=valid, segments=segments, drop=drop)
        blocks = Blocks.of(q, columns)
        tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments)
        before, after = columns - 1, 0 if causal else columns - 1
        neighbours = map(heads_first, neighbour_groups(blocks, tokens, before=before, after=after))
        scaled, ids = scale_queries(cells.rows.q), tokens.segment_ids
        sums = [transpose_lines(direct_in_column(cells), columns)]
        for group in (cells.rows.group(window_mask(columns, before, after)), *neighbours):
            visible = same_segment(ids, group.segment_ids, group.mask)
            sums.append(partial_softmax(scaled, group.k, group.v, visible, drop))
        return merge_blocks(merge_partials(*sums).normalize().astype(v.dtype), length)

    keys = max(columns, -(-length // columns))
    return map_heads(attend, q, k, v, valid, segments, keys=keys, at_once=drop is not None)


def cost_of_strided(length: int, stride: int, *, causal: bool) -> Cost:
    """Returns the cost of the pattern: at each distance in the pattern, one term for every pair."""
    check_positive(length=length, stride=stride)
    before = int((length - distances(length, stride)).sum())
    return Cost(before if causal else 2 * before - length, 0)


def distances(length: int, stride: int) -> Int[np.ndarray, ' n']:
    """Returns the distances in the pattern."""
    return np.concatenate([np.arange(min(stride, length)), np.arange(stride, length, stride)])


@register('strided')
class Strided(Mechanism):
    """Sparse "strided" attention; `stride` None for the cheapest power of two."""

    stride: int | None = None

    supports_segments = True

    def pattern(self, length):
        stride = self._stride(length)
        check_positive(stride=stride)
        distance = abs(np.arange(length)[:, None] - np.arange(length))
        return sparse(((distance < stride) | (distance % stride == 0)) & support(length, causal=self.causal))

    def cost(self, length):
        return cost_of_strided(length, self._stride(length), causal=self.causal)

    def attend(self, q, k, v, context):
        stride = self._stride(q.shape[1])
        valid, segments, drop = context.valid, context.segments, context.drop
        return attend_strided(q, k, v, stride=stride, causal=self.causal, valid=valid, segments=segments, drop=drop)

    def init_cache(self, q, k, v, context, counts, capacity):
        return init_full_cache(k, v, capacity)

    def decode_step(self, cache, index, q, k, v, context):
        capacity = cache.k.shape[2]
        at = index[:, None] - distances(capacity, self._stride(capacity))
        return decode_gathered(cache, index, q, k, v, at, at >= 0)

    def _stride(self, length):
        return self.size_or_cheapest(self.stride, cost_of_strided, length)
