"""Arrays in the layout of the kernels: heads side by side in the lanes of a register, and ids by block."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.kernels.tpu.arrays import Ids
from combiner.kernels.tpu.plan import Plan
from combiner.ops.blocks import block_segment_ids
from combiner.ops.segments import PADDING_ID, edge_id


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


def segment_ids(plan: Plan, valid: Bool[Array, 'b l'] | None, segments: Int[Array, 'b l'] | None) -> Ids | None:
    """Returns the segment ids of tokens and summaries; None if all that are ever reached are equal.

    They are as in `ops.spans`, of `summary_masks` and of `merge_neighbours`. Without documents, all positions but
    padding are one.
    """
    options = {'causal': plan.causal, 'valid': valid, 'segments': segments, 'beyond_end': plan.levels > 1}
    ids = block_segment_ids(plan.batch, plan.length, plan.block, **options)
    if ids is None:
        return None
    ids = _pad(ids.reshape(plan.batch, -1), plan.padded_length).reshape(plan.batch, plan.blocks, plan.block)
    rows = jnp.stack([ids] * plan.sides, axis=1)
    of_summaries, members = [], []
    for level in range(plan.levels):
        shared = jnp.stack([edge_id(rows[:, side], last=side == 0) for side in range(plan.sides)], axis=1)
        inside = (rows == shared[..., None]) & (shared != PADDING_ID)[..., None]
        members.append(inside.astype(jnp.int32))
        shared = _pad(shared, plan.table(level)[1])
        rows = shared.reshape(plan.batch, plan.sides, -1, plan.siblings)
        # No token has the id of a summary without members.
        of_summaries.append(jnp.where(rows == PADDING_ID, PADDING_ID + 1, rows))
    return Ids(ids, tuple(of_summaries), tuple(members))


def _pad(ids: Int[Array, '*n l'], length: int) -> Int[Array, '*n p']:
    """Pads the last axis with padding."""
    return jnp.pad(ids, ((0, 0),) * (ids.ndim - 1) + ((0, length - ids.shape[-1]),), constant_values=PADDING_ID)
