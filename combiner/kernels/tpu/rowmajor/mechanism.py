"""The kernel of Combiner-Axial, row-major: when it can be used, and how, on the shard of every device."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from combiner import reference
from combiner.kernels.choice import Implementation
from combiner.kernels.dropout import draw_seeds
from combiner.kernels.shards import by_shard
from combiner.kernels.tpu.arrays import Ids, Tokens
from combiner.kernels.tpu.inputs import refuse_inputs, refuse_memory, seeds_of_lanes, sizes_of, whole_block
from combiner.kernels.tpu.layout import from_lanes, segment_ids, to_lanes
from combiner.kernels.tpu.plan import ROWS_OF_A_REGISTER
from combiner.kernels.tpu.rowmajor.attend import attend as attend_tiles
from combiner.kernels.tpu.rowmajor.plan import GridPlan
from combiner.ops.softmax import Drop


def attend(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    key: str | Callable[[Array], Array] = 'attended',
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Attends as the plain form of the mechanism does, with its arguments; dropout draws other numbers."""
    seeds, kept = draw_seeds(drop, q.shape[0], q.shape[2])

    def body(q, k, v, valid, segments, seeds, kept):
        plan = make_plan(q, columns, causal=causal, key=key, packed=segments is not None)
        tokens = Tokens(*(to_lanes(x, plan) for x in (q, k, v)))
        ids, of_heads = by_group(plan, segment_ids(plan, valid, segments)), seeds_of_lanes(plan, seeds, kept)
        return from_lanes(attend_tiles(plan, tokens, ids, of_heads), plan)

    letters = ('blhd', 'blhd', 'blhd', 'bl', 'bl', 'bh', '')
    return by_shard(body, (q, k, v, valid, segments, seeds, kept), letters, 'blhd')


def by_group(plan: GridPlan, ids: Ids | None) -> Ids | None:
    """Puts the rows of a group side by side in the lanes."""
    if ids is None:
        return None
    of_tokens, members = (x.reshape(*x.shape[:-2], -1, plan.group) for x in (ids.of_tokens, ids.members[0]))
    return Ids(of_tokens, ids.of_summaries, (members,))


def refuse(
    q: Float[Array, 'b l h d'],
    *,
    columns: int,
    causal: bool,
    key: str | Callable[[Array], Array] = 'attended',
    valid: Any = None,
    segments: Any = None,
    drop: Drop | None = None,
) -> str:
    """Returns the reason why the kernel cannot be used; empty if it can."""
    del valid
    length = q.shape[1]
    reason = refuse_inputs(q, drop)
    if reason:
        return reason
    if key not in reference.KEYS:
        name = repr(key) if isinstance(key, str) else 'a function of the values, as projected is'
        return f'takes the summary keys {" and ".join(reference.KEYS)}, not {name}'
    plan = make_plan(q, columns, causal=causal, key=key, packed=segments is not None)
    rows = ROWS_OF_A_REGISTER[q.dtype]
    if columns < length and (columns % 8 or plan.group % rows):
        return f'takes rows of a multiple of 8 positions (from 64, of {rows} in {q.dtype}), not {columns}'
    return refuse_memory(plan, f'length {length} and {columns} columns', plan.for_backward())


def make_plan(q: Float[Array, 'b l h d'], columns: int, *, causal: bool, key: Any, packed: bool) -> GridPlan:
    """Returns the sizes of the kernel; a block is a row."""
    return GridPlan(
        **sizes_of(q),
        name='combiner_axial_rowmajor',
        block=whole_block(q, columns),
        causal=causal,
        pool='',
        levels=1,
        packed=packed,
        attended=key == 'attended',
    )


ROWMAJOR = Implementation(attend, refuse)
