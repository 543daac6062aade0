"""Softmax attention in O(l) memory, a block of queries and a block of keys at a time (Dao et al. 2022).

Forward, each block of queries attends to one block of keys after another, and keeps the maximum `m` so far, the sum
`z` of `exp(s - m)` and the sum of `exp(s - m) v` (Rabe & Staats 2021). Backward, the weights are computed again from
`m` and `z`, not from `m + log z`, whose rounding would change the weights of large logits:

    p_ij = exp(s_ij - m_i) / z_i      dv_j = Σ_i p_ij do_i      ds_ij = p_ij (do_i·v_j - do_i·o_i)
    dq_i = Σ_j ds_ij k_j              dk_j = Σ_i ds_ij q_i

Causal, blocks above the diagonal are never computed, and only those on it are masked. Loops run over positions alone:
batch and heads may be sharded.

Letters: `b` batch, `l` length, `h` heads, `d` head width, `q` query and `k` key in a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float, Int

from combiner.ops import chunking
from combiner.ops.blocks import block_segment_ids
from combiner.ops.primitives import differentiate, wanted
from combiner.ops.segments import same_segment
from combiner.ops.softmax import PartialSoftmax, einsum, mask_logits, merge_partials, partial_softmax, wide_dtype


def block_for(batch: int, heads: int, length: int) -> int:
    """Returns the number of positions computed at a time: on a CPU, a step's logits fit into its cache."""
    in_cache = [block for block in (512, 256, 128) if batch * heads * block**2 <= chunking.CHUNK_LOGITS] or [64]
    return min(in_cache[0] if chunking.target().platform == 'cpu' else 1024, length)


def attend_blockwise(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    block: int | None = None,
) -> Float[Array, 'b l h d']:
    """Computes `softmax(q·k/√d) v`, gradients included: O(l²) time, O(l) memory.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        causal: whether a position attends to itself and earlier positions only.
        valid: positions that are no padding; padding must hold finite numbers.
        segments: packed documents, which do not attend to each other.
        block: positions computed at a time, None for `block_for`. The result does not depend on it.
    """
    batch, length, heads, width = q.shape
    block = block or block_for(batch, heads, length)
    segment_ids = block_segment_ids(batch, length, block, causal=causal, valid=valid, segments=segments)
    segment_ids = None if segment_ids is None else segment_ids.reshape(batch, -1)
    room = ((0, 0), (0, -length % block), (0, 0), (0, 0))
    q, k, v = (jnp.moveaxis(jnp.pad(x, room), 2, 0) for x in (q * width**-0.5, k, v))
    return jnp.moveaxis(_attend(block, causal, q, k, v, segment_ids)[0], 0, 2)[:, :length]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(block, causal, q, k, v, segment_ids):
    """Returns the attended values, and for each query the maximum and the sum of its weights; `q` is scaled."""
    return forward_pass(block, causal, q, k, v, segment_ids, segment_ids)


@_attend.defjvp
def _attend_tangent(block, causal, primals, tangents):
    q, k, v, segment_ids = primals
    attended, top, total = _attend(block, causal, *primals)
    kept = q, k, v, attended, top, total, *(() if segment_ids is None else (segment_ids,))
    change, growth = _tangent_p.bind(*kept, *tangents[:3], block=block, causal=causal)
    return (attended, top, total), (change, jnp.zeros_like(top), total * growth)


def forward_pass(
    block: int,
    causal: bool,
    q: Float[Array, 'h b l d'],
    k: Float[Array, 'h b l d'],
    v: Float[Array, 'h b l d'],
    segment_ids: Int[Array, 'b l'] | None,
    key_ids: Int[Array, 'b l'] | None,
) -> tuple[Float[Array, 'h b l d'], Float[Array, 'h b l 1'], Float[Array, 'h b l 1']]:
    """Returns the attended values, and for each query the maximum and the sum of its weights.

    Args:
        block: positions computed at a time, which divide the length.
        causal: whether a query attends to keys up to its own position only.
        q: queries, scaled.
        k: keys.
        v: values.
        segment_ids: of the queries.
        key_ids: of the keys.
    """
    count = q.shape[2] // block
    sight = _sight(block, segment_ids, key_ids)

    def row(i: Array, written: PartialSoftmax) -> PartialSoftmax:
        """Attends from one block of queries."""
        own = _take(q, i, block)

        def add(j: Array, sums: PartialSoftmax, *, diagonal: bool = False) -> PartialSoftmax:
            return merge_partials(
                sums, partial_softmax(own, _take(k, j, block), _take(v, j, block), sight(i, j, diagonal=diagonal))
            )

        sums = add(i, nothing, diagonal=True) if causal else nothing
        sums = lax.fori_loop(0, i if causal else count, add, sums)
        return PartialSoftmax(*(_put(x, part, i, block) for x, part in zip(written, sums, strict=True)))

    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    written = PartialSoftmax(*(jnp.zeros((*q.shape[:3], width), accumulator) for width in (1, 1, q.shape[3])))
    nothing = PartialSoftmax(
        written.top[:, :, :block] + jnp.finfo(accumulator).min / 2, *(x[:, :, :block] for x in written[1:])
    )
    sums = lax.fori_loop(0, count, row, written)
    return sums.normalize().astype(v.dtype), sums.top, jnp.where(sums.total > 0, sums.total, 1)


def backward_pass(
    block: int,
    causal: bool,
    kept: tuple[Array, ...],
    segment_ids: Int[Array, 'b l'] | None,
    key_ids: Int[Array, 'b l'] | None,
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, Array]:
    """Returns the gradients of queries, keys and values.

    The keys may be some of those to which the queries attend, as maximum and sum are given.

    Args:
        block: as for `forward_pass`.
        causal: as for `forward_pass`.
        kept: queries, keys and values, then the attended values, and the maxima and the sums of the weights.
        segment_ids: of the queries.
        key_ids: of the keys.
        cotangents: of the attended values, and of the logarithms of the sums.
    """
    q, k, v, attended, top, total = kept
    cotangent, of_growth = cotangents
    count = q.shape[2] // block
    sight = _sight(block, segment_ids, key_ids)
    mean = (einsum('hbqd,hbqd->hbq', cotangent, attended)[..., None] - of_growth) / total
    dtype = wide_dtype(v.dtype)  # float16 has no numbers as small as these, of a long sequence
    divided = (cotangent / total).astype(dtype)  # instead of the weights

    def column(j: Array, written: tuple[Array, ...]) -> tuple[Array, ...]:
        """Returns the gradients of one block of keys and values."""
        own_k, own_v = _take(k, j, block), _take(v, j, block)

        def add(i: Array, sums: tuple[Array, ...], *, diagonal: bool = False) -> tuple[Array, ...]:
            dq, dk, dv = sums
            its_q, its_divided, its_mean, its_top = (_take(x, i, block) for x in (q, divided, mean, top))
            logits = mask_logits(einsum('hbqd,hbkd->hbqk', its_q, own_k), sight(i, j, diagonal=diagonal))
            weights = jnp.exp(logits - its_top)
            change = weights * (einsum('hbqd,hbkd->hbqk', its_divided, own_v) - its_mean)
            weights, change = weights.astype(dtype), change.astype(dtype)
            its_dq = _take(dq, i, block) + einsum('hbqk,hbkd->hbqd', change, own_k)
            dk += einsum('hbqk,hbqd->hbkd', change, its_q)
            dv += einsum('hbqk,hbqd->hbkd', weights, its_divided)
            return _put(dq, its_dq, i, block), dk, dv

        dq, *kv = written
        none = dq, *(jnp.zeros(own_k.shape, total.dtype),) * 2
        first = add(j, none, diagonal=True) if causal else none
        dq, *sums = lax.fori_loop(j + 1 if causal else 0, count, add, first)
        return dq, *(_put(x, part.astype(x.dtype), j, block) for x, part in zip(kv, sums, strict=True))

    written = jnp.zeros(q.shape, total.dtype), jnp.zeros_like(k), jnp.zeros_like(v)
    dq, dk, dv = lax.fori_loop(0, count, column, written)
    return dq.astype(q.dtype), dk, dv


def _push_forward(block, causal, kept, segment_ids, tangents):
    """Returns the changes of the attended values and of the logarithm of the sums, a block of queries at a time.

        do_i = Σ_j p_ij (ds_ij v_j + dv_j) - g_i o_i        g_i = Σ_j p_ij ds_ij        ds_ij = dq_i·k_j + q_i·dk_j

    Every operation has all derivatives, and is linear in the tangents.
    """
    _, k, v, *_ = kept
    _, dk, dv = tangents
    position = jnp.arange(k.shape[2])

    @jax.checkpoint
    def row(i: Array) -> tuple[Array, Array]:
        q, attended, top, total, dq = (_take(x, i, block) for x in (kept[0], *kept[3:], tangents[0]))
        mask = (position <= _take(position, i, block, axis=0)[:, None] if causal else jnp.ones((1, 1), bool))[None]
        mask = mask if segment_ids is None else same_segment(_take(segment_ids, i, block, axis=1), segment_ids, mask)
        weights = jnp.exp(mask_logits(einsum('hbqd,hbkd->hbqk', q, k), mask) - top) / total
        change = weights * (einsum('hbqd,hbkd->hbqk', dq, k) + einsum('hbqd,hbkd->hbqk', q, dk))
        growth = change.sum(axis=-1, keepdims=True)
        new = einsum('hbqk,hbkd->hbqd', change, v) + einsum('hbqk,hbkd->hbqd', weights, dv) - growth * attended
        return new.astype(v.dtype), growth

    rows = lax.map(row, jnp.arange(k.shape[2] // block))
    return [jnp.moveaxis(x, 0, 2).reshape(*k.shape[:3], -1) for x in rows]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _pull_back(block, causal, kept, segment_ids, cotangents):
    """Computes the transpose of `_push_forward` in the tangents."""
    return backward_pass(block, causal, kept, segment_ids, segment_ids, cotangents)


@_pull_back.defjvp
def _pull_back_tangent(block, causal, primals, tangents):
    (kept, segment_ids, cotangents), (kept_tangents, _, cotangent_tangents) = primals, tangents

    def transposed(kept: Any, cotangents: Any) -> Any:
        push = partial(_push_forward, block, causal, kept, segment_ids)
        return jax.linear_transpose(push, kept[:3])(list(cotangents))[0]

    changes = jax.jvp(transposed, (kept, cotangents), (kept_tangents, cotangent_tangents))[1]
    return _pull_back(block, causal, *primals), changes


# Reverse mode transposes a tangent. JAX would transpose the loops of `_push_forward`; a primitive has a rule instead.
_tangent_p = Primitive('blockwise_tangent')
_tangent_p.multiple_results = True
_KEPT = 6  # arguments of the primitive before the segment ids, if any, and the three tangents


def _tangent(*arguments: Array, block: int, causal: bool) -> list[Array]:
    segment_ids = arguments[_KEPT] if len(arguments) > _KEPT + 3 else None
    return _push_forward(block, causal, arguments[:_KEPT], segment_ids, arguments[-3:])


def _transpose_tangent(cotangents, *arguments, block, causal):
    kept, segment_ids, tangents = arguments[:_KEPT], arguments[_KEPT:-3], arguments[-3:]
    cotangents = tuple(map(ad.instantiate_zeros, cotangents))
    pulled = _pull_back(block, causal, kept, segment_ids[0] if segment_ids else None, cotangents)
    return [None] * (len(arguments) - 3) + wanted(pulled, tangents)


def _differentiate_tangent(primals, tangents, *, block, causal):
    return differentiate(partial(_tangent, block=block, causal=causal), primals, tangents)


def _batch_tangent(arguments, axes, *, block, causal):
    """Merges the new axis into the batch axis: the second, of segment ids the first."""
    size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)

    def merged(x: Array, axis: int | None) -> Array:
        at = 1 if x.ndim - (axis is not None) == 4 else 0
        x = jnp.moveaxis(x, axis, at) if axis is not None else jnp.repeat(jnp.expand_dims(x, at), size, at)
        return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])

    arguments = [merged(x, axis) for x, axis in zip(arguments, axes, strict=True)]
    results = _tangent_p.bind(*arguments, block=block, causal=causal)
    return [x.reshape(x.shape[0], size, -1, *x.shape[2:]) for x in results], [1, 1]


_tangent_p.def_impl(jax.jit(_tangent, static_argnames=('block', 'causal')))
_tangent_p.def_abstract_eval(lambda *arguments, **_: [arguments[3], arguments[5]])  # like the attended and the sums
mlir.register_lowering(_tangent_p, mlir.lower_fun(_tangent, multiple_results=True))
ad.primitive_transposes[_tangent_p] = _transpose_tangent
ad.primitive_jvps[_tangent_p] = _differentiate_tangent
batching.primitive_batchers[_tangent_p] = _batch_tangent


def _sight(block: int, segment_ids: Array | None, key_ids: Array | None) -> Callable[..., Array | None]:
    """Returns which keys of block `j` the queries of block `i` attend to; None for all."""

    def sight(i: Array, j: Array, *, diagonal: bool) -> Bool[Array, '#b #q #k'] | None:
        mask = jnp.tri(block, dtype=bool)[None] if diagonal else None
        if segment_ids is None or key_ids is None:
            return mask
        its, others = (_take(ids, at, block, axis=1) for ids, at in ((segment_ids, i), (key_ids, j)))
        return same_segment(its, others, jnp.ones((1, 1, 1), bool) if mask is None else mask)

    return sight


def _take(x: Array, at: Array, block: int, axis: int = 2) -> Array:
    return lax.dynamic_slice_in_dim(x, at * block, block, axis)


def _put(x: Array, part: Array, at: Array, block: int) -> Array:
    return lax.dynamic_update_slice_in_dim(x, part, at * block, axis=2)
