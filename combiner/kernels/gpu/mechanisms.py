"""Mechanisms by the GPU kernels, on the shard of every device: Combiner-Fixed and Combiner-Tree.

Some poolings have a kernel (`summaries`); for the others XLA computes the summaries (`kernels.summaries`).

Letters: as in `block_table`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.costs import tree_levels
from combiner.kernels.choice import Implementation, interpreting, refuse_old_gpu
from combiner.kernels.dropout import draw_seeds, refuse_function
from combiner.kernels.shards import by_shard, keys_to_read
from combiner.kernels.summaries import fused_pool, summaries_by_level
from combiner.ops.blocks import block_segment_ids, clip_size, split_ids
from combiner.ops.pooling import Pools
from combiner.ops.segments import PADDING_ID, edge_id
from combiner.ops.softmax import Drop

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
WIDEST = {2: 256, 4: 128}  # head width by the bytes of a number: of wider heads, no tile fits into the registers


def attend(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l g d'],
    v: Float[Array, 'b l g d'],
    *,
    name: str,
    block: int,
    levels: int,
    causal: bool,
    pools: Pools,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends as the plain form of the mechanism does; no logits are in memory. Dropout draws other numbers.

    Args:
        name: of the mechanism, for the log.
        block: positions in a block, and with several levels, summaries in a row.
        levels: of summaries; with one, all blocks are in one row.
        q, k, v, causal, pools, valid, segments, drop: see `core.mechanism`.
    """
    from combiner.kernels.gpu import block_table, slices, summaries  # only this function needs Pallas

    (batch, length, heads, width), packed = q.shape, segments is not None
    size = clip_size(block, length)
    relations = ('earlier',) if causal else ('earlier', 'later') if packed else ('other',)
    plan = slices.Plan(length, width, size, causal, packed, relations, levels, interpret=interpreting())
    k, v = keys_to_read(name, q, k, v)
    # The kernels know which positions exist, causal or not; ids say more.
    ids = block_segment_ids(batch, length, size, causal=True, valid=valid, segments=segments)
    ids = None if ids is None else ids.reshape(batch, -1)[:, :length]
    # For every level and relation: the ids of summaries, and if XLA computes them, before the ids keys and values.
    tables = [(of_table,) for of_level in _summary_ids(ids, plan) for of_table in of_level]
    pool = fused_pool(pools, levels)
    if not pool:
        lasts = [relation != 'later' for relation in relations]
        options = {'block': block, 'levels': levels, 'lasts': lasts, 'causal': causal, 'pools': pools}
        found = summaries_by_level(q, k, v, valid=valid, segments=segments, **options)
        sides = [tuple(x[:, side] for x in of_level) for of_level in found for side in range(len(lasts))]
        tables = [(*summary, *of_table) for summary, of_table in zip(sides, tables, strict=True)]

    def body(q, k, v, segment_ids, dropout, *arrays) -> Any:
        parts = [arrays[i :: len(tables)] for i in range(len(tables))]
        levels = [parts[i : i + len(relations)] for i in range(0, len(parts), len(relations))]
        if pool:
            ids = [[of_table for (of_table,) in sides] for sides in levels]
            return summaries.attend_to_summaries(q, k, v, ids, segment_ids, dropout, pool, plan)
        of_levels = [[block_table.Table(*of_table) for of_table in sides] for sides in levels]
        return block_table.attend_block_and_tables(q, k, v, of_levels, segment_ids, dropout, plan)

    arrays = [x for of_tables in zip(*tables, strict=True) for x in of_tables]
    letters = [axes for axes in (('bn',) if pool else ('bnhd', 'bnhd', 'bn')) for _ in tables]
    given = (q, k, v, ids, _dropout(drop, batch, heads), *arrays)
    return by_shard(body, given, ('blhd', 'blhd', 'blhd', 'bl', 'bh2', *letters), 'blhd')


def _summary_ids(segment_ids: Int[Array, 'b l'] | None, plan: Any) -> list[list[Int[Array, 'b _'] | None]]:
    """Returns the segment ids of the summaries of every level, for each relation; None if all are equal.

    They are chosen as in `summary_masks`: for later positions the last id of a block or row, for earlier the first.
    """
    below: list[Any] = [segment_ids] * len(plan.relations)
    found = []
    for _ in range(plan.levels):
        pairs = zip(below, plan.relations, strict=True)
        below = [_edge_ids(ids, plan, last=relation != 'later') for ids, relation in pairs]
        found.append(below)
    return found


def _edge_ids(ids: Int[Array, 'b n'] | None, plan: Any, *, last: bool) -> Int[Array, 'b s'] | None:
    if ids is None:
        return None
    of_blocks = split_ids(ids, plan.block, PADDING_ID)
    if plan.packed:
        edges = edge_id(of_blocks, last=last)
    else:
        edges = jnp.where((of_blocks != PADDING_ID).any(axis=-1), 0, PADDING_ID)
    return edges.reshape(len(ids), -1)


def _dropout(drop: Drop | None, batch: int, heads: int) -> Int[Array, 'b h 2'] | None:
    """Returns what `draw_seeds` does in one array; None for no dropout."""
    seeds, kept = draw_seeds(drop, batch, heads)
    if seeds is None or kept is None:
        return None
    return jnp.stack([seeds, jnp.broadcast_to(kept, seeds.shape)], axis=-1)


def refuse(q: Float[Array, 'b l h d'], *, drop: Drop | None, **options: Any) -> str:
    """Returns the reason why the kernels cannot be used; empty if they can."""
    del options
    if q.dtype not in DTYPES:
        return f'takes {", ".join(jnp.dtype(dtype).name for dtype in DTYPES)}, not {q.dtype}'
    widest = WIDEST[q.dtype.itemsize]
    if q.shape[-1] > widest:
        return f'takes heads of a width up to {widest} in {q.dtype}, not {q.shape[-1]}'
    return refuse_old_gpu() or refuse_function(drop)


def _tree(q: Float[Array, 'b l h d'], branch: int) -> dict[str, Any]:
    # Without levels, no block sees another: the one level then has one summary, of the own block.
    return {'name': 'combiner_tree', 'block': branch, 'levels': max(1, tree_levels(q.shape[1], branch))}


FIXED = Implementation(
    lambda q, k, v, **options: attend(q, k, v, name='combiner_fixed', levels=1, **options), refuse, groups=True
)
TREE = Implementation(
    lambda q, k, v, *, branch, **options: attend(q, k, v, **_tree(q, branch), **options), refuse, groups=True
)
