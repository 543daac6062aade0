"""Combiner-Fixed on a GPU: XLA computes the summaries of blocks, and the kernels of `block_table` attend.

Letters: as in `block_table`; `m` blocks of the whole batch, `c` position in a block.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from combiner.ops.backends import Implementation, interpreting
from combiner.ops.blocks import Blocks, Tokens, clip_size, heads_first
from combiner.ops.pooling import Pools
from combiner.ops.segments import PADDING_ID, edge_id
from combiner.ops.shards import by_shard
from combiner.ops.softmax import Drop, Dropout
from combiner.ops.summaries import summarise, summary_masks

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
WIDEST = 256  # of wider heads, no tile fits into the registers


def attend(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    block: int,
    causal: bool,
    pools: Pools,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends as `attend_combiner_fixed` does; no logits are in memory. Dropout draws other numbers."""
    from combiner.kernels.gpu import block_table, slices  # only this function needs Pallas

    block, packed = clip_size(block, q.shape[1]), segments is not None
    blocks = Blocks.of(q, block, drop)
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments)
    segment_ids = tokens.segment_ids
    if segment_ids is not None:
        segment_ids = segment_ids.reshape(blocks.batch, -1)[:, : blocks.length]
    tables = list(_tables(tokens, blocks, pools, causal=causal, packed=packed))
    relations = ('earlier', 'later')[: len(tables)] if causal or packed else ('other',)
    plan = slices.Plan(q.shape[1], q.shape[3], block, causal, packed, relations, interpreting())
    dropout = None
    if isinstance(drop, Dropout):
        seeds = lax.bitcast_convert_type(jax.random.bits(drop.key, (q.shape[0], q.shape[2])), jnp.int32)
        kept = jnp.round((1 - jnp.asarray(drop.rate, jnp.float32)) * slices.KEPT_UNIT).astype(jnp.int32)
        dropout = jnp.stack([seeds, jnp.broadcast_to(kept, seeds.shape)], axis=-1)

    def body(q, k, v, segment_ids, dropout, *tables):
        tables = [block_table.Table(*table) for table in zip(*(tables[i::3] for i in range(3)), strict=True)]
        return block_table.attend_block_and_tables(q, k, v, tables, segment_ids, dropout, plan)

    arrays = q, k, v, segment_ids, dropout, *(x for table in tables for x in table)
    letters = 'blhd', 'blhd', 'blhd', 'bl', 'bh2', *('bnhd', 'bnhd', 'bn') * len(tables)
    return by_shard(body, arrays, letters, 'blhd')


def _tables(
    tokens: Tokens, blocks: Blocks, pools: Pools, *, causal: bool, packed: bool
) -> Iterator[tuple[Float[Array, 'b n h d'], Float[Array, 'b n h d'], Int[Array, 'b n'] | None]]:
    """Yields the keys, values and segment ids of the summaries of all blocks: the masks are `summary_masks`."""
    counts = {'batch': blocks.batch, 'blocks': blocks.count}
    masks = summary_masks(tokens.segment_ids, causal=causal, packed=packed, **counts)
    for mask, last in zip(masks, (True, False), strict=False):
        q, k, v = heads_first((tokens.q, tokens.k, tokens.v))
        summaries = summarise(q, k, v, mask.members, pools=pools)
        shape = blocks.batch, blocks.count, blocks.heads, -1
        k, v = (jnp.moveaxis(x, 0, 1).reshape(shape) for x in summaries)
        ids = None
        if packed:
            ids = edge_id(tokens.segment_ids, last=last).reshape(shape[:2])
        elif mask.members is not None:
            ids = jnp.where(mask.members.any(axis=-1), 0, PADDING_ID).reshape(shape[:2])
        yield k, v, ids


def refuse(q: Float[Array, 'b l h d'], *, drop: Drop | None, **options: Any) -> str:
    """Returns the reason why the kernels cannot be used; empty if they can."""
    del options
    if q.dtype not in DTYPES:
        return f'takes {", ".join(jnp.dtype(dtype).name for dtype in DTYPES)}, not {q.dtype}'
    if q.shape[-1] > WIDEST:
        return f'takes heads of a width up to {WIDEST}, not {q.shape[-1]}'
    if drop is not None and not isinstance(drop, Dropout):
        return 'drops weights by `ops.softmax.Dropout` only'
    return ''


TRITON = Implementation(attend, refuse)
