"""Combiner-Logsparse by its kernel: when it can be used, and how.

Letters: as in `spans`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner.kernels.choice import Implementation, interpreting
from combiner.kernels.shards import by_shard
from combiner.kernels.tpu.arrays import Seeds, Tokens
from combiner.kernels.tpu.layout import from_lanes, to_lanes
from combiner.kernels.tpu.logsparse.kernels import attend as attend_chunks
from combiner.kernels.tpu.logsparse.plan import SiblingPlan
from combiner.kernels.tpu.logsparse.spans import Ids
from combiner.kernels.tpu.mechanisms import pool_name
from combiner.kernels.tpu.plan import MIB, ROWS_OF_A_REGISTER
from combiner.ops.blocks import block_length
from combiner.ops.chunking import target
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.segments import PADDING_ID
from combiner.ops.softmax import Drop, Dropout

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
    seeds = kept = None
    if isinstance(drop, Dropout):
        seeds = jax.lax.bitcast_convert_type(jax.random.bits(drop.key, (q.shape[0], q.shape[2])), jnp.int32)
        kept = jnp.round((1 - jnp.asarray(drop.rate, jnp.float32)) * 2**24).astype(jnp.int32)[None]

    def body(q, k, v, valid, segments, seeds, kept):
        plan = make_plan(q, chunk=chunk, causal=causal, pools=pools, packed=segments is not None)
        tokens = Tokens(*(to_lanes(x, plan) for x in (q, k, v)))
        if seeds is not None:
            seeds = jnp.pad(seeds, ((0, 0), (0, plan.lane_groups * plan.shared_by - plan.heads)))
        of_heads = None if seeds is None else Seeds(seeds, kept)
        return from_lanes(attend_chunks(plan, tokens, segment_ids(plan, valid, segments), of_heads), plan)

    letters = ('blhd', 'blhd', 'blhd', 'bl', 'bl', 'bh', '-')
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
    if q.dtype not in ROWS_OF_A_REGISTER:
        return f'takes float32 or bfloat16, not {q.dtype}'
    if pool_name(pools) is None:
        return f'pools by {" or ".join(PLAIN)}, not by parameters'
    if drop is not None and not isinstance(drop, Dropout):
        return 'drops weights by ops.softmax.Dropout, not by another function'
    plan = make_plan(q, chunk=chunk, causal=causal, pools=pools, packed=segments is not None)
    if plan.needed_memory > plan.memory:
        need, have = plan.needed_memory / MIB, plan.memory / MIB
        return f'would need {need:.0f} MiB of vector memory for length {q.shape[1]}, of {have:.0f} MiB'
    return ''


def make_plan(
    q: Float[Array, 'b l h d'], *, chunk: int | None, causal: bool, pools: Pools, packed: bool
) -> SiblingPlan:
    """Returns the sizes of the kernel; a chunk is at least a register."""
    batch, length, heads, width = q.shape
    chunk = block_length(CHUNK if chunk is None else chunk, length)
    return SiblingPlan(
        name='combiner_logsparse',
        batch=batch,
        length=length,
        heads=heads,
        head_width=width,
        block=max(ROWS_OF_A_REGISTER[q.dtype], chunk),
        causal=causal,
        pool=pool_name(pools) or '',
        levels=1,
        packed=packed,
        dtype=str(q.dtype),
        device=target().kind,
        interpret=interpreting(),
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
