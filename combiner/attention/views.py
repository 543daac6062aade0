"""Which blocks (or grid rows) of a sequence see each other, and through which summaries.

Letters: as in `layout`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def other_blocks(batch: int, blocks: int, *, causal: bool) -> Bool[Array, 'm 1 n']:
    """Which blocks of its sequence each block sees beside itself: the earlier ones, or all when not causal."""
    others = jnp.tri(blocks, k=-1, dtype=bool) if causal else ~jnp.eye(blocks, dtype=bool)
    return jnp.tile(others, (batch, 1))[:, None]


class View(NamedTuple):
    """One summary of every block, and who sees it.

    Attributes:
        members: which positions of a block its summary is of; None for all.
        seen: whether the block at `m` (or, with segments, its position `c`) sees the summary of its sequence's block
            `n`.
    """

    members: Bool[Array, 'm c'] | None
    seen: Bool[Array, 'm #c n']


def views(
    batch: int,
    blocks: int,
    *,
    causal: bool,
    inside: Bool[Array, 'm c'] | None = None,
    segments: Int[Array, 'm c'] | None = None,
) -> list[View]:
    """The summaries through which blocks see the other blocks of their sequence (causal: the earlier ones).

    Without segments one summary of the whole block serves all. With segments a later position shares at most the last
    segment of a block, an earlier one at most the first: so one summary is of a block's last segment, seen from
    later blocks where they hold that segment, and if not causal another is of its first, seen from earlier blocks.
    """
    if segments is None:
        return [View(inside, _see(other_blocks(batch, blocks, causal=causal), batch, inside))]
    before = jnp.tri(blocks, k=-1, dtype=bool)
    found = []
    for others, last in ((before, True), (before.T, False))[: 1 if causal else 2]:
        shared = edge(segments, inside, last=last)
        members = segments == shared[:, None]
        if inside is not None:
            members = members & inside
        same = segments.reshape(batch, blocks, -1, 1) == shared.reshape(batch, 1, 1, blocks)
        seen = others[:, None] & same
        found.append(View(members, _see(seen.reshape(-1, *seen.shape[2:]), batch, members)))
    return found


def edge(segments: Int[Array, 'm c'], inside: Bool[Array, 'm c'] | None, *, last: bool) -> Int[Array, ' m']:
    """The segment of the last (or first) valid position of every block."""
    if inside is None:
        return segments[:, -1 if last else 0]
    size = segments.shape[1]
    at = size - 1 - inside[:, ::-1].argmax(axis=1) if last else inside.argmax(axis=1)
    return jnp.take_along_axis(segments, at[:, None], axis=1)[:, 0]


def _see(seen: Bool[Array, 'm #c n'], batch: int, members: Bool[Array, 'm c'] | None) -> Bool[Array, 'm #c n']:
    """Nobody sees the summary of a block without members."""
    if members is None:
        return seen
    some = members.any(axis=-1).reshape(batch, 1, 1, -1)
    return (seen.reshape(batch, -1, *seen.shape[1:]) & some).reshape(seen.shape)
