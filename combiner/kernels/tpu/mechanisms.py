"""The mechanisms that have a kernel: when it can be used, and how, on the shard of every device.

A mechanism says what the summaries are: of blocks (Combiner-Fixed), or of `branch` summaries again (Combiner-Tree).
"""

import functools
from typing import Any

from absl import logging
from jaxtyping import Array, Bool, Float, Int

from combiner.costs import tree_levels
from combiner.kernels.choice import Implementation
from combiner.kernels.dropout import draw_seeds
from combiner.kernels.shards import by_shard, parts
from combiner.kernels.tpu.arrays import Tokens
from combiner.kernels.tpu.attend import attend as attend_tiles
from combiner.kernels.tpu.inputs import (
    refuse_inputs,
    refuse_memory,
    refuse_pools,
    seeds_of_lanes,
    sizes_of,
    whole_block,
)
from combiner.kernels.tpu.layout import from_lanes, segment_ids, to_lanes
from combiner.kernels.tpu.plan import ROWS_OF_A_REGISTER, Plan
from combiner.layers import repeat_heads
from combiner.ops.pooling import Pools, plain_name
from combiner.ops.softmax import Drop


def attend(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l g d'],
    v: Float[Array, 'b l g d'],
    *,
    sizes: dict[str, Any],
    causal: bool,
    pools: Pools,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends in one pass, as the plain form of the mechanism does; dropout draws other numbers.

    `sizes` are the fields `name`, `block` and `levels` of the plan. For the other arguments see `core.mechanism`.
    """
    heads, width = q.shape[2:]
    k, v = _keys_to_read(q, k, v, sizes, causal=causal, pools=pools, packed=segments is not None)
    key_heads, repeats = k.shape[2], heads // k.shape[2]
    seeds, kept = draw_seeds(drop, q.shape[0], heads)
    seeds = None if seeds is None else seeds.reshape(-1, key_heads, repeats)

    def body(q, k, v, valid, segments, seeds, kept):
        q = q.reshape(*q.shape[:2], -1, width)
        plan = make_plan(q, sizes, causal=causal, pools=pools, packed=segments is not None, repeats=repeats)
        tokens = Tokens(*(to_lanes(x, plan) for x in (q, k, v)))
        ids, of_heads = segment_ids(plan, valid, segments), seeds_of_lanes(plan, seeds, kept)
        out = from_lanes(attend_tiles(plan, tokens, ids, of_heads), plan)
        return out.reshape(*out.shape[:2], -1, repeats * width)

    # Devices share key heads, each with its query heads.
    by_key = q.reshape(*q.shape[:2], key_heads, repeats * width)
    letters = ('blhd', 'blhd', 'blhd', 'bl', 'bl', 'bh-', '')
    return by_shard(body, (by_key, k, v, valid, segments, seeds, kept), letters, 'blhd').reshape(q.shape)


def _keys_to_read(q: Array, k: Array, v: Array, sizes: dict[str, Any], **options: Any) -> tuple[Array, Array]:
    """Returns keys and values with their own heads, or repeated for query heads if devices or memory need it."""
    heads, key_heads = q.shape[2], k.shape[2]
    repeats = heads // key_heads
    if repeats == 1:
        return k, v
    reason = refuse_memory(make_plan(q, sizes, repeats=repeats, **options), f'{repeats} query heads of a key head')
    if parts('h', key_heads) != parts('h', heads):
        reason = f'the mesh splits query heads into {parts("h", heads)} parts, key heads into {parts("h", key_heads)}'
    if not reason:
        return k, v
    log_repeated(sizes['name'], key_heads, heads, reason)
    return repeat_heads(k, heads), repeat_heads(v, heads)


@functools.cache
def log_repeated(name: str, key_heads: int, heads: int, reason: str) -> None:
    """Says once that keys and values are repeated."""
    logging.warning('%s: %d key heads are repeated for %d query heads: %s', name, key_heads, heads, reason)


def refuse(
    q: Float[Array, 'b l h d'],
    *,
    sizes: dict[str, Any],
    causal: bool,
    pools: Pools,
    valid: Any = None,
    segments: Any = None,
    drop: Drop | None = None,
) -> str:
    """Returns the reason why the kernel cannot be used; empty if it can."""
    del valid
    block, length = sizes['block'], q.shape[1]
    reason = refuse_inputs(q, drop) or refuse_pools(pools)
    if reason:
        return reason
    rows = ROWS_OF_A_REGISTER[q.dtype]
    if block < length and block % rows:
        return f'takes blocks of a multiple of {rows} positions in {q.dtype}, not {block}'
    if sizes['levels'] > 1 and block & (block - 1):
        return f'takes blocks of a power of two for summaries of summaries, not {block}'
    if sizes['levels'] > 1 and plain_name(pools) != 'max':
        return f'pools summaries of summaries by max, not {plain_name(pools)}'
    plan = make_plan(q, sizes, causal=causal, pools=pools, packed=segments is not None)
    return refuse_memory(plan, f'length {length} and block {block}')


def make_plan(
    q: Float[Array, 'b l h d'], sizes: dict[str, Any], *, causal: bool, pools: Pools, packed: bool, repeats: int = 1
) -> Plan:
    """Returns the sizes of the kernel."""
    return Plan(
        **sizes_of(q),
        name=sizes['name'],
        block=whole_block(q, sizes['block']),
        causal=causal,
        pool=plain_name(pools) or '',
        levels=sizes['levels'],
        packed=packed,
        repeats=repeats,
    )


def _fixed(block: int) -> dict[str, Any]:
    return {'name': 'combiner_fixed', 'block': block, 'levels': 1}


def _tree(q: Float[Array, 'b l h d'], branch: int) -> dict[str, Any]:
    # Without levels, no block sees another: the one level then has one summary, of the own block.
    return {'name': 'combiner_tree', 'block': branch, 'levels': max(1, tree_levels(q.shape[1], branch))}


FIXED = Implementation(
    lambda q, k, v, *, block, **options: attend(q, k, v, sizes=_fixed(block), **options),
    lambda q, *, block, **options: refuse(q, sizes=_fixed(block), **options),
    groups=True,
)
TREE = Implementation(
    lambda q, k, v, *, branch, **options: attend(q, k, v, sizes=_tree(q, branch), **options),
    lambda q, *, branch, **options: refuse(q, sizes=_tree(q, branch), **options),
    groups=True,
)
