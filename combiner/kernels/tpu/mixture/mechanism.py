"""The kernels of Combiner-Mixture: when they can be used, and how, on the shard of every device."""

from typing import Any

from jaxtyping import Array, Bool, Float

from combiner.kernels.choice import Implementation
from combiner.kernels.dropout import draw_seeds
from combiner.kernels.shards import by_shard
from combiner.kernels.tpu.arrays import Tokens
from combiner.kernels.tpu.inputs import (
    refuse_inputs,
    refuse_memory,
    refuse_pools,
    seeds_of_lanes,
    sizes_of,
    whole_block,
)
from combiner.kernels.tpu.mixture.arrays import from_grid, make_masks, to_grid
from combiner.kernels.tpu.mixture.attend import attend as attend_cells
from combiner.kernels.tpu.mixture.plan import MixturePlan
from combiner.kernels.tpu.plan import ROWS_OF_A_REGISTER
from combiner.ops.pooling import PLAIN, Pools, plain_name
from combiner.ops.softmax import Drop


def attend(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    joint: bool = False,
    split: bool = False,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    segments: None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends as the plain form of the mechanism does, with its arguments; dropout draws other numbers."""
    del split, segments
    seeds, kept = draw_seeds(drop, q.shape[0], q.shape[2])

    def body(q, k, v, valid, seeds, kept):
        plan = make_plan(q, columns, causal=causal, joint=joint, pools=pools)
        x = Tokens(*(to_grid(one, plan) for one in (q, k, v)))
        return from_grid(attend_cells(plan, x, make_masks(plan, valid), seeds_of_lanes(plan, seeds, kept)), plan)

    return by_shard(body, (q, k, v, valid, seeds, kept), ('blhd', 'blhd', 'blhd', 'bl', 'bh', ''), 'blhd')


def refuse(
    q: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    joint: bool = False,
    split: bool = False,
    pools: Pools = PLAIN['max'],
    valid: Any = None,
    segments: Any = None,
    drop: Drop | None = None,
) -> str:
    """Returns the reason why the kernels cannot be used; empty if they can."""
    del valid, segments
    reason = refuse_inputs(q, drop) or refuse_pools(pools)
    if reason:
        return reason
    if split:
        return 'takes horizontal spans that are not split'
    rows, length = ROWS_OF_A_REGISTER[q.dtype], q.shape[1]
    if columns < length and columns % rows:
        return f'takes rows of a multiple of {rows} positions in {q.dtype}, not {columns}'
    plan = make_plan(q, columns, causal=causal, joint=joint, pools=pools)
    return refuse_memory(plan, f'length {length} and {columns} columns')


def make_plan(q: Float[Array, 'b l h d'], columns: int, *, causal: bool, joint: bool, pools: Pools) -> MixturePlan:
    """Returns the sizes of the kernels; a block is a row."""
    return MixturePlan(
        **sizes_of(q),
        name='combiner_mixture',
        block=whole_block(q, columns),
        causal=causal,
        pool=plain_name(pools) or '',
        levels=1,
        packed=False,
        joint=joint,
    )


MIXTURE = Implementation(attend, refuse)
