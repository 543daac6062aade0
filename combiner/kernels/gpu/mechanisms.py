"""Mechanisms by the GPU kernels, on the shard of every device: Combiner-Fixed and Combiner-Tree.

A pooling without parameters has a kernel (`summaries`); for another XLA computes the summaries of blocks.

Letters: as in `block_table`; `m` blocks of the whole batch, `c` position in a block.
"""

import re
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.costs import tree_levels
from combiner.kernels.choice import Implementation, interpreting
from combiner.kernels.dropout import draw_seeds, refuse_function
from combiner.kernels.shards import by_shard
from combiner.ops.blocks import Blocks, Tokens, clip_size, heads_first, split_ids
from combiner.ops.chunking import target
from combiner.ops.pooling import Pools, plain_name
from combiner.ops.segments import PADDING_ID, edge_id
from combiner.ops.softmax import Drop
from combiner.ops.spans import summarise, summary_masks

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
WIDEST = {2: 256, 4: 128}  # head width by the bytes of a number: of wider heads, no tile fits into the registers


def attend(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
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
        block: positions in a block, and with several levels, summaries in a row.
        levels: of summaries; with one, all blocks are in one row.
        q, k, v, causal, pools, valid, segments, drop: see `core.mechanism`.
    """
    from combiner.kernels.gpu import block_table, slices, summaries  # only this function needs Pallas

    blocks, packed = Blocks.of(q, clip_size(block, q.shape[1]), drop), segments is not None
    relations = ('earlier',) if causal else ('earlier', 'later') if packed else ('other',)
    plan = slices.Plan(
        blocks.length, q.shape[3], blocks.size, causal, packed, relations, levels, interpret=interpreting()
    )
    pool = plain_name(pools)
    # The kernels know which positions exist; ids say more.
    tokens = blocks.tokens(q, k, v, causal=causal or bool(pool), valid=valid, segments=segments)
    segment_ids = tokens.segment_ids
    if segment_ids is not None:
        segment_ids = segment_ids.reshape(blocks.batch, -1)[:, : blocks.length]
    # For every level and relation: the ids of summaries, and if XLA computes them, before the ids keys and values.
    tables = [(ids,) for of_level in _summary_ids(segment_ids, plan) for ids in of_level]
    if not pool:
        computed = _summaries(tokens, blocks, pools, causal=causal, packed=packed)
        tables = [(*summaries, *ids) for summaries, ids in zip(computed, tables, strict=True)]

    def body(q, k, v, segment_ids, dropout, *arrays) -> Any:
        parts = [arrays[i :: len(tables)] for i in range(len(tables))]
        levels = [parts[i : i + len(relations)] for i in range(0, len(parts), len(relations))]
        if pool:
            ids = [[of_table for (of_table,) in sides] for sides in levels]
            return summaries.attend_to_summaries(q, k, v, ids, segment_ids, dropout, pool, plan)
        of_levels = [[block_table.Table(*of_table) for of_table in sides] for sides in levels]
        return block_table.attend_block_and_tables(q, k, v, of_levels, segment_ids, dropout, plan)

    dropout = _dropout(drop, blocks.batch, blocks.heads)
    arrays = [x for of_tables in zip(*tables, strict=True) for x in of_tables]
    letters = [axes for axes in (('bn',) if pool else ('bnhd', 'bnhd', 'bn')) for _ in tables]
    given = (q, k, v, segment_ids, dropout, *arrays)
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


def _dropout(drop: Drop | None, batch: int, heads: int) -> Int[Array, 'b h 2'] | None:
    """Returns what `draw_seeds` does in one array; None for no dropout."""
    seeds, kept = draw_seeds(drop, batch, heads)
    if seeds is None or kept is None:
        return None
    return jnp.stack([seeds, jnp.broadcast_to(kept, seeds.shape)], axis=-1)


# Names of GPUs older than compute capability 8.0, or of other makers: Triton does not compile for them. Brands first,
# which ended with the generation before.
TOO_OLD = re.compile(
    r'Tesla|Quadro|TITAN|GTX|RTX 20\d\d|\b[KMP]\d+\b|\bG?V100|\bT4|\bT\d{3,4}\b|Xavier|AMD|Radeon|Instinct|gfx\d'
)


def refuse(q: Float[Array, 'b l h d'], *, levels: int, pools: Pools, drop: Drop | None, **options: Any) -> str:
    """Returns the reason why the kernels cannot be used; empty if they can."""
    del options
    if q.dtype not in DTYPES:
        return f'takes {", ".join(jnp.dtype(dtype).name for dtype in DTYPES)}, not {q.dtype}'
    widest = WIDEST[q.dtype.itemsize]
    if q.shape[-1] > widest:
        return f'takes heads of a width up to {widest} in {q.dtype}, not {q.shape[-1]}'
    if levels > 1 and plain_name(pools) != 'max':
        return f'pools summaries of summaries by max, not {plain_name(pools) or "parameters"}'
    device = target()
    if device.platform == 'gpu' and TOO_OLD.search(device.kind):
        return f'needs an NVIDIA GPU of compute capability 8.0 or newer, not {device.kind}'
    return refuse_function(drop)


def _tree(q: Float[Array, 'b l h d'], branch: int) -> dict[str, int]:
    # Without levels, no block sees another: the one level then has one summary, of the own block.
    return {'block': branch, 'levels': max(1, tree_levels(q.shape[1], branch))}


FIXED = Implementation(
    lambda q, k, v, **options: attend(q, k, v, levels=1, **options),
    lambda q, **options: refuse(q, levels=1, **options),
)
TREE = Implementation(
    lambda q, k, v, *, branch, **options: attend(q, k, v, **_tree(q, branch), **options),
    lambda q, *, branch, **options: refuse(q, **_tree(q, branch), **options),
)
