"""Mechanisms by the GPU kernels, on the shard of every device: Combiner-Fixed.

A pooling without parameters has a kernel (`summaries`); for another XLA computes the summaries.

Letters: as in `block_table`; `m` blocks of the whole batch, `c` position in a block.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from combiner.kernels.choice import Implementation, interpreting
from combiner.kernels.shards import by_shard
from combiner.ops.blocks import Blocks, Tokens, clip_size, heads_first
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.segments import PADDING_ID, edge_id
from combiner.ops.softmax import Drop, Dropout
from combiner.ops.spans import summarise, summary_masks

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
WIDEST = 256  # of a wider head, no tile fits into the registers
OLDEST = (8, 0)  # compute capability of the first GPUs for which Triton compiles


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
    from combiner.kernels.gpu import block_table, slices, summaries  # only this function needs Pallas

    blocks, packed = Blocks.of(q, clip_size(block, q.shape[1]), drop), segments is not None
    tokens = blocks.tokens(q, k, v, causal=causal, valid=valid, segments=segments)
    relations = ('earlier',) if causal else ('earlier', 'later') if packed else ('other',)
    plan = slices.Plan(blocks.length, q.shape[3], blocks.size, causal, packed, relations, interpreting())
    pool = next((name for name, plain in PLAIN.items() if pools == plain), None)
    segment_ids = tokens.segment_ids
    if segment_ids is not None:
        segment_ids = segment_ids.reshape(blocks.batch, -1)[:, : blocks.length]
    tables = [(_summary_ids(tokens, blocks, last=relation != 'later', packed=packed),) for relation in relations]
    if not pool:
        computed = _summaries(tokens, blocks, pools, causal=causal, packed=packed)
        tables = [(*summaries, *ids) for summaries, ids in zip(computed, tables, strict=True)]

    def body(q, k, v, segment_ids, dropout, *arrays) -> Any:
        tables = [arrays[i :: len(relations)] for i in range(len(relations))]
        if pool:
            ids = [of_table for (of_table,) in tables]
            return summaries.attend_to_summaries(q, k, v, ids, segment_ids, dropout, pool, plan)
        tables = [block_table.Table(*table) for table in tables]
        return block_table.attend_block_and_tables(q, k, v, tables, segment_ids, dropout, plan)

    dropout = _dropout(drop, blocks.batch, blocks.heads, slices.KEPT_UNIT)
    arrays = [x for of_tables in zip(*tables, strict=True) for x in of_tables]
    letters = [axes for axes in (('bn',) if pool else ('bnhd', 'bnhd', 'bn')) for _ in relations]
    given = (q, k, v, segment_ids, dropout, *arrays)
    return by_shard(body, given, ('blhd', 'blhd', 'blhd', 'bl', 'bh2', *letters), 'blhd')


def _summary_ids(tokens: Tokens, blocks: Blocks, *, last: bool, packed: bool) -> Int[Array, 'b n'] | None:
    """Returns the segment ids of the summaries of blocks, as `summary_masks` chooses them; None if all are equal."""
    if tokens.segment_ids is None:
        return None
    if packed:
        ids = edge_id(tokens.segment_ids, last=last)
    else:
        ids = jnp.where((tokens.segment_ids != PADDING_ID).any(axis=-1), 0, PADDING_ID)
    return ids.reshape(blocks.batch, blocks.count)


def _summaries(
    tokens: Tokens, blocks: Blocks, pools: Pools, *, causal: bool, packed: bool
) -> list[tuple[Float[Array, 'b n h d'], Float[Array, 'b n h d']]]:
    """Returns the keys and values of the summaries of blocks, for each of `summary_masks`."""
    counts = {'batch': blocks.batch, 'blocks': blocks.count}
    masks = summary_masks(tokens.segment_ids, causal=causal, packed=packed, **counts)
    q, k, v = heads_first(tuple(blocks.split(x) for x in tokens[:3]))

    def by_sequence(x: Float[Array, 'h m d']) -> Float[Array, 'b n h d']:
        return jnp.moveaxis(x, 0, 1).reshape(blocks.batch, blocks.count, blocks.heads, -1)

    summaries = [summarise(q, k, v, mask.members, pools=pools) for mask in masks]
    return [(by_sequence(key), by_sequence(value)) for key, value in summaries]


def _dropout(drop: Drop | None, batch: int, heads: int, unit: int) -> Int[Array, 'b h 2'] | None:
    """Returns a seed for each sequence and head, and how many of `unit` weights are kept."""
    if not isinstance(drop, Dropout):
        return None
    seeds = lax.bitcast_convert_type(jax.random.bits(drop.key, (batch, heads)), jnp.int32)
    kept = jnp.round((1 - jnp.asarray(drop.rate, jnp.float32)) * unit).astype(jnp.int32)
    return jnp.stack([seeds, jnp.broadcast_to(kept, seeds.shape)], axis=-1)


def refuse(q: Float[Array, 'b l h d'], *, drop: Drop | None, **options: Any) -> str:
    """Returns the reason why the kernels cannot be used; empty if they can."""
    del options
    if q.dtype not in DTYPES:
        return f'takes {", ".join(jnp.dtype(dtype).name for dtype in DTYPES)}, not {q.dtype}'
    if q.shape[-1] > WIDEST:
        return f'takes heads of a width up to {WIDEST}, not {q.shape[-1]}'
    if drop is not None and not isinstance(drop, Dropout):
        return 'drops weights by ops.softmax.Dropout, not by another function'
    return _refuse_device()


def _refuse_device() -> str:
    if jax.default_backend() != 'gpu':
        return ''
    capability = str(getattr(jax.local_devices()[0], 'compute_capability', ''))
    if not re.fullmatch(r'\d+\.\d+', capability) or tuple(map(int, capability.split('.'))) < OLDEST:
        oldest = '.'.join(map(str, OLDEST))
        return f'needs an NVIDIA GPU of compute capability {oldest} or newer, not {capability or "an unknown one"}'
    return ''


FIXED = Implementation(attend, refuse)
