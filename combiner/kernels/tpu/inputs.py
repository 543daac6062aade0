"""What the mechanisms with a kernel for TPUs share: which inputs it takes, its sizes, and the seeds of dropout."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.kernels.choice import interpreting, refuse_for_tpu
from combiner.kernels.dropout import refuse_function
from combiner.kernels.shards import parts
from combiner.kernels.tpu.arrays import Seeds
from combiner.kernels.tpu.plan import MIB, ROWS_OF_A_REGISTER, SCALAR_MEMORY, Plan, of_device
from combiner.layers import LANES
from combiner.ops.chunking import target
from combiner.ops.pooling import PLAIN, Pools, plain_name
from combiner.ops.softmax import Drop


def refuse_inputs(q: Float[Array, 'b l h d'], drop: Drop | None) -> str:
    """Returns the reason why no kernel can be used for this type or dropout; empty if one can."""
    return refuse_for_tpu(q) or refuse_function(drop) or _refuse_seeds(q, drop)


def _refuse_seeds(q: Float[Array, 'b l h d'], drop: Drop | None) -> str:
    """Returns the reason why scalar memory cannot hold the seeds of dropout; empty if it can.

    They lie there whole, `[b, h]`, in rows of 128 words.
    """
    if drop is None:
        return ''
    batch, heads = (q.shape[axis] // parts(letter, q.shape[axis]) for axis, letter in ((0, 'b'), (2, 'h')))
    need, have = batch * -(-heads // LANES) * LANES * 4, of_device(SCALAR_MEMORY, target().kind) // 2
    if need <= have:
        return ''
    return f'would need {need // 1024} KiB of scalar memory for the seeds of {batch} sequences, of {have // 1024} KiB'


def refuse_pools(pools: Pools) -> str:
    """Returns the reason why no kernel has these poolings; empty if one has."""
    return '' if plain_name(pools) else f'pools by {" or ".join(PLAIN)}, not by parameters'


def refuse_memory(plan: Plan, of_what: str, *others: Plan) -> str:
    """Returns the reason why vector memory cannot hold a kernel of one of these sizes; empty if it can.

    Args:
        plan: the sizes.
        of_what: the sizes in words.
        *others: more sizes, such as those of the backward pass.
    """
    need, have = (size / MIB for size in (max(one.needed_memory for one in (plan, *others)), plan.memory))
    return f'would need {need:.0f} MiB of vector memory for {of_what}, of {have:.0f} MiB' if need > have else ''


def sizes_of(q: Float[Array, 'b l h d']) -> dict[str, Any]:
    """Returns the fields of a plan that follow from the queries and the device."""
    batch, length, heads, width = q.shape
    sizes = {'batch': batch, 'length': length, 'heads': heads, 'head_width': width, 'dtype': str(q.dtype)}
    return {**sizes, 'device': target().kind, 'interpret': interpreting()}


def whole_block(q: Float[Array, 'b l h d'], block: int) -> int:
    """Returns the block of a plan: if it holds the whole sequence, as many positions as fill whole registers."""
    length, rows = q.shape[1], ROWS_OF_A_REGISTER[q.dtype]
    return block if block < length else -(-length // rows) * rows


def seeds_of_lanes(plan: Plan, seeds: Int[Array, 'b *heads'] | None, kept: Int[Array, ''] | None) -> Seeds | None:
    """Returns the seeds with room for the heads that fill up the lanes; None for no dropout."""
    if seeds is None or kept is None:
        return None
    seeds, heads = seeds.reshape(len(seeds), -1), plan.lane_groups * plan.shared_by * plan.repeats
    return Seeds(jnp.pad(seeds, ((0, 0), (0, heads - plan.heads))), kept[None])
