"""Summaries of blocks, and which other blocks attend to them.

Letters: as in `blocks`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.ops.blocks import scale_queries
from combiner.ops.pooling import Pools
from combiner.ops.segments import PADDING_ID, edge_id
from combiner.ops.softmax import einsum, mask_logits, softmax


def other_blocks_mask(batch: int, blocks: int, *, causal: bool) -> Bool[Array, 'm 1 n']:
    """Returns which other blocks of its sequence each block attends to: the earlier ones, or all when not causal."""
    others = jnp.tri(blocks, k=-1, dtype=bool) if causal else ~jnp.eye(blocks, dtype=bool)
    return jnp.tile(others, (batch, 1))[:, None]


class SummaryMask(NamedTuple):
    """One summary of every block, and the blocks that attend to it.

    Attributes:
        members: which positions of a block its summary is of; None for all.
        visible: whether the block at `m` (or, with documents, its position `c`) attends to the summary of block `n` of
            its sequence.
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
        some = members.any(axis=-1).reshape(batch, 1, 1, blocks)
        return [SummaryMask(members, (others.reshape(batch, blocks, 1, blocks) & some).reshape(-1, 1, blocks))]
    before = jnp.tri(blocks, k=-1, dtype=bool)
    found = []
    for others, last in ((before, True), (before.T, False))[: 1 if causal else 2]:
        shared = edge_id(segment_ids, last=last)
        there = shared != PADDING_ID
        same = segment_ids.reshape(batch, blocks, -1, 1) == shared.reshape(batch, 1, 1, blocks)
        visible = others[:, None] & same & there.reshape(batch, 1, 1, blocks)
        members = (segment_ids == shared[:, None]) & there[:, None]
        found.append(SummaryMask(members, visible.reshape(-1, *visible.shape[2:])))
    return found


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
