"""Arrays in the layout of the kernels: heads side by side in the lanes of a register, and ids by block.

In the memory of a TPU the last two axes of an array are cut into pieces of a few rows and 128 lanes. So heads of whole
lanes are arrays `[b, g, n, e]`, which projections write without a copy. An axis of a narrow head alone would be padded
to 128 lanes: all heads together are the lanes of arrays `[b, n, g·e]`, which projections to `h·d` features write
without a copy. A kernel reads the lanes of a group `g`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from combiner.kernels.tpu.arrays import Ids
from combiner.kernels.tpu.plan import Plan
from combiner.ops.blocks import block_segment_ids
from combiner.ops.segments import PADDING_ID, edge_id


def to_lanes(x: Float[Array, 'b l h d'], plan: Plan) -> Float[Array, 'b ... e']:
    """Puts the heads that share lanes side by side; heads are padded to whole lanes, short sequences to a tile.

    Takes query heads, or as many key heads as the plan has.
    """
    missing = plan.lane_groups * plan.shared_by - plan.heads // plan.repeats
    missing *= x.shape[2] // (plan.heads // plan.repeats)
    room = plan.padded_length - x.shape[1] if plan.tiles == 1 else 0
    x = jnp.pad(x, ((0, 0), (0, room), (0, missing), (0, plan.padded_width - plan.head_width)))
    return x.reshape(*x.shape[:2], -1) if plan.narrow else jnp.moveaxis(x, 2, 1)


def from_lanes(x: Float[Array, 'b ... e'], plan: Plan) -> Float[Array, 'b l h d']:
    """Inverts `to_lanes`."""
    x = x if plan.narrow else jnp.moveaxis(x, 1, 2)
    x = x.reshape(*x.shape[:2], -1, plan.padded_width)
    return x[:, : plan.length, : plan.heads, : plan.head_width]


def table_to_lanes(x: Float[Array, 'b s n h d'], plan: Plan, level: int) -> Float[Array, 'b g *repeats s r e']:
    """Puts the summaries of a level, of all sides, into the tables of the kernel (see `arrays.Tables`)."""
    missing = plan.lane_groups * plan.shared_by * plan.repeats - plan.heads
    rows = plan.table(level)[1] - x.shape[2]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, missing), (0, plan.padded_width - plan.head_width)))
    repeats = () if plan.repeats == 1 else (plan.repeats,)
    return jnp.moveaxis(x.reshape(*x.shape[:3], plan.lane_groups, *repeats, plan.lanes), (1, 2), (-3, -2))


def tile_spec(plan: Plan, number: Callable[..., Any], repeat: Callable[..., Any] | None = None) -> pl.BlockSpec:
    """Returns the block spec of tokens; in the kernel, a reference to a tile of one group is `[n, e]`.

    Args:
        plan: the sizes.
        number: `number(phase, step)` is the tile that a step of the grid visits.
        repeat: for queries, `repeat(phase, repeat)` is which of the query heads of a key head; None for keys.
    """

    def at(b: Any, h: Any, phase: Any, step: Any, one: Any) -> tuple[Any, Any, Any]:
        return b, h if repeat is None else h * plan.repeats + repeat(phase, one), number(phase, step)

    def narrow(*grid: Any) -> tuple[Any, ...]:
        b, group, tile = at(*grid)
        return b, tile, group

    if plan.narrow:
        return pl.BlockSpec((None, plan.tile, plan.lanes), narrow)
    return pl.BlockSpec((None, None, plan.tile, plan.lanes), lambda *grid: (*at(*grid), 0))


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
        if not plan.given:
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
