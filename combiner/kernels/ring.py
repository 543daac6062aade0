"""Softmax attention over sequences that are cut over devices: keys and values go round (Liu et al. 2023).

Each device attends from its part of the queries, first to its own keys, then, step by step, to those of every other
part, which it receives from its neighbour and sends on. Memory is that of two parts of the keys. Backward, keys and
values go round again, and their gradients with them.

Causal, a part attends to no later part: the steps in which it would are skipped. The last device works in every step
and the first in one only, so the devices together are idle for almost half of the time.

Query heads that share a key head attend together: it goes round once.

Letters: as in `flash`, and `g` key heads.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from combiner.ops import parts
from combiner.ops.blocks import block_segment_ids
from combiner.ops.flash import backward_pass, block_for, forward_pass
from combiner.ops.softmax import Drop, PartialSoftmax, merge_partials


def refuse_ring(q: Float[Array, 'b l h d'], *, drop: Drop | None, **options: Any) -> str:
    """Returns the reason why `attend_ring` cannot be used; empty if it can."""
    del q, options
    if parts.count() == 1:
        return 'is for sequences that are cut over devices, mesh.context > 1'
    return '' if drop is None else 'has no dropout of weights: set model.attention_dropout=0, or mesh.context=1'


def attend_ring(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l g d'],
    v: Float[Array, 'b l g d'],
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
    block: int | None = None,
) -> Float[Array, 'b l h d']:
    """Computes `softmax(q·k/√d) v` for the own part of the queries over the keys of all parts.

    It has the gradient, and no other derivative.

    Args:
        q, k, v, causal, valid, segments: of the own part; see `core.mechanism`.
        drop: None, as `refuse_ring` makes sure.
        block: positions computed at a time, None for `flash.block_for`. The result does not depend on it.
    """
    del drop
    batch, length, heads, width = q.shape
    block = block or block_for(batch, heads, length)
    # Later parts attend to the padding of the last block too, so that it must be marked, also if causal.
    segment_ids = block_segment_ids(batch, length, block, causal=False, valid=valid, segments=segments)
    segment_ids = None if segment_ids is None else segment_ids.reshape(batch, -1)
    room = ((0, 0), (0, -length % block), (0, 0), (0, 0))
    q, k, v = (jnp.moveaxis(jnp.pad(x, room), 2, 0) for x in (q * width**-0.5, k, v))
    q = jnp.moveaxis(q.reshape(len(k), -1, *q.shape[1:]), 1, 0)
    attended: Any = _attend(block, causal, q, k, v, segment_ids)
    return jnp.moveaxis(attended, (1, 0), (2, 3)).reshape(batch, -1, heads, width)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(block, causal, q, k, v, segment_ids):
    """Attends from queries `[h/g, g, b, l, d]` to keys and values `[g, b, l, d]`."""
    return _forward(block, causal, q, k, v, segment_ids)[0]


def _forward(block, causal, q, k, v, segment_ids):
    """Returns the attended values, and what the gradient needs."""

    def attend(keys: tuple[Any, Any, Any], *, diagonal: bool = False) -> PartialSoftmax:
        k, v, key_ids = keys
        attended, top, total = jax.vmap(lambda q: forward_pass(block, diagonal, q, k, v, segment_ids, key_ids))(q)
        return PartialSoftmax(top, total, attended * total)

    def step(number: Array, carry: tuple[Any, PartialSoftmax]) -> tuple[Any, PartialSoftmax]:
        keys, sums = carry
        following = parts.send_on(keys)  # while these are used
        return following, _if_earlier(causal, number, lambda sums: merge_partials(sums, attend(keys)), sums)

    own = (k, v, segment_ids)
    following = parts.send_on(own)
    _, sums = lax.fori_loop(1, parts.count(), step, (following, attend(own, diagonal=causal)))
    attended = sums.normalize().astype(v.dtype)
    return attended, (q, k, v, attended, sums.top, sums.total, segment_ids)


def _backward(block, causal, kept, cotangent):
    q, k, v, *sums, segment_ids = kept
    cotangents = cotangent, jnp.zeros_like(sums[1])

    def gradients(keys: tuple[Any, ...], *, diagonal: bool = False) -> tuple[Array, ...]:
        def of_one(q: Array, sums: Any, cotangents: Any) -> tuple[Array, Array, Array]:
            return backward_pass(block, diagonal, (q, *keys[:2], *sums), segment_ids, keys[2], cotangents)

        dq, dk, dv = (x.astype(sums[1].dtype) for x in jax.vmap(of_one)(q, sums, cotangents))
        return dq, dk.sum(axis=0), dv.sum(axis=0)

    def step(number: Array, carry: tuple[Any, Array, Any]) -> tuple[Any, Array, Any]:
        keys, dq, of_keys = carry
        following = parts.send_on(keys)

        def add(grown: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(x + more for x, more in zip(grown, gradients(keys), strict=True))

        dq, *of_keys = _if_earlier(causal, number, add, (dq, *of_keys))
        return following, dq, parts.send_on(tuple(of_keys))

    own = (k, v, segment_ids)
    following = parts.send_on(own)
    dq, *of_keys = gradients(own, diagonal=causal)
    start = following, dq, parts.send_on(tuple(of_keys))
    _, dq, (dk, dv) = lax.fori_loop(1, parts.count(), step, start)  # the last step sends the gradients home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _if_earlier(causal: bool, number: Array, add: Any, sums: Any) -> Any:
    """Returns `add(sums)`, or, if causal and the keys of step `number` are of a later part, `sums`."""
    return lax.cond(number <= parts.index(), add, lambda sums: sums, sums) if causal else add(sums)
