"""Summaries of `compressed`, and attention to them. Letters: as there, and `s` positions beside a chunk."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.attention.folds import of_same
from combiner.attention.joint import Drop, dot, joint_exp, masked
from combiner.attention.layout import Summary, merge, split, split_labels
from combiner.attention.pooling import attention
from combiner.attention.siblings import Siblings


def pooled(
    k: Float[Array, 'h *n c d'], v: Float[Array, 'h *n c d'], gates: Summary, members: Bool[Array, '*n c']
) -> Summary:
    """Gated means of the members of each block; zeros where there are none."""
    return Summary(attention(gates.key)(k, members), attention(gates.value)(v, members))


def summaries(
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    gates: Summary,
    *,
    block: int,
    valid: Bool[Array, 'b l'] | None = None,
) -> Summary:
    """Of the blocks of all sequences, `[h, b·n, d]`."""
    members = split_labels(jnp.ones(k.shape[:2], bool) if valid is None else valid, block)
    return pooled(split(k, block), split(v, block), gates, members)


def attend_chunks(
    q: Float[Array, 'p h d'],
    k: Float[Array, 'p h d'],
    v: Float[Array, 'p h d'],
    labels: Int[Array, 'm c'] | None,
    groups: list[Siblings],
    seen: Bool[Array, 'm c n'],
    *,
    own: Bool[Array, 'c c'],
    spans: Summary,
    drop: Drop | None,
) -> Float[Array, 'p h d']:
    """One softmax of the positions of chunks over their own chunk, what is beside it, and summaries of their sequence.

    Args:
        q: scaled queries of all positions, as are keys `k` and values `v`.
        k: keys.
        v: values.
        labels: of positions (see `folds`).
        groups: what is beside each chunk, blocks first.
        seen: which position sees which summary.
        own: which position sees which of its chunk.
        spans: the summaries, `[h, b, n, d]`.
        drop: dropout of the weights.
    """
    heads, batch, _, width = spans.key.shape
    q, k, v = (split(x[None], len(own)) for x in (q, k, v))
    groups = [group.turn() for group in groups]
    near = masked(dot('hmqd,hmkd->hmqk', q, k), of_same(labels, labels, own))
    far = dot('hbld,hbnd->hbln', q.reshape(heads, batch, -1, width), spans.key).reshape(*near.shape[:-1], -1)
    logits = masked(far, seen), near, *(group.logits(q, labels) for group in groups)
    (far, *weights), total = joint_exp(*logits, drop=drop)
    far = far.astype(v.dtype).reshape(heads, batch, -1, far.shape[-1])
    attended = dot('hbln,hbnd->hbld', far, spans.value).reshape(v.shape)
    for weight, values in zip(weights, (v, *(group.value for group in groups)), strict=True):
        attended += dot('hmqk,hmkd->hmqd', weight.astype(v.dtype), values)
    return merge((attended / total).astype(v.dtype), len(seen) * len(own))[0]
