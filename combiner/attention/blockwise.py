"""Softmax attention in O(l) memory, a block of queries and a block of keys at a time (Dao et al. 2022).

Forward, each block of queries visits the blocks of keys and keeps the maximum `m` so far, the sum `z` of `exp(s - m)`
and that of `exp(s - m) v` (Rabe & Staats 2021). Backward, the weights are computed again from `m` and `z`, not from
`m + log z`, whose rounding would change the weights of large logits:

    p_ij = exp(s_ij - m_i) / z_i      dv_j = Σ_i p_ij do_i      ds_ij = p_ij (do_i·v_j - do_i·o_i)
    dq_i = Σ_j ds_ij k_j              dk_j = Σ_i ds_ij q_i

Causal, blocks above the diagonal are never visited, and only those on it are masked. Loops run over positions alone:
batch and heads may be sharded. Reverse mode only. At 2,048 positions, 8 heads of 64, causal, on 2 cores, forward and
backward, blocks of 64, 128, 256 and 512 took 138, 145, 168 and 208 ms, `jax.nn.dot_product_attention` 670 to 1,150.

Letters: `b` batch, `l` length, `h` heads, `d` head width, `q` query and `k` key in a block.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from combiner.attention.folds import label, of_same
from combiner.attention.joint import dot, masked
from combiner.attention.steps import STEP_LOGITS
from combiner.attention.sums import Sums, together, weigh


def block_for(batch: int, heads: int, length: int) -> int:
    """How many positions to take at a time: on a CPU, as many as leave a step's logits in its cache."""
    in_cache = [block for block in (512, 256, 128) if batch * heads * block**2 <= STEP_LOGITS] or [64]
    return min(in_cache[0] if jax.default_backend() == 'cpu' else 1024, length)


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
    """`softmax(q·k/√d) v`, gradients included: O(l²) time, O(l) memory.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        causal: whether a position sees only itself and what is before it.
        valid: positions that are no padding; padding must hold finite numbers.
        segments: packed documents; they do not see each other.
        block: positions taken at a time, None for `block_for`. The result does not depend on it.
    """
    batch, length, heads, width = q.shape
    block = block or block_for(batch, heads, length)
    labels = label(batch, length, block, causal=causal, valid=valid, segments=segments)
    labels = None if labels is None else labels.reshape(batch, -1)
    room = ((0, 0), (0, -length % block), (0, 0), (0, 0))
    q, k, v = (jnp.moveaxis(jnp.pad(x, room), 2, 0) for x in (q * width**-0.5, k, v))
    return jnp.moveaxis(_attend(block, causal, q, k, v, labels), 0, 2)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(block, causal, q, k, v, labels):
    return _forward(block, causal, q, k, v, labels)[0]


def _forward(block, causal, q, k, v, labels):
    count = q.shape[2] // block
    sight = _sight(block, labels)

    def row(i: Array, written: Sums) -> Sums:
        """One block of queries."""
        own = _take(q, i, block)

        def add(j: Array, sums: Sums, *, diagonal: bool = False) -> Sums:
            return together(sums, weigh(own, _take(k, j, block), _take(v, j, block), sight(i, j, diagonal=diagonal)))

        sums = add(i, nothing, diagonal=True) if causal else nothing
        sums = lax.fori_loop(0, i if causal else count, add, sums)
        return Sums(*(_put(x, part, i, block) for x, part in zip(written, sums, strict=True)))

    accumulator = jnp.promote_types(q.dtype, jnp.float32)
    written = Sums(*(jnp.zeros((*q.shape[:3], width), accumulator) for width in (1, 1, q.shape[3])))
    nothing = Sums(written.top[:, :, :block] + jnp.finfo(accumulator).min / 2, *(x[:, :, :block] for x in written[1:]))
    sums = lax.fori_loop(0, count, row, written)
    attended = sums.average().astype(v.dtype)
    return attended, (q, k, v, labels, attended, sums.top, jnp.where(sums.total > 0, sums.total, 1))


def _backward(block, causal, kept, cotangent):
    q, k, v, labels, attended, top, total = kept
    count = q.shape[2] // block
    sight = _sight(block, labels)
    mean = dot('hbqd,hbqd->hbq', cotangent, attended)[..., None] / total
    divided = (cotangent / total).astype(v.dtype)  # so that the weights need not be

    def column(j: Array, written: tuple[Array, ...]) -> tuple[Array, ...]:
        """One block of keys and values."""
        own_k, own_v = _take(k, j, block), _take(v, j, block)

        def add(i: Array, sums: tuple[Array, ...], *, diagonal: bool = False) -> tuple[Array, ...]:
            dq, dk, dv = sums
            its_q, its_divided, its_mean, its_top = (_take(x, i, block) for x in (q, divided, mean, top))
            logits = masked(dot('hbqd,hbkd->hbqk', its_q, own_k), sight(i, j, diagonal=diagonal))
            weights = jnp.exp(logits - its_top)
            change = weights * (dot('hbqd,hbkd->hbqk', its_divided, own_v) - its_mean)
            weights, change = weights.astype(v.dtype), change.astype(v.dtype)
            its_dq = _take(dq, i, block) + dot('hbqk,hbkd->hbqd', change, own_k)
            dk += dot('hbqk,hbqd->hbkd', change, its_q)
            dv += dot('hbqk,hbqd->hbkd', weights, its_divided)
            return _put(dq, its_dq, i, block), dk, dv

        dq, *kv = written
        none = dq, *(jnp.zeros(own_k.shape, total.dtype),) * 2
        first = add(j, none, diagonal=True) if causal else none
        dq, *sums = lax.fori_loop(j + 1 if causal else 0, count, add, first)
        return dq, *(_put(x, part.astype(x.dtype), j, block) for x, part in zip(kv, sums, strict=True))

    written = jnp.zeros(q.shape, total.dtype), jnp.zeros_like(k), jnp.zeros_like(v)
    dq, dk, dv = lax.fori_loop(0, count, column, written)
    return dq.astype(q.dtype), dk, dv, None


_attend.defvjp(_forward, _backward)


def _sight(block: int, labels: Array | None) -> Callable[..., Array | None]:
    """Which keys of block `j` the queries of block `i` see; None for all."""

    def sight(i: Array, j: Array, *, diagonal: bool) -> Bool[Array, '#b #q #k'] | None:
        mask = jnp.tri(block, dtype=bool)[None] if diagonal else None
        if labels is None:
            return mask
        its, others = (_take(labels, at, block, axis=1) for at in (i, j))
        return of_same(its, others, jnp.ones((1, 1, 1), bool) if mask is None else mask)

    return sight


def _take(x: Array, at: Array, block: int, axis: int = 2) -> Array:
    return lax.dynamic_slice_in_dim(x, at * block, block, axis)


def _put(x: Array, part: Array, at: Array, block: int) -> Array:
    return lax.dynamic_update_slice_in_dim(x, part, at * block, axis=2)
