"""Combiner-Logsparse by its kernel: when it can be used, and how.

Letters: as in `spans`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner.kernels.choice import Implementation
from combiner.kernels.dropout import draw_seeds
from combiner.kernels.shards import by_shard
from combiner.kernels.tpu.arrays import Tokens
from combiner.kernels.tpu.inputs import refuse_inputs, refuse_memory, refuse_pools, seeds_of_lanes, sizes_of
from combiner.kernels.tpu.layout import from_lanes, to_lanes
from combiner.kernels.tpu.logsparse.kernels import attend as attend_chunks
from combiner.kernels.tpu.logsparse.plan import SiblingPlan
from combiner.kernels.tpu.logsparse.spans import Ids
from combiner.kernels.tpu.plan import ROWS_OF_A_REGISTER
from combiner.ops.blocks import block_length
from combiner.ops.pooling import Pools, plain_name
from combiner.ops.segments import PADDING_ID
from combiner.ops.softmax import Drop

CHUNK = 128  # positions by default: the lanes of a register, and the width of the matrix unit
NOBODY = PADDING_ID + 1  # the id of spans that no position has


def attend(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    chunk: int | None,
    causal: bool,
    pools: Pools,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends as the plain form does; dropout draws other numbers. For the arguments see `core.mechanism`."""
    seeds, kept = draw_seeds(drop, q.shape[0], q.shape[2])

    def body(q, k, v, valid, segments, seeds, kept):
        plan = make_plan(q, chunk=chunk, causal=causal, pools=pools, packed=segments is not None)
        tokens = Tokens(*(to_lanes(x, plan) for x in (q, k, v)))
        ids, of_heads = segment_ids(plan, valid, segments), seeds_of_lanes(plan, seeds, kept)
        return from_lanes(attend_chunks(plan, tokens, ids, of_heads), plan)

    letters = ('blhd', 'blhd', 'blhd', 'bl', 'bl', 'bh', '')
    return by_shard(body, (q, k, v, valid, segments, seeds, kept), letters, 'blhd')


def refuse(
    q: Float[Array, 'b l h d'],
    *,
    chunk: int | None,
    causal: bool,
    pools: Pools,
    valid: Any = None,
    segments: Any = None,
    drop: Drop | None = None,
) -> str:
    """Returns the reason why the kernel cannot be used; empty if it can."""
    del valid
    reason = refuse_inputs(q, drop) or refuse_pools(pools)
    if reason:
        return reason
    plan = make_plan(q, chunk=chunk, causal=causal, pools=pools, packed=segments is not None)
    return refuse_memory(plan, f'length {q.shape[1]}')


def make_plan(
    q: Float[Array, 'b l h d'], *, chunk: int | None, causal: bool, pools: Pools, packed: bool
) -> SiblingPlan:
    """Returns the sizes of the kernel; a chunk is at least a register."""
    chunk = block_length(CHUNK if chunk is None else chunk, q.shape[1])
    return SiblingPlan(
        **sizes_of(q),
        name='combiner_logsparse',
        block=max(ROWS_OF_A_REGISTER[q.dtype], chunk),
        causal=causal,
        pool=plain_name(pools) or '',
        levels=1,
        packed=packed,
    )


def segment_ids(plan: SiblingPlan, valid: Bool[Array, 'b l'] | None, segments: Int[Array, 'b l'] | None) -> Ids | None:
    """Returns the segment ids of positions, nodes and spans; None if all that are ever reached are equal."""
    chunks = 1 << plan.span_levels  # so many would have all spans
    if segments is None and valid is None and (plan.causal or plan.length == chunks * plan.block):
        return None
    ids = jnp.zeros((plan.batch, plan.length), jnp.int32) if segments is None else segments.astype(jnp.int32)
    ids = ids if valid is None else jnp.where(valid, ids, PADDING_ID)
    room = ((0, 0), (0, chunks * plan.block - plan.length))
    ids = jnp.pad(ids, room, constant_values=PADDING_ID)
    of_nodes = _nodes(ids, plan.node_levels).reshape(plan.batch, 2, chunks, plan.block)
    of_spans = _nodes(of_nodes[..., 0], plan.span_levels)
    ids, of_nodes = ids.reshape(plan.batch, chunks, plan.block)[:, : plan.blocks], of_nodes[:, :, : plan.blocks]
    seen, own = _of_chunks(plan, of_spans)
    return Ids(ids, jnp.where(of_nodes == PADDING_ID, NOBODY, of_nodes)[:, : plan.sides], seen, own)


def _nodes(ids: Int[Array, 'b *side l'], levels: int) -> Int[Array, 'b side l']:
    """Returns in each row the id of the node of each side that is there; in the first row of the end, of the whole.

    A left node is of its last document, a right node of its first. With `levels`, nodes have less than `2^levels` rows,
    and every `2^levels` rows are apart; their first row has the id of the whole.
    """
    both = jnp.stack([ids, ids], axis=1) if ids.ndim == 2 else ids
    found = jnp.full(both.shape, PADDING_ID, jnp.int32)
    for t in range(levels):
        first, second = both[..., ::2], both[..., 1::2]
        found = found.at[:, :, 1 << t :: 2 << t].set(jnp.stack([first[:, 0], second[:, 1]], axis=1))
        last = jnp.where(second[:, 0] != PADDING_ID, second[:, 0], first[:, 0])
        both = jnp.stack([last, jnp.where(first[:, 1] != PADDING_ID, first[:, 1], second[:, 1])], axis=1)
    return found.at[:, :, :: 1 << levels].set(both)


def _of_chunks(plan: SiblingPlan, of_spans: Int[Array, 'b side r']) -> list[Int[Array, 'b n u']]:
    """Returns the ids of the spans that each chunk sees, and of the spans that hold it."""
    number, level = np.arange(plan.blocks)[:, None], np.arange(plan.span_levels)
    row, is_right = (number >> level | 1) << level, number >> level & 1
    found = []
    for side in (1 - is_right, is_right):
        ids = of_spans[:, side, row]
        ids = jnp.where((ids == PADDING_ID) | (side >= plan.sides), NOBODY, ids)
        room = ((0, 0), (0, 0), (0, plan.spans - plan.span_levels))
        found.append(jnp.pad(ids, room, constant_values=NOBODY))
    return found


LOGSPARSE = Implementation(attend, refuse)
