"""The spans of `combiner_logsparse`: at every level `t`, the block of `2^t` positions next to a position's own.

Two neighbouring blocks are the siblings of each other. Left siblings have even numbers and are seen from the block
after them, right siblings have odd numbers and are seen from the block before.

Positions are computed in blocks of, say, 64. The levels within a block are one dense masked product of its queries with
the 31 summaries of a side, of which a query sees 5 at most, and one of the summaries' queries with the block's keys.
`distant_siblings` has the levels beyond. At 4,096 positions, 8 heads of 64, on 2 cores, blocks of 16, 32, 64 and 128
took 20, 20, 18 and 23 ms forward, and 93, 81, 80 and 95 ms forward and backward.

Letters: as in `layout`, and `s` spans.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner.attention.folds import Lifted, along, finish, fold, join, lift, of_same
from combiner.attention.joint import Drop, dot, joint_exp, masked
from combiner.attention.layout import merge
from combiner.attention.pooling import Pools
from combiner.attention.sums import weigh

LEFT, RIGHT = 0, 1


class Siblings(NamedTuple):
    """Summaries that the positions of a block may see; heads first, or (`turn`) blocks first.

    Attributes:
        key: summary keys.
        value: local expectations.
        labels: whose members they are of (see `folds`).
        uses: which positions see which, labels aside.
    """

    key: Float[Array, 'h m s d']
    value: Float[Array, 'h m s d']
    labels: Int[Array, 'm s'] | None
    uses: Bool[Array, '#m #c s']

    def turn(self) -> 'Siblings':
        """With heads and blocks exchanged."""
        return self._replace(key=self.key.swapaxes(0, 1), value=self.value.swapaxes(0, 1))

    def logits(self, q: Float[Array, 'h m c d'], labels: Int[Array, 'm c'] | None) -> Float[Array, 'h m c s']:
        """Of all queries, masked where a query does not see a summary."""
        return masked(dot('hmqd,hmsd->hmqs', q, self.key), of_same(labels, self.labels, self.uses))


def block_length(chunk: int, length: int) -> int:
    """The length of the blocks in which a sequence is computed: `chunk`, or less if that is more than needed.

    Raises:
        ValueError: it is no power of two.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f'chunk must be a power of two, got {chunk}')
    return min(chunk, 1 << (length - 1).bit_length())


def attend_blocks(
    q: Float[Array, 'h m c d'],
    k: Float[Array, 'h m c d'],
    v: Float[Array, 'h m c d'],
    labels: Int[Array, 'm c'] | None,
    mask: Bool[Array, 'c c'],
    groups: Sequence[Siblings],
    drop: Drop | None,
) -> Float[Array, 'p h d']:
    """Attention of every block to its own positions, those of `mask`, and to groups of summaries, in one softmax."""
    own = masked(dot('hmqd,hmkd->hmqk', q, k), of_same(labels, labels, mask))
    (own, *weights), total = joint_exp(own, *(group.logits(q, labels) for group in groups), drop=drop)
    attended = dot('hmqk,hmkd->hmqd', own.astype(v.dtype), v)
    for group, weight in zip(groups, weights, strict=True):
        attended += dot('hmqs,hmsd->hmqd', weight.astype(v.dtype), group.value)
    return merge((attended / total).astype(v.dtype), q.shape[1] * q.shape[2])[0]


def within_blocks(
    q: Float[Array, 'h m c d'],
    k: Float[Array, 'h m c d'],
    v: Float[Array, 'h m c d'],
    labels: Int[Array, 'm c'] | None,
    side: int,
    pools: Pools,
) -> Siblings:
    """The siblings of one side that are smaller than a block of at least 4, at levels 1 and up."""
    position = np.arange(q.shape[2])
    levels = range(1, len(position).bit_length() - 1)
    spans, found = lift(q, k, labels, pools), []
    for _ in levels:
        spans = fold(spans, 2, pools, last=side == LEFT)
        found.append(of_side(spans, side))
    spans = join(found, jnp.concatenate)
    query, key = finish(spans, pools, q.dtype)
    level = np.concatenate([np.full(len(position) >> t + 1, t) for t in levels])
    number = np.concatenate([np.arange(side, len(position) >> t, 2) for t in levels])
    members = jnp.asarray(position >> level[:, None] == number[:, None])[None]
    value = weigh(query, k, v, of_same(spans.labels, labels, members)).average().astype(v.dtype)
    return Siblings(key, value, spans.labels, jnp.asarray(position[:, None] >> level == number ^ 1)[None])


def of_side(spans: Lifted, side: int) -> Lifted:
    """Every other span."""
    return along(spans, lambda x, axis: jax.lax.slice_in_dim(x, side, None, 2, axis))
