"""Spans: the summaries of blocks and of neighbouring spans, level after level, and which positions attend to them.

A summary has one segment id, as its members are of one document. For later positions it is the last document of the
span, the only one that they can share; for earlier positions the first.

Letters: as in `blocks`, and `n` blocks of a sequence or spans in a row, `f` features of a pooling.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.ops import parts
from combiner.ops.blocks import Blocks, Tokens, scale_queries, swap_heads
from combiner.ops.pooling import Pool, Pools
from combiner.ops.segments import PADDING_ID, edge_id, same_segment
from combiner.ops.softmax import einsum, mask_logits, partial_softmax, softmax


def summarise(
    q: Float[Array, '*n c d'],
    k: Float[Array, '*n c d'],
    v: Float[Array, '*n c d'],
    members: Bool[Array, '...'] | None = None,
    *,
    pools: Pools,
) -> tuple[Float[Array, '*n d'], Float[Array, '*n d']]:
    """Pools blocks into summaries (Combiner, equation (7)): keys and values; zeros for a block without members.

        K_r = pool_j k_j        V_r = Σ_j softmax_j(Q_r·k_j/√d) v_j        Q_r = pool_j q_j

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        members: which positions belong to the span, broadcastable to `*n c`; None for all.
        pools: the pooling of queries and keys.
    """
    local_query, key = scale_queries(pools.q(q, members)), pools.k(k, members)
    weights = softmax(mask_logits(einsum('...d,...cd->...c', local_query, k), members))
    return key, einsum('...c,...cd->...d', weights.astype(v.dtype), v).astype(v.dtype)


def other_blocks_mask(batch: int, blocks: int, *, causal: bool) -> Bool[Array, 'm 1 n']:
    """Returns which other blocks of its sequence each block attends to: the earlier ones, or all when not causal.

    `m` are the own blocks, `n` those of the whole sequence, if sequences are cut over devices (`parts`).
    """
    own, every = _numbers(blocks)
    return jnp.tile(every < own if causal else every != own, (batch, 1))[:, None]


def _numbers(blocks: int) -> tuple[Int[Array, 'n 1'], Int[Array, ' all']]:
    """Returns the numbers of the own blocks of a sequence, and of all its blocks."""
    return parts.own_numbers(blocks)[:, None], jnp.arange(parts.count() * blocks)


class SummaryMask(NamedTuple):
    """One summary of every block, and the blocks that attend to it.

    Attributes:
        members: which positions of a block its summary is of; None for all.
        visible: whether the block at `m` (or, with documents, its position `c`) attends to the summary of block `n` of
            its sequence; of all blocks, if sequences are cut over devices.
    """

    members: Bool[Array, 'm c'] | None
    visible: Bool[Array, 'm #c n']


def summary_masks(
    segment_ids: Int[Array, 'm c'] | None, *, batch: int, blocks: int, causal: bool, packed: bool
) -> list[SummaryMask]:
    """Returns the summaries by which blocks attend to the other blocks of their sequence (causal: the earlier ones).

    Without documents one summary of the whole block serves all. With documents a later position shares at most the last
    document of a block, an earlier position at most the first. So one summary is of a block's last document; later
    blocks attend to it if they hold that document. If not causal, another summary is of its first document, for earlier
    blocks. No block attends to the summary of a block of padding.

    Args:
        segment_ids: of the positions of blocks (see `block_segment_ids`).
        batch: the number of sequences.
        blocks: the blocks of a sequence.
        causal: whether a position attends to itself and earlier positions only.
        packed: whether there are documents; if not, segment ids only mark padding.
    """
    if segment_ids is None or not packed:
        others = other_blocks_mask(batch, blocks, causal=causal)
        if segment_ids is None:
            return [SummaryMask(None, others)]
        members = segment_ids != PADDING_ID
        some = parts.gather(members.any(axis=-1).reshape(batch, 1, 1, blocks), 3)
        visible = others.reshape(batch, blocks, 1, -1) & some
        return [SummaryMask(members, visible.reshape(-1, 1, visible.shape[-1]))]
    own, every = _numbers(blocks)
    found = []
    for others, last in ((every < own, True), (every > own, False))[: 1 if causal else 2]:
        shared = edge_id(segment_ids, last=last)
        members = (segment_ids == shared[:, None]) & (shared != PADDING_ID)[:, None]
        of_all = parts.gather(shared.reshape(batch, 1, 1, blocks), 3)
        same = segment_ids.reshape(batch, blocks, -1, 1) == of_all
        visible = others[:, None] & same & (of_all != PADDING_ID)
        found.append(SummaryMask(members, visible.reshape(-1, *visible.shape[2:])))
    return found


class EncodedSpans(NamedTuple):
    """Encoded queries and keys (see `pooling`) of spans, reduced; no segment ids if all members are of one segment."""

    q: Float[Array, '*h n f']
    k: Float[Array, '*h n f']
    segment_ids: Int[Array, '*m n'] | None


def encode_tokens(
    q: Float[Array, '*h c d'], k: Float[Array, '*h c d'], segment_ids: Int[Array, '*m c'] | None, pools: Pools
) -> EncodedSpans:
    """Encodes positions as spans of one position; `q` is not scaled."""
    members = None if segment_ids is None else segment_ids != PADDING_ID
    return EncodedSpans(pools.q.encode_members(q, members), pools.k.encode_members(k, members), segment_ids)


def merge_neighbours(spans: EncodedSpans, count: int, pools: Pools, *, last: bool) -> EncodedSpans:
    """Merges every `count` neighbours, for later (`last`) or earlier positions; `count` divides their number."""
    members = segment_ids = None
    if spans.segment_ids is not None:
        neighbours = spans.segment_ids.reshape(*spans.segment_ids.shape[:-1], -1, count)
        segment_ids = edge_id(neighbours, last=last)
        members = neighbours == segment_ids[..., None]

    def reduced(pool: Pool, x: Array) -> Array:
        x = x.reshape(*x.shape[:-2], -1, count, x.shape[-1])
        return pool.reduce(x if members is None else pool.keep(x, members), axis=-2)

    return EncodedSpans(reduced(pools.q, spans.q), reduced(pools.k, spans.k), segment_ids)


def map_spans(spans: EncodedSpans, change: Callable[[Array, int], Array]) -> EncodedSpans:
    """Applies `change` to the axis of spans: the last but one, of segment ids the last."""
    segment_ids = None if spans.segment_ids is None else change(spans.segment_ids, -1)
    return EncodedSpans(change(spans.q, -2), change(spans.k, -2), segment_ids)


def join_spans(found: Sequence[EncodedSpans], how: Callable[..., Array]) -> EncodedSpans:
    """Concatenates or stacks spans, by `jnp.concatenate` or `jnp.stack`."""
    q, k, segment_ids = zip(*found, strict=True)
    return EncodedSpans(how(q, axis=-2), how(k, axis=-2), None if segment_ids[0] is None else how(segment_ids, axis=-1))


def decode_spans(
    spans: EncodedSpans, pools: Pools, dtype: Any
) -> tuple[Float[Array, '*h n d'], Float[Array, '*h n d']]:
    """Decodes the summary queries, which are scaled, and the summary keys; zeros for a span without members."""
    some = None if spans.segment_ids is None else spans.segment_ids != PADDING_ID
    query, key = pools.q.decode_or_zero(spans.q, some), pools.k.decode_or_zero(spans.k, some)
    return scale_queries(query.astype(dtype)), key.astype(dtype)


class Nodes(NamedTuple):
    """Nodes of one level, with the children of one parent in a row; `h m 1 d` before they are grouped with siblings."""

    encoded: EncodedSpans
    key: Float[Array, 'h m c d']
    value: Float[Array, 'h m c d']

    def with_segment_ids(self, segment_ids: Int[Array, 'm c'] | None) -> 'Nodes':
        """Returns the same nodes with other segment ids."""
        return self._replace(encoded=self.encoded._replace(segment_ids=segment_ids))


def leaves(tokens: Tokens, pools: Pools) -> Nodes:
    """Returns positions as nodes, in rows that are blocks."""
    q, k, v, segment_ids = tokens
    return Nodes(encode_tokens(q, k, segment_ids, pools), k, v)


def parents(children: Nodes, pools: Pools, *, last: bool) -> Nodes:
    """Returns the parent of every row, as `h m 1 d`; `last` as in `merge_neighbours`."""
    spans = merge_neighbours(children.encoded, children.key.shape[2], pools, last=last)
    query, key = decode_spans(spans, pools, children.key.dtype)
    mask = same_segment(spans.segment_ids, children.encoded.segment_ids)
    value = partial_softmax(query, children.key, children.value, mask).normalize().astype(children.value.dtype)
    return Nodes(spans, key, value)


def in_rows(nodes: Nodes, batch: int, branch: int, pools: Pools) -> Nodes:
    """Groups nodes `h m 1 d` into rows of `branch` siblings of one sequence, padded with nodes without members."""

    def rows(x: Shaped[Array, '*h m 1 x'], fill: Any = 0) -> Shaped[Array, '*h g c x']:
        x = x.reshape(*x.shape[:-3], batch, -1, x.shape[-1])
        room = ((0, 0),) * (x.ndim - 2) + ((0, -x.shape[-2] % branch), (0, 0))
        return jnp.pad(x, room, constant_values=fill).reshape(*x.shape[:-3], -1, branch, x.shape[-1])

    q, k, segment_ids = nodes.encoded
    segment_ids = None if segment_ids is None else rows(segment_ids[..., None], PADDING_ID)[..., 0]
    encoded = EncodedSpans(rows(q, pools.q.identity(q)), rows(k, pools.k.identity(k)), segment_ids)
    return Nodes(encoded, rows(nodes.key), rows(nodes.value))


def parents_of_tokens(blocks: Blocks, tokens: Tokens, pools: Pools, *, last: bool, keys: int) -> Nodes:
    """Returns the parent of every block, as `h m 1 d`; `last` as in `merge_neighbours`, `keys` as in `Blocks.map`."""
    return swap_heads(blocks.map(lambda some: parents(leaves(some, pools), pools, last=last), tokens, keys=keys))
