"""Combiner-Fixed by the kernels of `fixed`: arrays in the layout of the kernels, on the shard of every device."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.kernels.tpu.fixed import Ids, Seeds, Tokens
from combiner.kernels.tpu.fixed import attend as attend_tiles
from combiner.kernels.tpu.plan import ROWS_OF_A_REGISTER, VMEM, Plan
from combiner.ops.backends import Implementation, interpreting
from combiner.ops.blocks import block_segment_ids
from combiner.ops.pooling import PLAIN, Pools
from combiner.ops.segments import PADDING_ID, edge_id
from combiner.ops.shards import by_shard
from combiner.ops.softmax import Drop, Dropout


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
    """Attends as `attend_combiner_fixed` does, in one pass; dropout draws other numbers."""
    seeds = kept = None
    if isinstance(drop, Dropout):
        seeds = jax.lax.bitcast_convert_type(jax.random.bits(drop.key, (q.shape[0], q.shape[2])), jnp.int32)
        kept = jnp.round((1 - jnp.asarray(drop.rate, jnp.float32)) * 2**24).astype(jnp.int32)[None]

    def body(q, k, v, valid, segments, seeds, kept):
        plan = make_plan(q, block=block, causal=causal, pools=pools, packed=segments is not None)
        tokens = Tokens(*(to_lanes(x, plan) for x in (q, k, v)))
        of_heads = (
            None if seeds is None else jnp.pad(seeds, ((0, 0), (0, plan.lane_groups * plan.shared_by - plan.heads)))
        )
        drop_seeds = None if of_heads is None else Seeds(of_heads, kept)
        out = attend_tiles(plan, tokens, segment_ids(plan, valid, segments), drop_seeds)
        return from_lanes(out, plan)

    letters = ('blhd', 'blhd', 'blhd', 'bl', 'bl', 'bh', '-')
    return by_shard(body, (q, k, v, valid, segments, seeds, kept), letters, 'blhd')


def pool_name(pools: Pools) -> str | None:
    """Returns the name of poolings without parameters; None for others."""
    return next((name for name, plain in PLAIN.items() if pools == plain), None)


def make_plan(q: Float[Array, 'b l h d'], *, block: int, causal: bool, pools: Pools, packed: bool) -> Plan:
    """Returns the sizes of the kernels; a block is at most the sequence, in whole registers."""
    batch, length, heads, width = q.shape
    rows = ROWS_OF_A_REGISTER[q.dtype]
    return Plan(
        batch=batch,
        length=length,
        heads=heads,
        head_width=width,
        block=min(block, -(-length // rows) * rows),
        causal=causal,
        pool=pool_name(pools) or '',
        packed=packed,
        dtype=str(q.dtype),
        interpret=interpreting(),
    )


def refuse(
    q: Float[Array, 'b l h d'], *, block: int, causal: bool, pools: Pools, drop: Drop | None, segments: Any, valid: Any
) -> str:
    """Returns the reason why the kernels cannot be used; empty if they can."""
    del valid
    if q.dtype not in ROWS_OF_A_REGISTER:
        return f'takes float32 or bfloat16, not {q.dtype}'
    if block < q.shape[1] and block % (rows := ROWS_OF_A_REGISTER[q.dtype]):
        return f'takes blocks of a multiple of {rows} positions in {q.dtype}, not {block}'
    if pool_name(pools) is None:
        return f'pools by {" or ".join(PLAIN)}, not by parameters'
    if drop is not None and not isinstance(drop, Dropout):
        return 'drops weights by ops.softmax.Dropout, not by another function'
    plan = make_plan(q, block=block, causal=causal, pools=pools, packed=segments is not None)
    if plan.vmem > VMEM:
        need, have = plan.vmem / 2**20, VMEM / 2**20
        return (
            f'would need {need:.0f} MiB of vector memory for length {q.shape[1]} and block {block}, of {have:.0f} MiB'
        )
    return ''


MOSAIC = Implementation(attend, refuse)


def to_lanes(x: Float[Array, 'b l h d'], plan: Plan) -> Float[Array, 'b g n e']:
    """Puts the heads that share lanes side by side; heads are padded to whole lanes, short sequences to a tile."""
    heads = plan.lane_groups * plan.shared_by
    room = plan.padded_length - plan.length if plan.tiles == 1 else 0
    x = jnp.pad(x, ((0, 0), (0, room), (0, heads - plan.heads), (0, plan.padded_width - plan.head_width)))
    return jnp.moveaxis(x.reshape(*x.shape[:2], plan.lane_groups, plan.lanes), 2, 1)


def from_lanes(x: Float[Array, 'b g n e'], plan: Plan) -> Float[Array, 'b l h d']:
    """Inverts `to_lanes`."""
    x = jnp.moveaxis(x, 1, 2)[:, : plan.length]
    return x.reshape(*x.shape[:2], -1, plan.padded_width)[:, :, : plan.heads, : plan.head_width]


def segment_ids(plan: Plan, valid: Array | None, segments: Array | None) -> Ids | None:
    """Returns the segment ids of tokens and summaries; None if all that are ever reached are equal.

    They are as in `ops.summaries.summary_masks`. Without documents, all positions but padding are one.
    """
    masks = {'causal': plan.causal, 'valid': valid, 'segments': segments}
    ids = block_segment_ids(plan.batch, plan.length, plan.block, **masks)
    if ids is None:
        return None
    room = plan.blocks * plan.block - ids.size // plan.batch
    ids = jnp.pad(ids.reshape(plan.batch, -1), ((0, 0), (0, room)), constant_values=PADDING_ID)
    by_block = ids.reshape(plan.batch, plan.blocks, plan.block)
    shared = jnp.stack([edge_id(by_block, last=last) for last in (True, False)[: plan.sides]], axis=1)
    members = (by_block[:, None] == shared[..., None]) & (shared != PADDING_ID)[..., None]
    # No token has the id of a summary without members.
    return Ids(by_block, members.astype(jnp.int32), jnp.where(shared == PADDING_ID, PADDING_ID + 1, shared))
