"""Windows: the positions next to a block, as groups of keys for the positions of the block.

A window is computed in blocks. A block has its own positions and, on either side, a group of neighbours that the
windows of its positions reach, copied next to each other: `reach / block` times the keys and values.

    blocks = Blocks.of(q, block_length(chunk, length), drop)
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments)
    groups = neighbour_groups(blocks, tokens, before=15, after=0)
    attended = attend_window(blocks, tokens, window_mask(blocks.size, before=15, after=0), groups, drop)

In decoding, a position attends to some positions of a cache of keys and values: all, or the last few.

Letters: as in `blocks`, and `s` neighbours of a block, `w` slots of a cache, `n` positions that a token attends to.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.ops.blocks import LEFT, RIGHT, Blocks, KeyGroup, Tokens, attend_groups, attend_one, block_length
from combiner.ops.softmax import Drop


def window_mask(block: int, before: int, after: int) -> Bool[Array, 'c c']:
    """Returns which positions of its own block the window of a position holds: `i - before ≤ j ≤ i + after`."""
    distance = np.arange(block) - np.arange(block)[:, None]
    return jnp.asarray((distance >= -before) & (distance <= after))


def neighbour_groups(
    blocks: Blocks, tokens: Tokens, *, before: int, after: int, sliding: bool = True
) -> list[KeyGroup]:
    """Returns for every block the `before` positions on its left and the `after` on its right: a group for each side.

    Args:
        blocks: of the sequences.
        tokens: of the sequences, `b l h d`.
        before: positions of a window on its left.
        after: positions of a window on its right.
        sliding: whether they are counted from each position; if not, from its block, whose positions then share them.

    Returns:
        Groups of tokens, `m s h d`; none for a side without neighbours.
    """
    groups, block = [], blocks.size
    beyond = (blocks.count - 1) * block
    for side, reach in ((LEFT, before), (RIGHT, after)):
        size = min(reach, beyond)
        if size < 1:
            continue
        far = np.arange(block)[:, None] + np.arange(size, 0, -1)  # distances to the left; mirrored, to the right
        near = far <= reach if side == LEFT else far[::-1, ::-1] <= reach
        exists = take_neighbours(jnp.ones((blocks.count, block, 1), bool), 1, size, side)
        mask = jnp.tile(exists.swapaxes(1, 2) & jnp.asarray(near | (not sliding)), (blocks.batch, 1, 1))
        k, v = (take_neighbours(blocks.split(x), blocks.batch, size, side) for x in (tokens.k, tokens.v))
        ids = tokens.segment_ids
        groups.append(KeyGroup(k, v, mask, None if ids is None else take_neighbours(ids, blocks.batch, size, side)))
    return groups


def take_neighbours(x: Shaped[Array, 'm c *rest'], batch: int, reach: int, side: int) -> Shaped[Array, 'm s *rest']:
    """Returns the `reach` positions next to every block on one side of it; zeros (or False) beyond the sequence."""
    block = x.shape[1]
    x = x.reshape(batch, -1, *x.shape[1:])
    blocks, count = x.shape[1], -(-reach // block)
    room = (count, 0) if side == LEFT else (0, count)
    x = jnp.pad(x, ((0, 0), room, *((0, 0),) * (x.ndim - 2)))
    first = 0 if side == LEFT else 1
    pieces = [x[:, first + i : first + i + blocks] for i in range(count)]
    taken = jnp.concatenate(pieces, axis=2)
    taken = taken[:, :, count * block - reach :] if side == LEFT else taken[:, :, :reach]
    return taken.reshape(-1, reach, *taken.shape[3:])


def attend_window(
    blocks: Blocks,
    tokens: Tokens,
    own: Bool[Array, 'c c'] | None,
    groups: Sequence[KeyGroup],
    drop: Drop | None = None,
    *,
    shared: KeyGroup | None = None,
) -> Float[Array, 'b l h d']:
    """Attends in one softmax to the positions of the own block that `own` allows and to the keys of groups.

    O(l·(block + keys of groups)) time; on a CPU, in chunks (see `chunking`) that keep no logits.

    Args:
        blocks: of the sequences.
        tokens: of the sequences, `b l h d`.
        own: which positions of a block its positions attend to; None for all.
        groups: tokens of each block, `m s h d`.
        drop: dropout of the joint weights.
        shared: keys that the blocks of a sequence share, `h b n d`, with a mask `m #c n`.
    """

    def attend(given: tuple[Tokens, Sequence[KeyGroup]], visible: Array | None) -> Array:
        """Returns the attended values of some blocks."""
        tokens, groups = given
        far = [] if shared is None else [shared._replace(mask=visible)]
        return attend_groups(tokens.q, [*far, tokens.group(own), *groups], tokens.segment_ids, drop)

    keys = blocks.size + sum(group.k.shape[1] for group in groups) + (0 if shared is None else shared.k.shape[2])
    return blocks.attend(attend, (tokens, list(groups)), None if shared is None else shared.mask, keys=keys)


def attend_window_and_spans(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    spans: KeyGroup,
    *,
    before: int,
    after: int,
    chunk: int,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends in one softmax to the positions `i - before ≤ j ≤ i + after` and to the summaries that `i` may use.

    O(l·(before + after + n)) time and memory; on a CPU in chunks (see `chunking`).

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        spans: `n` summaries of each sequence, `h b n d`, with the mask `#b #l n` of which positions use which.
        before: positions of the window on its left.
        after: positions of the window on its right.
        chunk: a power of two, the number of positions computed at once. The result does not depend on it.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the weights.
    """
    blocks = Blocks.of(q, block_length(chunk, q.shape[1]), drop)
    tokens = blocks.tokens(q, k, v, causal=after == 0, valid=valid)
    visible = jnp.ones((1, 1, spans.k.shape[2]), bool) if spans.mask is None else spans.mask
    sequences = len(visible)
    visible = blocks.split(visible) if visible.shape[1] > 1 else visible
    visible = visible.reshape(sequences, -1, *visible.shape[1:])
    visible = jnp.broadcast_to(visible, (blocks.batch, blocks.count, *visible.shape[2:]))
    groups = neighbour_groups(blocks, tokens, before=before, after=after)
    own = window_mask(blocks.size, before, after)
    return attend_window(
        blocks, tokens, own, groups, drop, shared=spans._replace(mask=visible.reshape(-1, *visible.shape[2:]))
    )


class WindowCache(NamedTuple):
    """Keys and values of the last `w` positions; position `i` is in slot `i mod w`."""

    k: Float[Array, 'b h w d']
    v: Float[Array, 'b h w d']


def init_full_cache(k: Float[Array, 'b l h d'], v: Float[Array, 'b l h d'], capacity: int) -> WindowCache:
    """Returns a cache of all positions, with room for `capacity`; unused positions are overwritten before use."""
    room = ((0, 0), (0, capacity - k.shape[1]), (0, 0), (0, 0))
    return WindowCache(*(jnp.moveaxis(jnp.pad(x, room), 2, 1) for x in (k, v)))


def init_window_cache(
    k: Float[Array, 'b l h d'], v: Float[Array, 'b l h d'], counts: Int[Array, ' b'], slots: int
) -> WindowCache:
    """Returns a cache of the last `slots` of the first `counts` positions of every sequence."""
    held = cached_positions(counts - 1, slots)
    at = jnp.clip(held, 0, k.shape[1] - 1)[:, :, None, None]  # empty slots are not visible
    return WindowCache(*(jnp.moveaxis(jnp.take_along_axis(x, at, axis=1), 2, 1) for x in (k, v)))


def cached_positions(last: Int[Array, ' b'], slots: int) -> Int[Array, 'b w']:
    """Returns the position in each slot when `last` is the latest; negative for an empty slot."""
    return last[:, None] - (last[:, None] - jnp.arange(slots)) % slots


def decode_gathered(
    cache: WindowCache,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    at: Int[Array, 'b n'],
    visible: Bool[Array, 'b n'],
) -> tuple[WindowCache, Float[Array, 'b h d']]:
    """Caches a token at `index`, and attends from it (`q` is not scaled) to the positions `at` that are `visible`."""

    def step(cache, index, q, k, v, at, visible):
        slots = cache.k.shape[1]
        cache = WindowCache(*(held.at[:, index % slots].set(new) for held, new in zip(cache, (k, v), strict=True)))
        return cache, attend_one(q, KeyGroup(cache.k[:, at % slots], cache.v[:, at % slots], visible))

    return jax.vmap(step)(cache, index, q, k, v, at, visible)


def decode_window(
    cache: WindowCache,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    lowest: Int[Array, ' b'],
) -> tuple[WindowCache, Float[Array, 'b h d']]:
    """Decodes as `decode_gathered` does, to all positions from `lowest` on, which the cache must hold."""
    at = cached_positions(index, cache.k.shape[2])
    return decode_gathered(cache, index, q, k, v, at, at >= jnp.maximum(lowest, 0)[:, None])
