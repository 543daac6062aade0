"""Windows: the positions next to a block, as one group of keys that every position of the block may see.

A window is computed in blocks. A block has its own positions (`siblings.attend_blocks`) and, on either side, a group of
those beside it that the windows of its positions reach, copied next to each other: `reach / block` times the keys and
values. Groups come blocks first, as `steps.visit` takes them, and are turned inside of a step:

    block = block_length(chunk, length)
    labels = label(batch, length, block, causal=causal, valid=valid, segments=segments)
    q, k, v = (flatten(x, block) for x in (q * width**-0.5, k, v))
    reach = {'before': 15, 'after': 0 if causal else 15}
    groups = beside(k, v, labels, batch=batch, block=block, **reach)
    attended = attend_window(q, k, v, labels, within(block, **reach), groups, batch, drop)

Letters: as in `layout`, and `s` positions beside a block.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.attention.joint import Drop
from combiner.attention.layout import split
from combiner.attention.siblings import LEFT, RIGHT, Siblings, attend_blocks
from combiner.attention.steps import divide, visit


def within(block: int, before: int, after: int) -> Bool[Array, 'c c']:
    """Which positions of its own block the window of a position holds: `i - before ≤ j ≤ i + after`."""
    distance = np.arange(block) - np.arange(block)[:, None]
    return jnp.asarray((distance >= -before) & (distance <= after))


def beside(
    k: Float[Array, 'p h d'],
    v: Float[Array, 'p h d'],
    labels: Int[Array, 'm c'] | None,
    *,
    batch: int,
    block: int,
    before: int,
    after: int,
    sliding: bool = True,
) -> list[Siblings]:
    """For every block the `before` positions on its left and the `after` on its right: a group for each side, if any.

    Args:
        k: keys of all positions (see `layout.flatten`).
        v: values of all positions.
        labels: of all positions (see `folds`).
        batch: the number of sequences.
        block: positions in a block.
        before: how far a window reaches to the left.
        after: how far it reaches to the right.
        sliding: whether that is counted from each position; if not, from its block, all of whose positions see all.

    Returns:
        Groups of shape `m h s d`: blocks first.
    """
    groups, beyond = [], len(k) // batch - block
    for side, reach in ((LEFT, before), (RIGHT, after)):
        size = min(reach, beyond)
        if size < 1:
            continue
        far = np.arange(block)[:, None] + np.arange(size, 0, -1)  # distances to the left; mirrored, to the right
        near = far <= reach if side == LEFT else far[::-1, ::-1] <= reach
        exists = take_beside(jnp.ones((block + beyond, 1), bool), 1, block, size, side)
        uses = jnp.tile(exists.swapaxes(1, 2) & jnp.asarray(near | (not sliding)), (batch, 1, 1))
        side_k, side_v = (take_beside(x, batch, block, size, side).swapaxes(1, 2) for x in (k, v))
        side_labels = None if labels is None else take_beside(labels.reshape(-1), batch, block, size, side)
        groups.append(Siblings(side_k, side_v, side_labels, uses))
    return groups


def take_beside(
    x: Shaped[Array, 'p *rest'], batch: int, block: int, reach: int, side: int
) -> Shaped[Array, 'm s *rest']:
    """The `reach` positions next to every block on one side of it; zeros (or False) beyond the sequence."""
    x = x.reshape(batch, -1, block, *x.shape[1:])
    blocks, count = x.shape[1], -(-reach // block)
    room = (count, 0) if side == LEFT else (0, count)
    x = jnp.pad(x, ((0, 0), room, *((0, 0),) * (x.ndim - 2)))
    first = 0 if side == LEFT else 1
    pieces = [x[:, first + i : first + i + blocks] for i in range(count)]
    taken = jnp.concatenate(pieces, axis=2)
    taken = taken[:, :, count * block - reach :] if side == LEFT else taken[:, :, :reach]
    return taken.reshape(-1, reach, *taken.shape[3:])


def attend_window(
    q: Float[Array, 'p h d'],
    k: Float[Array, 'p h d'],
    v: Float[Array, 'p h d'],
    labels: Int[Array, 'm c'] | None,
    own: Bool[Array, 'c c'],
    groups: list[Siblings],
    batch: int,
    drop: Drop | None = None,
) -> Float[Array, 'p h d']:
    """One softmax over the positions of one's own block that `own` says and those of `groups`; `q` is scaled.

    O(l·(block + reach)) time; on a CPU, the blocks are visited in steps (see `steps`) that keep no logits.
    """
    block, heads = len(own), q.shape[1]
    blocks = len(q) // (batch * block)
    terms = block + sum(group.key.shape[2] for group in groups)
    steps = divide(len(q) * heads * terms, blocks, at_once=drop is not None)

    def attend(q, k, v, labels, groups):
        """The attended values of some blocks."""
        q, k, v = (split(x[None], block) for x in (q, k, v))
        return attend_blocks(q, k, v, labels, own, [group.turn() for group in groups], drop)

    return visit(attend, steps, batch, q, k, v, labels, groups)
