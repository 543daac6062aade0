"""The mechanisms that have a kernel: when it can be used, and how, on the shard of every device.

A mechanism says what the summaries are: of blocks (Combiner-Fixed), or of `branch` summaries again (Combiner-Tree).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.costs import tree_levels
from combiner.kernels.choice import Implementation, interpreting
from combiner.kernels.shards import by_shard, parts
from combiner.kernels.tpu.arrays import Seeds, Tokens
from combiner.kernels.tpu.attend import attend as attend_tiles
from combiner.kernels.tpu.layout import from_lanes, segment_ids, to_lanes
from combiner.kernels.tpu.plan import MIB, ROWS_OF_A_REGISTER, Plan
from combiner.layers import repeat_heads
from combiner.ops.chunking import target
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.softmax import Drop, Dropout


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
    seeds = kept = None
    if isinstance(drop, Dropout):
        seeds = jax.lax.bitcast_convert_type(jax.random.bits(drop.key, (q.shape[0], heads)), jnp.int32)
        seeds = seeds.reshape(-1, key_heads, repeats)
        kept = jnp.round((1 - jnp.asarray(drop.rate, jnp.float32)) * 2**24).astype(jnp.int32)[None]

    def body(q, k, v, valid, segments, seeds, kept):
        q = q.reshape(*q.shape[:2], -1, width)
        plan = make_plan(q, sizes, causal=causal, pools=pools, packed=segments is not None, repeats=repeats)
        tokens = Tokens(*(to_lanes(x, plan) for x in (q, k, v)))
        if seeds is not None:
            seeds = seeds.reshape(len(seeds), -1)
            padded = plan.lane_groups * plan.shared_by * repeats
            seeds = jnp.pad(seeds, ((0, 0), (0, padded - plan.heads)))
        of_heads = None if seeds is None else Seeds(seeds, kept)
        out = from_lanes(attend_tiles(plan, tokens, segment_ids(plan, valid, segments), of_heads), plan)
        return out.reshape(*out.shape[:2], -1, repeats * width)

    # Devices share key heads, each with its query heads.
    by_key = q.reshape(*q.shape[:2], key_heads, repeats * width)
    letters = ('blhd', 'blhd', 'blhd', 'bl', 'bl', 'bh-', '-')
    return by_shard(body, (by_key, k, v, valid, segments, seeds, kept), letters, 'blhd').reshape(q.shape)


def _keys_to_read(q: Array, k: Array, v: Array, sizes: dict[str, Any], **options: Any) -> tuple[Array, Array]:
    """Returns keys and values with their own heads, or repeated for query heads if devices or memory need it."""
    repeats = q.shape[2] // k.shape[2]
    if repeats > 1:
        plan = make_plan(q, sizes, repeats=repeats, **options)
        if plan.needed_memory > plan.memory or parts('h', k.shape[2]) != parts('h', q.shape[2]):
            k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
    return k, v


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
    if q.dtype not in ROWS_OF_A_REGISTER:
        return f'takes float32 or bfloat16, not {q.dtype}'
    rows = ROWS_OF_A_REGISTER[q.dtype]
    if block < length and block % rows:
        return f'takes blocks of a multiple of {rows} positions in {q.dtype}, not {block}'
    if pool_name(pools) is None:
        return f'pools by {" or ".join(PLAIN)}, not by parameters'
    if sizes['levels'] > 1 and block & (block - 1):
        return f'takes blocks of a power of two for summaries of summaries, not {block}'
    if sizes['levels'] > 1 and pool_name(pools) != 'max':
        return f'pools summaries of summaries by max, not {pool_name(pools)}'
    if drop is not None and not isinstance(drop, Dropout):
        return 'drops weights by ops.softmax.Dropout, not by another function'
    plan = make_plan(q, sizes, causal=causal, pools=pools, packed=segments is not None)
    if plan.needed_memory > plan.memory:
        need, have = plan.needed_memory / MIB, plan.memory / MIB
        return f'would need {need:.0f} MiB of vector memory for length {length} and block {block}, of {have:.0f} MiB'
    return ''


def pool_name(pools: Pools) -> str | None:
    """Returns the name of poolings without parameters; None for others."""
    return next((name for name, plain in PLAIN.items() if pools == plain), None)


def make_plan(
    q: Float[Array, 'b l h d'], sizes: dict[str, Any], *, causal: bool, pools: Pools, packed: bool, repeats: int = 1
) -> Plan:
    """Returns the sizes of the kernel; a block is at most the sequence, in whole registers."""
    batch, length, heads, width = q.shape
    rows = ROWS_OF_A_REGISTER[q.dtype]
    return Plan(
        name=sizes['name'],
        batch=batch,
        length=length,
        heads=heads,
        head_width=width,
        block=min(sizes['block'], -(-length // rows) * rows),
        causal=causal,
        pool=pool_name(pools) or '',
        levels=sizes['levels'],
        packed=packed,
        dtype=str(q.dtype),
        device=target().kind,
        interpret=interpreting(),
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
