"""Windows: the positions next to a block, as one group of keys that every position of the block may see.

A window is computed in blocks. A block has its own positions (`blocks.attend_blocks`) and, on either side, a group of
those beside it that the windows of its positions reach, copied next to each other: `reach / block` times the keys and
values. Groups come blocks first, as `chunking.visit` takes them, and are turned inside of a step:

    block = block_length(chunk, length)
    labels = label(batch, length, block, causal=causal, valid=valid, segments=segments)
    q, k, v = (flatten(x, block) for x in (q * width**-0.5, k, v))
    reach = {'before': 15, 'after': 0 if causal else 15}
    groups = beside(k, v, labels, batch=batch, block=block, **reach)
    attended = attend_window(q, k, v, labels, within(block, **reach), groups, batch, drop)

Letters: as in `blocks`, and `s` positions beside a block, `n` summaries of a sequence.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.ops.blocks import (
    LEFT,
    RIGHT,
    Siblings,
    Summary,
    attend_blocks,
    block_length,
    flatten,
    label,
    merge,
    split,
)
from combiner.ops.chunking import divide, visit
from combiner.ops.segments import of_same
from combiner.ops.softmax import Drop, dot, joint_exp, masked


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
        k: keys of all positions (see `blocks.flatten`).
        v: values of all positions.
        labels: of all positions (see `segments`).
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

    O(l·(block + reach)) time; on a CPU, the blocks are visited in steps (see `chunking`) that keep no logits.
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


def attend_spans(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    spans: Summary,
    seen: Bool[Array, '#b #l n'],
    *,
    before: int,
    after: int,
    chunk: int,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """One softmax over the positions `i - before ≤ j ≤ i + after` and the summaries that `i` sees.

    O(l·(before + after + n)) time and memory; on a CPU chunks are visited in steps (see `chunking`).

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        spans: the summaries, `[h, b, n, d]`.
        seen: which of them each position sees.
        before: how far the window reaches to the left.
        after: how far it reaches to the right.
        chunk: a power of two, how many positions are computed at once. The result does not depend on it.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the weights.
    """
    batch, length, heads, width = q.shape
    size = block_length(chunk, length)
    labels = label(batch, length, size, causal=after == 0, valid=valid, segments=None)
    q, k, v = (flatten(x, size) for x in (q * width**-0.5, k, v))
    chunks = len(q) // (batch * size)
    if seen.shape[1] > 1:
        seen = jnp.pad(seen, ((0, 0), (0, -length % size), (0, 0))).reshape(len(seen), chunks, size, -1)
    seen = jnp.broadcast_to(seen.reshape(len(seen), -1, *seen.shape[-2:]), (batch, chunks, *seen.shape[-2:]))
    groups = beside(k, v, labels, batch=batch, block=size, before=before, after=after)
    attend = partial(_attend_chunks, own=within(size, before, after), spans=spans, drop=drop)
    terms = size + sum(group.key.shape[2] for group in groups) + seen.shape[-1]
    steps = divide(len(q) * heads * terms, chunks, at_once=drop is not None)
    attended = visit(attend, steps, batch, q, k, v, labels, groups, seen.reshape(-1, *seen.shape[2:]))
    return attended.reshape(batch, -1, heads, width)[:, :length]


def _attend_chunks(
    q: Float[Array, 'p h d'],
    k: Float[Array, 'p h d'],
    v: Float[Array, 'p h d'],
    labels: Int[Array, 'm c'] | None,
    groups: list[Siblings],
    seen: Bool[Array, 'm #c n'],
    *,
    own: Bool[Array, 'c c'],
    spans: Summary,
    drop: Drop | None,
) -> Float[Array, 'p h d']:
    """The attended values of some chunks, which see themselves, what is beside them and the summaries."""
    heads, batch, _, width = spans.key.shape
    q, k, v = (split(x[None], len(own)) for x in (q, k, v))
    groups = [group.turn() for group in groups]
    near = masked(dot('hmqd,hmkd->hmqk', q, k), of_same(labels, labels, own))
    far = dot('hbld,hbnd->hbln', q.reshape(heads, batch, -1, width), spans.key).reshape(*near.shape[:-1], -1)
    logits = masked(far, seen), near, *(group.logits(q, labels) for group in groups)
    (far, *weights), total = joint_exp(*logits, drop=drop)
    far = far.astype(v.dtype).reshape(heads, batch, -1, far.shape[-1])
    attended = dot('hbln,hbnd->hbld', far, spans.value).reshape(v.shape)
    for weight, values in zip(weights, (v, *(group.value for group in groups)), strict=True):
        attended += dot('hmqk,hmkd->hmqd', weight.astype(v.dtype), values)
    return merge((attended / total).astype(v.dtype), len(seen) * len(own))[0]
