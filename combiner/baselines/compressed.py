"""Compressed attention: a sliding window, and what is before it as one learned summary for each block.

After the compressed branch of Native Sparse Attention (Yuan et al. 2025) and DeepSeek-V4. Letters: as in `layout`, `n`
blocks that are summarised.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from combiner.attention.base import Attention
from combiner.attention.joint import Drop
from combiner.attention.layout import Summary, fit, split_labels
from combiner.attention.registry import register
from combiner.baselines.compressed_cache import start, step
from combiner.baselines.compressed_pattern import compressed, cost, uses
from combiner.baselines.compressed_summaries import summaries
from combiner.baselines.window_spans import attend_spans
from combiner.layers import parameter


def attend_compressed(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    gates: Summary,
    *,
    block: int,
    window: int,
    chunk: int = 64,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """One softmax over the last `window` positions and the summaries of the blocks that start before them.

        A(i) = Σ_{i - window < j ≤ i} p_j v_j + Σ_{n·block ≤ i - window} p_n V_n    p ∝ exp(q_i·k_j/√d), exp(q_i·K_n/√d)
        K_n  = Σ_{j ∈ block n} softmax_j(g^K·k_j) k_j                V_n = Σ_{j ∈ block n} softmax_j(g^V·v_j) v_j

    O(l·(window + l/block)) time and memory; on a CPU chunks are visited in steps (see `steps`).

    This project's reading: a block is seen from where it does not fit into the window any more, and is closed by then,
    as `window ≥ block - 1`. So the support is full, and part of the block across the window's edge is reached twice. In
    NSA blocks overlap, a network with positions in the block compresses them, and each branch has its own softmax; in
    DeepSeek-V4 gates follow from the input, by channel, and keys are values. Gates here are `pooling.attention`'s.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        gates: the vectors `[h, d]` of keys and of values.
        block: positions in a summary.
        window: positions that are seen themselves, the own one included.
        chunk: a power of two, how many positions are computed at once. The result does not depend on it.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the weights.
    """
    batch, length, heads, width = q.shape
    block = fit(block, length)
    spans = summaries(k, v, gates, block=block, valid=valid)
    spans = Summary(*(x.reshape(heads, batch, -1, width) for x in spans))
    seen = jnp.asarray(uses(length, spans.key.shape[2], block, window))[None]
    if valid is not None:
        seen = seen & split_labels(valid, block).any(axis=-1).reshape(batch, 1, -1)
    masks = {'valid': valid, 'drop': drop}
    return attend_spans(q, k, v, spans, seen, before=window - 1, after=0, chunk=chunk, **masks)


@register('compressed')
class CompressedAttention(Attention):
    """Compressed attention, causal only, with learned gates of each head.

    Attributes:
        block: positions in a summary; None for the greatest power of two up to `window` or, without it, the cheapest.
        window: positions that are seen themselves; None for as many as a block has.
        chunk: a power of two, how many positions are computed at once.
    """

    block: int | None = None
    window: int | None = None
    chunk: int = 64

    full_support = True
    forms = (True,)
    owns = 'gates'

    def sizes(self, length: int) -> dict[str, int]:
        """The block and the window.

        Raises:
            ValueError: the window leaves positions unseen of a block that is not closed.
        """
        block = self.block or (1 << self.window.bit_length() - 1 if self.window else None)
        block = block or self.size_or_cheapest(None, cost, self.planned_length or length)
        window = self.window or block
        if window < block - 1:
            raise ValueError(f'window={window} is too short for block={block}; choose a window >= block - 1')
        return {'block': block, 'window': window}

    def pattern(self, length):
        return compressed(length, **self.sizes(length))

    def cost(self, length):
        return cost(length, *self.sizes(length).values())

    def setup(self) -> None:
        """Makes the projections and the gates."""
        super().setup()
        shape = (self.heads, self.head_width)
        init = nn.initializers.normal(shape[1] ** -0.5)
        names = ('key_gate', 'value_gate')
        self.gates = Summary(*(parameter(self, name, init, ('heads', 'head_dim'), shape) for name in names))

    def attend_from(self, x, q, k, v, *, valid=None, drop=None):
        settings = {**self.sizes(x.shape[1]), 'chunk': self.chunk}
        return attend_compressed(q, k, v, self.gates, **settings, valid=valid, drop=drop)

    def start(self, x, q, k, v, counts, capacity):
        if not (self.block or self.window or self.planned_length):
            raise ValueError('CompressedAttention decodes with a planned_length, or a block or window that is given')
        return start(k, v, self.gates, counts, capacity, **self.sizes(capacity))

    def step(self, cache, index, x, q, k, v):
        one = partial(step, gates=self.gates, **self.sizes(self.planned_length or 1))
        return jax.vmap(one)(cache, index, q * q.shape[-1] ** -0.5, k, v)
