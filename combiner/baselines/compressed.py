"""Compressed attention: a sliding window, and each block before it as one learned summary.

After the compressed branch of Native Sparse Attention (Yuan et al. 2025) and DeepSeek-V4.

Letters: as in `ops.blocks`, `n` summarised blocks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from combiner.core.mechanism import Context, Mechanism
from combiner.core.registry import register
from combiner.layers import parameters
from combiner.ops.blocks import KeyGroup, attend_one, blocks_by_sequence, clip_size, split_blocks, split_ids
from combiner.ops.pooling import attention
from combiner.ops.softmax import Drop
from combiner.ops.windows import WindowCache, attend_window_and_spans, cached_positions, init_window_cache
from combiner.patterns import Cost, Pattern, check_positive


def pattern(length: int, *, block: int, window: int) -> Pattern:
    """Returns the pattern: the last `window` positions directly, and every block that starts before them as a span."""
    check_positive(length=length, block=block, window=window)
    position = np.arange(length)
    blocks = np.arange(-(-length // block))
    visible = uses(length, len(blocks), block, window)
    used = visible.any(axis=0)
    distance = position[:, None] - position
    return Pattern((distance >= 0) & (distance < window), blocks[used, None] == position // block, visible[:, used])


def uses(length: int, blocks: int, block: int, window: int) -> Bool[np.ndarray, 'l n']:
    """Returns which blocks a position uses: blocks that start before its window."""
    return np.arange(blocks) * block <= np.arange(length)[:, None] - window


def cost(length: int, block: int, window: int | None = None, *, causal: bool = True) -> Cost:
    """Returns `pattern(…).cost()` in closed form; the window is as long as the block if not given.

    Raises:
        ValueError: it is not causal, and has no pattern.
    """
    if not causal:
        raise ValueError('compressed attention is causal')
    window = min(window or block, length)
    whole, rest = divmod(length - window, block)
    terms = window * (window + 1) // 2 + (length - window) * window
    return Cost(terms + block * whole * (whole + 1) // 2 + rest * (whole + 1), (whole + (rest > 0)) * block)


class Gates(NamedTuple):
    """The learned vectors by which the keys and the values of a block are pooled."""

    k: Float[Array, 'h d']
    v: Float[Array, 'h d']


def attend_compressed(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    gates: Gates,
    *,
    block: int,
    window: int,
    chunk: int = 64,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends in one softmax to the last `window` positions and the summaries of the blocks that start before them.

        A(i) = Σ_{i - window < j ≤ i} p_j v_j + Σ_{n·block ≤ i - window} p_n V_n    p ∝ exp(q_i·k_j/√d), exp(q_i·K_n/√d)
        K_n  = Σ_{j ∈ block n} softmax_j(g^K·k_j) k_j                V_n = Σ_{j ∈ block n} softmax_j(g^V·v_j) v_j

    O(l·(window + l/block)) time and memory; on a CPU in chunks (see `ops.chunking`).

    This project's reading: a position uses a block that no longer fits into its window. Such a block is closed, as
    `window ≥ block - 1`. So the support is full, and part of the block across the window's edge is reached twice. In
    NSA blocks overlap, a network with positions in the block compresses them, and each branch has its own softmax; in
    DeepSeek-V4 gates follow from the input, by channel, and keys are values. Gates here are `pooling.attention`'s.

    Args:
        gates: the vectors `[h, d]` of keys and of values.
        block: positions in a summary.
        window: positions attended to directly, the own one included.
        chunk: a power of two, the number of positions computed at once. The result does not depend on it.
        q, k, v, valid, drop: see `core.mechanism`.
    """
    batch, length, heads, width = q.shape
    block = clip_size(block, length)
    span_k, span_v = (x.reshape(heads, batch, -1, width) for x in summaries(k, v, gates, block=block, valid=valid)[:2])
    visible = jnp.asarray(uses(length, span_k.shape[2], block, window))[None]
    if valid is not None:
        visible = visible & split_ids(valid, block).any(axis=-1).reshape(batch, 1, -1)
    spans = KeyGroup(span_k, span_v, visible)
    return attend_window_and_spans(q, k, v, spans, before=window - 1, after=0, chunk=chunk, valid=valid, drop=drop)


def pooled(
    k: Float[Array, 'h *n c d'], v: Float[Array, 'h *n c d'], gates: Gates, members: Bool[Array, '*n c']
) -> KeyGroup:
    """Returns gated means of the members of each block; zeros for a block without members."""
    return KeyGroup(attention(gates.k)(k, members), attention(gates.v)(v, members))


def summaries(
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    gates: Gates,
    *,
    block: int,
    valid: Bool[Array, 'b l'] | None = None,
) -> KeyGroup:
    """Summarises the blocks of all sequences, `[h, b·n, d]`."""
    members = split_ids(jnp.ones(k.shape[:2], bool) if valid is None else valid, block)
    return pooled(split_blocks(k, block), split_blocks(v, block), gates, members)


class Cache(NamedTuple):
    """The last positions, and summaries: O(window + l/block)."""

    recent: WindowCache
    spans: KeyGroup


def init_cache(
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    gates: Gates,
    counts: Int[Array, ' b'],
    capacity: int,
    *,
    block: int,
    window: int,
) -> Cache:
    """Returns a cache of the first `counts` positions. Its contents for other positions are overwritten before use."""
    kept, block = min(max(window, block), capacity), min(block, capacity)
    blocks = -(-k.shape[1] // block)
    room = ((0, 0), (0, 0), (0, -(-capacity // block) - blocks), (0, 0))
    spans = jax.tree.map(lambda x: jnp.pad(blocks_by_sequence(x, blocks), room), summaries(k, v, gates, block=block))
    return Cache(init_window_cache(k, v, counts, kept), spans)


def decode_step(
    cache: Cache,
    index: Int[Array, ''],
    q: Float[Array, 'h d'],
    k: Float[Array, 'h d'],
    v: Float[Array, 'h d'],
    *,
    gates: Gates,
    block: int,
    window: int,
) -> tuple[Cache, Float[Array, 'h d']]:
    """Decodes one token of one sequence; `q` is not scaled."""
    kept, own = cache.recent.k.shape[1], index // block
    recent = WindowCache(*(x.at[:, index % kept].set(new) for x, new in zip(cache.recent, (k, v), strict=True)))
    (position,) = cached_positions(index[None], kept)
    one = pooled(*recent, gates, position >= own * block)  # final, and first used, when it is closed
    spans = jax.tree.map(lambda held, new: held.at[:, own].set(new), cache.spans, one)
    near = KeyGroup(*recent, mask=(position >= 0) & (position > index - window))
    far = spans._replace(mask=jnp.arange(spans.k.shape[1]) * block <= index - window)
    return Cache(recent, spans), attend_one(q, near, far)


@register('compressed')
class Compressed(Mechanism):
    """Compressed attention, causal only, with learned gates of each head.

    Attributes:
        block: positions in a summary; None for the greatest power of two up to `window` or, without it, the cheapest.
        window: positions attended to directly; None for the length of a block.
        chunk: a power of two, the number of positions computed at once.
    """

    block: int | None = None
    window: int | None = None
    chunk: int = 64

    full_support = True
    supported_causal = (True,)
    requires = 'gates'

    def sizes(self, length: int) -> tuple[int, int]:
        """Returns the block and the window.

        Raises:
            ValueError: the window does not reach all positions of a block that is not closed.
        """
        block = self.block or (1 << self.window.bit_length() - 1 if self.window else None)
        block = block or self.size_or_cheapest(None, cost, self.max_length or length)
        window = self.window or block
        if window < block - 1:
            raise ValueError(f'window={window} is too short for block={block}; choose a window >= block - 1')
        return block, window

    def pattern(self, length):
        block, window = self.sizes(length)
        return pattern(length, block=block, window=window)

    def cost(self, length):
        return cost(length, *self.sizes(length))

    def variables(self, module):
        """Makes the gates."""
        gate = (
            nn.initializers.normal(module.head_width**-0.5),
            (('heads', module.heads), ('head_dim', module.head_width)),
        )
        return parameters(module, {'key_gate': gate, 'value_gate': gate})

    def gates(self, context: Context) -> Gates:
        """Returns the learned vectors."""
        own = self.own_variables(context)
        return Gates(own['key_gate'], own['value_gate'])

    def attend(self, q, k, v, context):
        gates, (block, window) = self.gates(context), self.sizes(q.shape[1])
        return attend_compressed(
            q, k, v, gates, block=block, window=window, chunk=self.chunk, valid=context.valid, drop=context.drop
        )

    def init_cache(self, q, k, v, context, counts, capacity):
        if not (self.block or self.window or self.max_length):
            raise ValueError('Compressed decodes with a max_length, or a block or window that is given')
        block, window = self.sizes(capacity)
        return init_cache(k, v, self.gates(context), counts, capacity, block=block, window=window)

    def decode_step(self, cache, index, q, k, v, context):
        block, window = self.sizes(self.max_length or 1)
        one = partial(decode_step, gates=self.gates(context), block=block, window=window)
        return jax.vmap(one)(cache, index, q, k, v)
