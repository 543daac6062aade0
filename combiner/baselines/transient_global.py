"""LongT5's transient global attention: a window, and a summary of each block of the input (Guo et al. 2022).

Letters: `b` batch, `l` length, `h` heads, `d` head width, `e` model width, `n` blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.layers import parameters
from combiner.ops.blocks import KeyGroup, clip_size, split_ids
from combiner.ops.softmax import Drop
from combiner.ops.windows import attend_window_and_spans
from combiner.patterns import Cost, Pattern, check_positive

EPSILON = 1e-6


def summarise_input(x: Float[Array, 'b l e'], scale: Float[Array, ' e'], block: int) -> Float[Array, 'b n e']:
    """Returns `s_n = g · x_n / √(mean x_n² + ε)` of block sums `x_n = Σ_{j ∈ block n} x_j`, in float32 at least."""
    x = jnp.pad(x.astype(jnp.promote_types(x.dtype, jnp.float32)), ((0, 0), (0, -x.shape[1] % block), (0, 0)))
    total = x.reshape(x.shape[0], -1, block, x.shape[2]).sum(axis=2)
    return total * jax.lax.rsqrt(jnp.mean(total**2, axis=-1, keepdims=True) + EPSILON) * scale


def attend_transient_global(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    global_k: Float[Array, 'b n h d'],
    global_v: Float[Array, 'b n h d'],
    *,
    block: int,
    radius: int,
    chunk: int = 128,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends in one softmax to a position's window and one global key for each block of the input, the own included.

        A(i) = Σ_{|i - j| ≤ radius} p_j v_j + Σ_n p_n v^g_n        p ∝ exp(q_i·k_j/√d), exp(q_i·k^g_n/√d)
        k^g_n = W_K s_n        v^g_n = W_V s_n        s_n = summarise_input(x)_n

    So the positions of the window are reached twice, as published. O(l·(radius + l/block)) time and memory.

    Args:
        global_k: keys of the summaries.
        global_v: values of the summaries.
        block: positions in a summary.
        radius: positions of the window on either side.
        chunk: a power of two, the number of positions computed at once. The result does not depend on it.
        q, k, v, valid, drop: see `core.mechanism`; no position attends to a block of padding.
    """
    batch, length = q.shape[:2]
    block = clip_size(block, length)
    inside = jnp.ones((batch, length), bool) if valid is None else valid
    visible = split_ids(inside, block).any(axis=-1).reshape(batch, 1, -1)
    spans = KeyGroup(jnp.moveaxis(global_k, 2, 0), jnp.moveaxis(global_v, 2, 0), visible)
    return attend_window_and_spans(q, k, v, spans, before=radius, after=radius, chunk=chunk, valid=valid, drop=drop)


@register('transient_global')
class TransientGlobal(Mechanism):
    """Transient global attention, bidirectional only; summaries pass through the same projections as all positions.

    Deviations: logits get no relative position bias, as nowhere in this library (`rotary` does not rotate summaries),
    and keep their scale `1/√d`. The last block may be partial; the authors' code adds the remaining positions to the
    block before.

    Attributes:
        block: positions in a summary.
        radius: positions of the window on either side.
        chunk: a power of two, the number of positions computed at once.
    """

    block: int = 16
    radius: int = 127
    chunk: int = 128

    full_support = True
    supported_causal = (False,)
    requires = 'the scale of a normalisation'

    def pattern(self, length):
        check_positive(length=length, block=self.block)
        position = np.arange(length)
        window = abs(position[:, None] - position) <= self.radius
        spans = np.arange(-(-length // self.block))[:, None] == position // self.block
        return Pattern(window, spans, np.ones((length, len(spans)), bool))

    def cost(self, length):
        check_positive(length=length, block=self.block)
        reach, blocks = min(self.radius, length - 1), -(-length // self.block)
        return Cost(length * (2 * reach + 1) - reach * (reach + 1) + length * blocks, length)

    def variables(self, module):
        """Makes the scale."""
        return parameters(module, {'global_scale': (nn.initializers.ones, (('embed', module.width),))})

    def attend(self, q, k, v, context):
        scale, block = self.own_variables(context)['global_scale'], min(self.block, q.shape[1])
        _, global_k, global_v = context.project(summarise_input(context.x, scale, block))
        radius, chunk, valid, drop = self.radius, self.chunk, context.valid, context.drop
        return attend_transient_global(
            q, k, v, global_k, global_v, block=block, radius=radius, chunk=chunk, valid=valid, drop=drop
        )
