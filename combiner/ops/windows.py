"""Windows: the positions next to a block, as one group of keys that every position of the block may see.

A window is computed in blocks. A block has its own positions (`blocks.attend_blocks`) and, on either side, a group of
neighbours that the windows of its positions reach, copied next to each other: `reach / block` times the keys and
values. Groups come blocks first, as `chunking.map_chunks` takes them, and heads first inside of a chunk:

    block = block_length(chunk, length)
    segment_ids = block_segment_ids(batch, length, block, causal=causal, valid=valid, segments=segments)
    q, k, v = (flatten_blocks(x, block) for x in (q * width**-0.5, k, v))
    reach = {'before': 15, 'after': 0 if causal else 15}
    groups = neighbour_groups(k, v, segment_ids, batch=batch, block=block, **reach)
    attended = attend_window(q, k, v, segment_ids, window_mask(block, **reach), groups, batch, drop)

Letters: as in `blocks`, and `s` neighbours of a block, `n` summaries of a sequence.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.ops.blocks import (
    LEFT,
    RIGHT,
    KeyGroup,
    Summary,
    attend_blocks,
    block_length,
    block_segment_ids,
    flatten_blocks,
    merge_blocks,
    split_blocks,
)
from combiner.ops.chunking import map_chunks, plan_chunks
from combiner.ops.segments import same_segment
from combiner.ops.softmax import Drop, einsum, mask_logits, unnormalized_softmax


def window_mask(block: int, before: int, after: int) -> Bool[Array, 'c c']:
    """Which positions of its own block the window of a position holds: `i - before ≤ j ≤ i + after`."""
    distance = np.arange(block) - np.arange(block)[:, None]
    return jnp.asarray((distance >= -before) & (distance <= after))


def neighbour_groups(
    k: Float[Array, 'p h d'],
    v: Float[Array, 'p h d'],
    segment_ids: Int[Array, 'm c'] | None,
    *,
    batch: int,
    block: int,
    before: int,
    after: int,
    sliding: bool = True,
) -> list[KeyGroup]:
    """For every block the `before` positions on its left and the `after` on its right: a group for each side, if any.

    Args:
        k: keys of all positions (see `blocks.flatten`).
        v: values of all positions.
        segment_ids: of all positions (see `segments`).
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
        exists = take_neighbours(jnp.ones((block + beyond, 1), bool), 1, block, size, side)
        uses = jnp.tile(exists.swapaxes(1, 2) & jnp.asarray(near | (not sliding)), (batch, 1, 1))
        side_k, side_v = (take_neighbours(x, batch, block, size, side).swapaxes(1, 2) for x in (k, v))
        side_ids = None if segment_ids is None else take_neighbours(segment_ids.reshape(-1), batch, block, size, side)
        groups.append(KeyGroup(side_k, side_v, side_ids, uses))
    return groups


def take_neighbours(
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
    segment_ids: Int[Array, 'm c'] | None,
    own: Bool[Array, 'c c'],
    groups: list[KeyGroup],
    batch: int,
    drop: Drop | None = None,
) -> Float[Array, 'p h d']:
    """One softmax over the positions of one's own block that `own` says and those of `groups`; `q` is scaled.

    O(l·(block + reach)) time; on a CPU, in chunks (see `chunking`) that keep no logits.
    """
    block, heads = len(own), q.shape[1]
    blocks = len(q) // (batch * block)
    terms = block + sum(group.key.shape[2] for group in groups)
    steps = plan_chunks(len(q) * heads * terms, blocks, at_once=drop is not None)

    def attend(q, k, v, segment_ids, groups):
        """The attended values of some blocks."""
        q, k, v = (split_blocks(x[None], block) for x in (q, k, v))
        return attend_blocks(q, k, v, segment_ids, own, [group.swapped() for group in groups], drop)

    return map_chunks(attend, steps, batch, q, k, v, segment_ids, groups)


def attend_window_and_spans(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    spans: Summary,
    visible: Bool[Array, '#b #l n'],
    *,
    before: int,
    after: int,
    chunk: int,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """One softmax over the positions `i - before ≤ j ≤ i + after` and the summaries that `i` sees.

    O(l·(before + after + n)) time and memory; on a CPU in chunks (see `chunking`).

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        spans: the summaries, `[h, b, n, d]`.
        visible: which of them each position sees.
        before: how far the window reaches to the left.
        after: how far it reaches to the right.
        chunk: a power of two, how many positions are computed at once. The result does not depend on it.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the weights.
    """
    batch, length, heads, width = q.shape
    size = block_length(chunk, length)
    segment_ids = block_segment_ids(batch, length, size, causal=after == 0, valid=valid, segments=None)
    q, k, v = (flatten_blocks(x, size) for x in (q * width**-0.5, k, v))
    chunks = len(q) // (batch * size)
    if visible.shape[1] > 1:
        visible = jnp.pad(visible, ((0, 0), (0, -length % size), (0, 0))).reshape(len(visible), chunks, size, -1)
    visible = jnp.broadcast_to(
        visible.reshape(len(visible), -1, *visible.shape[-2:]), (batch, chunks, *visible.shape[-2:])
    )
    groups = neighbour_groups(k, v, segment_ids, batch=batch, block=size, before=before, after=after)
    attend = partial(_attend_chunks, own=window_mask(size, before, after), spans=spans, drop=drop)
    terms = size + sum(group.key.shape[2] for group in groups) + visible.shape[-1]
    steps = plan_chunks(len(q) * heads * terms, chunks, at_once=drop is not None)
    attended = map_chunks(attend, steps, batch, q, k, v, segment_ids, groups, visible.reshape(-1, *visible.shape[2:]))
    return attended.reshape(batch, -1, heads, width)[:, :length]


def _attend_chunks(
    q: Float[Array, 'p h d'],
    k: Float[Array, 'p h d'],
    v: Float[Array, 'p h d'],
    segment_ids: Int[Array, 'm c'] | None,
    groups: list[KeyGroup],
    visible: Bool[Array, 'm #c n'],
    *,
    own: Bool[Array, 'c c'],
    spans: Summary,
    drop: Drop | None,
) -> Float[Array, 'p h d']:
    """The attended values of some chunks, which see themselves, their neighbours and the summaries."""
    heads, batch, _, width = spans.key.shape
    q, k, v = (split_blocks(x[None], len(own)) for x in (q, k, v))
    groups = [group.swapped() for group in groups]
    near = mask_logits(einsum('hmqd,hmkd->hmqk', q, k), same_segment(segment_ids, segment_ids, own))
    far = einsum('hbld,hbnd->hbln', q.reshape(heads, batch, -1, width), spans.key).reshape(*near.shape[:-1], -1)
    logits = mask_logits(far, visible), near, *(group.logits(q, segment_ids) for group in groups)
    (far, *weights), total = unnormalized_softmax(*logits, drop=drop)
    far = far.astype(v.dtype).reshape(heads, batch, -1, far.shape[-1])
    attended = einsum('hbln,hbnd->hbld', far, spans.value).reshape(v.shape)
    for weight, values in zip(weights, (v, *(group.value for group in groups)), strict=True):
        attended += einsum('hmqk,hmkd->hmqd', weight.astype(v.dtype), values)
    return merge_blocks((attended / total).astype(v.dtype), len(visible) * len(own))[0]
