"""Combiner-Logsparse: oneself directly, and one summary for each scale of distance (Combiner, section 4.2)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner import patterns
from combiner.attention.joint import Drop, dot, joint_exp, masked, softmax
from combiner.attention.layout import Summary, merge, split
from combiner.attention.pooling import PLAIN, Pool, PooledAttention, Pools
from combiner.attention.registry import register

RADIX = 64
NOBODY = -1  # the label of padding


class Siblings(NamedTuple):
    """The left (or right) siblings at all dyadic levels among `n` units: blocks `(level, block)` of `2^level` units.

    Attributes:
        levels: the level of each block.
        blocks: its number at that level.
        members: which units it consists of.
        uses: which units have it as a sibling.
        last: whether it is seen from units after it, so that with segments its last one counts.
    """

    levels: Int[np.ndarray, ' s']
    blocks: Int[np.ndarray, ' s']
    members: Bool[np.ndarray, 's n']
    uses: Bool[np.ndarray, 'n s']
    last: bool


def siblings(units: int, *, left: bool) -> Siblings:
    """All blocks that are the left (or right) sibling of another block that holds a unit."""
    found = [
        (level, block)
        for level in range((units - 1).bit_length())
        for block in range(0 if left else 1, -(-units >> level), 2)
        if (block ^ 1) << level < units
    ]
    levels, blocks = np.array(found, int).reshape(-1, 2).T
    unit = np.arange(units)
    members = unit >> levels[:, None] == blocks[:, None]
    uses = unit[:, None] >> levels == blocks ^ 1
    return Siblings(levels, blocks, members, uses, left)


def attend_combiner_logsparse(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    causal: bool,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Equation (7) with `Ω_i^0 = {i}` and, at every level `t`, the sibling of `i`'s dyadic block as a span.

    O(l log l) terms. They are computed 64 units at a time: blocks of 64 positions, groups of 64 blocks, and so on. The
    levels within such a group are one dense product of its queries with its 63 (bidirectional: 126) summaries, of which
    a query uses one for each level; and one more of the summaries' queries with the group's keys.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        causal: whether a position sees only itself and what is before it.
        pools: how the members of a span become its summary query and key.
        valid: positions that are no padding; padding must hold finite numbers.
        segments: packed documents, each a contiguous run of positions with one number; they do not see each other.
        drop: dropout of the joint weights.
    """
    length, width = q.shape[1], q.shape[3]
    q = q * width**-0.5
    groups = _group_sizes(length)
    labels = _labels(q, groups, causal, valid, segments)
    spans, fars = [], []
    units = [[pool.lifted(split(x, 1), None if labels is None else (labels >= 0).reshape(-1, 1)) for x, pool in zip((q,k), pools, strict=True)] for _ in range(1 if causal else 2)]
    raise NotImplementedError
