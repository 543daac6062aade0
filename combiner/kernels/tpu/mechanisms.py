"""The mechanisms that have a kernel: when it can be used, and how, on the shard of every device.

A mechanism says what the summaries are: of blocks (Combiner-Fixed), or of `branch` summaries again (Combiner-Tree).
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from combiner.costs import tree_levels
from combiner.kernels.choice import Implementation
from combiner.kernels.dropout import draw_seeds
from combiner.kernels.shards import by_shard, keys_to_read
from combiner.kernels.summaries import fused_pool, summaries_by_level
from combiner.kernels.tpu.arrays import Tables, Tokens
from combiner.kernels.tpu.attend import attend as attend_tiles
from combiner.kernels.tpu.inputs import (
    refuse_inputs,
    refuse_memory,
    seeds_of_lanes,
    sizes_of,
    whole_block,
)
from combiner.kernels.tpu.layout import from_lanes, segment_ids, table_to_lanes, to_lanes
from combiner.kernels.tpu.plan import ROWS_OF_A_REGISTER, Plan
from combiner.ops.pooling import Pools
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
    packed = segments is not None
    k, v = _keys_to_read(q, k, v, sizes, causal=causal, pools=pools, packed=packed)
    seeds, kept = draw_seeds(drop, *q.shape[::2])
    given: list[Any] = []
    if not fused_pool(pools, sizes['levels']):
        options = {'block': sizes['block'], 'levels': sizes['levels'], 'causal': causal, 'pools': pools}
        lasts = (True, False) if packed and not causal else (True,)
        given = summaries_by_level(q, k, v, lasts=lasts, valid=valid, segments=segments, **options)

    def body(q, k, v, valid, segments, seeds, kept, *arrays):
        repeats = q.shape[2] // k.shape[2]
        plan = make_plan(q, sizes, causal=causal, pools=pools, packed=packed, repeats=repeats)
        tokens = Tokens(*(to_lanes(x, plan) for x in (q, k, v)))
        ids, of_heads = segment_ids(plan, valid, segments), seeds_of_lanes(plan, seeds, kept)
        return from_lanes(attend_tiles(plan, tokens, ids, of_heads, _tables(plan, arrays)), plan)

    arrays = [x for of_level in given for x in of_level]
    letters = ('blhd', 'blhd', 'blhd', 'bl', 'bl', 'bh', '', *('bsnhd' for _ in arrays))
    return by_shard(body, (q, k, v, valid, segments, seeds, kept, *arrays), letters, 'blhd')


def _tables(plan: Plan, arrays: Sequence[Array]) -> Tables | None:
    """Returns the tables of given summaries, `[b, s, n, h, d]`: keys and values of each level; None without any."""
    found = tuple(table_to_lanes(x, plan, i // 2) for i, x in enumerate(arrays))
    return Tables(found[::2], found[1::2], ()) if found else None


def _keys_to_read(q: Array, k: Array, v: Array, sizes: dict[str, Any], **options: Any) -> tuple[Array, Array]:
    """Returns keys and values with their own heads, or repeated for query heads if devices or memory need it."""
    repeats = q.shape[2] // k.shape[2]
    plan = make_plan(q, sizes, repeats=repeats, **options)
    short = '' if repeats == 1 else refuse_memory(plan, f'{repeats} query heads of a key head')
    return keys_to_read(sizes['name'], q, k, v, short)


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
    reason = refuse_inputs(q, drop)
    if reason:
        return reason
    rows = ROWS_OF_A_REGISTER[q.dtype]
    if block < length and block % rows:
        return f'takes blocks of a multiple of {rows} positions in {q.dtype}, not {block}'
    if sizes['levels'] > 1 and block & (block - 1):
        return f'takes blocks of a power of two for summaries of summaries, not {block}'
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
        pool=fused_pool(pools, sizes['levels']),
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
