"""Blocks (or grid rows) of a sequence: their layout, their summaries, and attention from them to groups of keys.

Letters: `b` batch, `l` length, `h` head, `d` head width, `n` blocks (or grid rows) of a sequence, `m = b·n` those of
the whole batch, `c` position in a block, or grid column.

Inside a mechanism the layout is `h m c d`: heads first, then the blocks of all sequences. All products are then matrix
multiplications with two batch axes, seldom of size one. XLA's CPU back end ran forward and backward 1.5 times
faster so than over `b h n c d`, and twice as fast as over `b n c h d`. Heads and batch lead their axes, so both can be
sharded.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.ops.pooling import Pools
from combiner.ops.segments import PADDING_ID, same_segment
from combiner.ops.softmax import Drop, einsum, mask_logits, softmax, unnormalized_softmax


class Summary(NamedTuple):
    """Summaries of spans: `key` K_r, from which a span gets its weight, and `value`, its local expectation."""

    key: Float[Array, '*spans d']
    value: Float[Array, '*spans d']


class Recent(NamedTuple):
    """The tokens of the open block (or of the last two grid rows) while decoding, as they came in."""

    q: Float[Array, '*rows c d']
    k: Float[Array, '*rows c d']
    v: Float[Array, '*rows c d']


LEFT, RIGHT = 0, 1


class KeyGroup(NamedTuple):
    """Summaries that the positions of a block may see; heads first, or (`transpose_lines`) blocks first.

    Attributes:
        key: summary keys.
        value: local expectations.
        segment_ids: of which documents they are (see `segments`).
        uses: which positions see which, segment ids aside.
    """

    key: Float[Array, 'h m s d']
    value: Float[Array, 'h m s d']
    segment_ids: Int[Array, 'm s'] | None
    uses: Bool[Array, '#m #c s']

    def swapped(self) -> 'KeyGroup':
        """With heads and blocks exchanged."""
        return self._replace(key=self.key.swapaxes(0, 1), value=self.value.swapaxes(0, 1))

    def logits(self, q: Float[Array, 'h m c d'], segment_ids: Int[Array, 'm c'] | None) -> Float[Array, 'h m c s']:
        """Of all queries, masked where a query does not see a summary."""
        return mask_logits(
            einsum('hmqd,hmsd->hmqs', q, self.key), same_segment(segment_ids, self.segment_ids, self.uses)
        )


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
    segment_ids: Int[Array, 'm c'] | None,
    mask: Bool[Array, 'c c'],
    groups: Sequence[KeyGroup],
    drop: Drop | None,
) -> Float[Array, 'p h d']:
    """Attention of every block to its own positions, those of `mask`, and to groups of summaries, in one softmax."""
    own = mask_logits(einsum('hmqd,hmkd->hmqk', q, k), same_segment(segment_ids, segment_ids, mask))
    (own, *weights), total = unnormalized_softmax(own, *(group.logits(q, segment_ids) for group in groups), drop=drop)
    attended = einsum('hmqk,hmkd->hmqd', own.astype(v.dtype), v)
    for group, weight in zip(groups, weights, strict=True):
        attended += einsum('hmqs,hmsd->hmqd', weight.astype(v.dtype), group.value)
    return merge_blocks((attended / total).astype(v.dtype), q.shape[1] * q.shape[2])[0]


def split_blocks(x: Float[Array, 'b l h d'], size: int) -> Float[Array, 'h m c d']:
    """Cuts every sequence into blocks of `size` positions, padding the last with zeros."""
    _check_size(size)
    _, length, heads, width = x.shape
    x = jnp.moveaxis(jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0))), 2, 0)
    return x.reshape(heads, -1, size, width)


def merge_blocks(x: Float[Array, 'h m c d'], length: int) -> Float[Array, 'b l h d']:
    """The inverse of `split`, without the padding."""
    heads, _, size, width = x.shape
    return jnp.moveaxis(x.reshape(heads, -1, -(-length // size) * size, width), 0, 2)[:, :length]


def flatten_blocks(x: Float[Array, 'b l h d'], size: int) -> Float[Array, 'p h d']:
    """All positions of the batch, with those that complete the last block of each sequence."""
    _check_size(size)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0))).reshape(-1, *x.shape[2:])


def scale_queries(q: Float[Array, '*n d']) -> Float[Array, '*n d']:
    """Queries over `√d`. What pools queries does so before: rounded, two that differ can be equal."""
    return q * q.shape[-1] ** -0.5


def split_each(size: int, *tokens: Float[Array, 'p h d']) -> list[Array]:
    """Positions by block `h m c d`."""
    return [split_blocks(x[None], size) for x in tokens]


def split_each_scaled(size: int, q: Float[Array, 'p h d'], *others: Float[Array, 'p h d']) -> list[Array]:
    """As `split_each`; queries are scaled here, block by block, and not in a copy of them all."""
    return split_each(size, scale_queries(q), *others)


def spans_by_head(x: Float[Array, 'p h d'], batch: int) -> Float[Array, 'h b s d']:
    """Spans of the whole batch, by head and sequence."""
    return jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 2, 0)


def blocks_by_sequence(x: Float[Array, 'h m *rest'], blocks: int) -> Float[Array, 'b h n *rest']:
    """Blocks by batch row, for decoding."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, blocks, *x.shape[2:]), 0, 1)


def transpose_grid(x: Float[Array, 'h m c e'], rows: int) -> Float[Array, 'h k n e']:
    """From rows of a grid to its columns, `k = b·c`, or, with the number of columns in place of `rows`, back."""
    heads, _, columns, last = x.shape
    return x.reshape(heads, -1, rows, columns, last).swapaxes(2, 3).reshape(heads, -1, rows, last)


def split_valid(
    valid: Bool[Array, 'b l'] | None, batch: int, length: int, size: int, *, causal: bool
) -> Bool[Array, 'm c'] | None:
    """Which positions of the blocks are padding neither of the batch nor of the last block; None for all.

    Causal attention alone never reaches the padding of the last block.
    """
    _check_size(size)
    if valid is None:
        if causal or length % size == 0:
            return None
        valid = jnp.ones((batch, length), bool)
    return split_ids(valid, size)


def split_ids(segment_ids: Shaped[Array, 'b l'], size: int) -> Shaped[Array, 'm c']:
    """Cuts ids of positions (validity, segments) into blocks; the padding of the last block is 0 or False."""
    return jnp.pad(segment_ids, ((0, 0), (0, -segment_ids.shape[1] % size))).reshape(-1, size)


def mask_own(
    logits: Float[Array, 'h m c c'],
    *,
    causal: bool,
    inside: Bool[Array, 'm c'] | None,
    segments: Int[Array, 'm c'] | None = None,
) -> Float[Array, 'h m c c']:
    """Logits inside blocks, where the key is valid, of the query's segment and (causal) not after the query."""
    if inside is not None:
        logits = mask_logits(logits, inside[:, None, :])
    if segments is not None:
        logits = mask_logits(logits, segments[:, :, None] == segments[:, None, :])
    return mask_logits(logits, jnp.tri(logits.shape[-1], dtype=bool)) if causal else logits


def summarise(
    q: Float[Array, '*n c d'],
    k: Float[Array, '*n c d'],
    v: Float[Array, '*n c d'],
    members: Bool[Array, '...'] | None = None,
    *,
    pools: Pools,
) -> Summary:
    """Pooled summary of blocks (Combiner, equation (7)); that of a block without members is zero.

        K_r = pool_j k_j        V_r = Σ_j softmax_j(Q_r·k_j/√d) v_j        Q_r = pool_j q_j

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        members: which positions belong to the span, broadcastable to `*n c`; None for all.
        pools: how queries and keys are pooled.
    """
    local_query, key = scale_queries(pools.q(q, members)), pools.k(k, members)
    return Summary(key, expectation(local_query, k, v, members))


def expectation(
    query: Float[Array, '*n d'],
    k: Float[Array, '*n c d'],
    v: Float[Array, '*n c d'],
    members: Bool[Array, '...'] | None = None,
) -> Float[Array, '*n d']:
    """Local expectation `Σ_j softmax_j(query·k_j) v_j` over the members of each span; zero where there are none."""
    weights = softmax(mask_logits(einsum('...d,...cd->...c', query, k), members))
    return einsum('...c,...cd->...d', weights.astype(v.dtype), v).astype(v.dtype)


def clip_size(size: int, length: int) -> int:
    """The length of a block or grid row, and no more than that of the sequence: beyond it nothing would change.

    Raises:
        ValueError: it is no positive integer.
    """
    _check_size(size)
    return min(size, length)


def _check_size(size: int) -> None:
    if not isinstance(size, Integral) or size < 1:
        raise ValueError(f'a block or grid row must hold at least 1 position, got {size}')


def block_segment_ids(
    batch: int,
    length: int,
    size: int,
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None,
    segments: Int[Array, 'b l'] | None,
) -> Int[Array, 'm c'] | None:
    """Labels of the positions of blocks; None if all that are ever reached have the same.

    In both directions there always are some: they tell spans without members, beyond the end, from others.
    """
    if valid is None and not causal:
        valid = jnp.ones((batch, length), bool)
    inside = split_valid(valid, batch, length, size, causal=causal)
    if segments is None:
        return None if inside is None else jnp.where(inside, 0, PADDING_ID)
    segment_ids = split_ids(segments.astype(jnp.int32), size)
    return segment_ids if inside is None else jnp.where(inside, segment_ids, PADDING_ID)


def other_blocks_mask(batch: int, blocks: int, *, causal: bool) -> Bool[Array, 'm 1 n']:
    """Which other blocks of its sequence each block sees: the earlier ones, or all when not causal."""
    others = jnp.tri(blocks, k=-1, dtype=bool) if causal else ~jnp.eye(blocks, dtype=bool)
    return jnp.tile(others, (batch, 1))[:, None]


class SummaryMask(NamedTuple):
    """One summary of every block, and who sees it.

    Attributes:
        members: which positions of a block its summary is of; None for all.
        visible: whether the block at `m` (or, with segments, its position `c`) sees the summary of its sequence's block
            `n`.
    """

    members: Bool[Array, 'm c'] | None
    visible: Bool[Array, 'm #c n']


def summary_masks(
    batch: int,
    blocks: int,
    *,
    causal: bool,
    inside: Bool[Array, 'm c'] | None = None,
    segments: Int[Array, 'm c'] | None = None,
) -> list[SummaryMask]:
    """The summaries through which blocks see the other blocks of their sequence (causal: the earlier ones).

    Without segments one summary of the whole block serves all. With segments a later position shares at most the last
    segment of a block, an earlier one at most the first: so one summary is of a block's last segment, visible to
    later blocks where they hold that segment, and if not causal another is of its first, visible to earlier blocks.
    """
    if segments is None:
        return [SummaryMask(inside, _mask_empty_blocks(other_blocks_mask(batch, blocks, causal=causal), batch, inside))]
    before = jnp.tri(blocks, k=-1, dtype=bool)
    found = []
    for others, last in ((before, True), (before.T, False))[: 1 if causal else 2]:
        shared = _edge_ids(segments, inside, last=last)
        members = segments == shared[:, None]
        if inside is not None:
            members = members & inside
        same = segments.reshape(batch, blocks, -1, 1) == shared.reshape(batch, 1, 1, blocks)
        visible = others[:, None] & same
        found.append(SummaryMask(members, _mask_empty_blocks(visible.reshape(-1, *visible.shape[2:]), batch, members)))
    return found


def _edge_ids(segments: Int[Array, 'm c'], inside: Bool[Array, 'm c'] | None, *, last: bool) -> Int[Array, ' m']:
    """The segment of the last (or first) valid position of every block."""
    if inside is None:
        return segments[:, -1 if last else 0]
    size = segments.shape[1]
    at = size - 1 - inside[:, ::-1].argmax(axis=1) if last else inside.argmax(axis=1)
    return jnp.take_along_axis(segments, at[:, None], axis=1)[:, 0]


def _mask_empty_blocks(
    visible: Bool[Array, 'm #c n'], batch: int, members: Bool[Array, 'm c'] | None
) -> Bool[Array, 'm #c n']:
    """Nobody sees the summary of a block without members."""
    if members is None:
        return visible
    some = members.any(axis=-1).reshape(batch, 1, 1, -1)
    return (visible.reshape(batch, -1, *visible.shape[1:]) & some).reshape(visible.shape)
