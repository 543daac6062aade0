"""Sparse Logsparse attention: one position for each scale of distance (Li et al. 2019, as in Combiner, section 4.2)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.costs import siblings
from combiner.ops.blocks import LEFT, RIGHT, Blocks, KeyGroup, Tokens, block_length
from combiner.ops.softmax import Drop
from combiner.ops.windows import attend_window, decode_gathered, init_full_cache
from combiner.patterns import Cost, Pattern, check_positive, sparse


def pattern(length: int, *, causal: bool) -> Pattern:
    """Returns the pattern (Li et al. 2019, as in Combiner, section 4.2): the position itself and one for each scale.

    At each level it is the position of the own block's sibling next to that block: `((i >> t) << t) - 1` for each set
    bit of `i`. Bidirectional: `((i >> t) + 1) << t` too, for each zero bit, this project's choice.
    """
    check_positive(length=length)
    position, reached = np.arange(length), np.eye(length, dtype=bool)
    for level in range((length - 1).bit_length()):
        own = position >> level
        for odd, other in ((1, (own << level) - 1), (0, (own + 1) << level))[: 1 if causal else 2]:
            there = (own % 2 == odd) & (other < length)
            reached[position[there], other[there]] = True
    return sparse(reached)


def cost(length: int, *, causal: bool) -> Cost:
    """Returns `pattern(…).cost()` in closed form: the terms of `combiner_logsparse`."""
    return siblings(length, causal=causal)._replace(members=0)


def attend_logsparse(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    chunk: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends in one softmax to `i` and, at every level, to the position of the sibling next to `i`'s block of `2^t`.

    Before `i` it is `((i >> t) << t) - 1`, one for each set bit of `i`: the suffix sums of its bits, counted from 1.
    O(l log l) terms; a block of `chunk` positions computes the terms within it as one dense masked product.

    Args:
        chunk: a power of two, the length of the blocks that are computed at once. The result does not depend on it.
        q, k, v, causal, valid, segments, drop: see `core.mechanism`.
    """
    blocks = Blocks.of(q, block_length(chunk, q.shape[1]), drop)
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments)
    sides = (LEFT,) if causal else (LEFT, RIGHT)
    far = [_neighbour_group(blocks, tokens, side) for side in sides if blocks.count > 1]
    return attend_window(blocks, tokens, jnp.asarray(pattern(blocks.size, causal=causal).direct), far, drop)


def _neighbour_group(blocks: Blocks, tokens: Tokens, side: int) -> KeyGroup:
    """Returns for every block, at every higher level, the position next to it in the sibling on that side."""
    levels = np.arange((blocks.count - 1).bit_length())
    number = np.arange(blocks.count)[:, None] >> levels
    at = ((number << levels) - 1) if side == LEFT else ((number + 1) << levels)
    sees = (number & 1 != side) & (at < blocks.count)

    def pick(x: Shaped[Array, 'm c *rest']) -> Shaped[Array, 'm u *rest']:
        edges = x[:, -1 if side == LEFT else 0].reshape(blocks.batch, blocks.count, *x.shape[2:])
        return edges[:, np.clip(at, 0, blocks.count - 1)].reshape(-1, len(levels), *x.shape[2:])

    segment_ids = None if tokens.segment_ids is None else pick(tokens.segment_ids)
    mask = jnp.tile(jnp.asarray(sees), (blocks.batch, 1))[:, None]
    return KeyGroup(pick(blocks.split(tokens.k)), pick(blocks.split(tokens.v)), mask, segment_ids)


@register('logsparse')
class Logsparse(Mechanism):
    """Sparse Logsparse attention; `chunk`, a power of two, is the number of positions computed at once."""

    chunk: int = 64

    supports_segments = True

    def pattern(self, length):
        return pattern(length, causal=self.causal)

    def cost(self, length):
        return cost(length, causal=self.causal)

    def attend(self, q, k, v, context):
        valid, segments, drop = context.valid, context.segments, context.drop
        return attend_logsparse(
            q, k, v, chunk=self.chunk, causal=self.causal, valid=valid, segments=segments, drop=drop
        )

    def init_cache(self, q, k, v, context, counts, capacity):
        return init_full_cache(k, v, capacity)

    def decode_step(self, cache, index, q, k, v, context):
        index = index[:, None]
        levels = jnp.arange((cache.k.shape[2] - 1).bit_length())
        at = jnp.concatenate([index, (index >> levels << levels) - 1], axis=1)
        visible = jnp.concatenate([index >= 0, index >> levels & 1 == 1], axis=1)
        return decode_gathered(cache, index[:, 0], q, k, v, at, visible)
