"""Windows beside summaries of the whole sequence, in one softmax.

Letters: as in `layout`, `m` and `c` of chunks that are computed at once, `n` summaries of a sequence.
"""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.attention.folds import label, of_same
from combiner.attention.joint import Drop, dot, joint_exp, masked
from combiner.attention.layout import Summary, flatten, merge, split
from combiner.attention.siblings import Siblings, block_length
from combiner.attention.steps import divide, visit
from combiner.baselines.windows import beside, within


def attend_spans(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    spans: Summary,
    seen: Bool[Array, '#b #l n'],
    *,
    before: int,
    after: int,
    chunk: int,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """One softmax over the positions `i - before ≤ j ≤ i + after` and the summaries that `i` sees.

    O(l·(before + after + n)) time and memory; on a CPU chunks are visited in steps (see `steps`).

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        spans: the summaries, `[h, b, n, d]`.
        seen: which of them each position sees.
        before: how far the window reaches to the left.
        after: how far it reaches to the right.
        chunk: a power of two, how many positions are computed at once. The result does not depend on it.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the weights.
    """
    batch, length, heads, width = q.shape
    size = block_length(chunk, length)
    labels = label(batch, length, size, causal=after == 0, valid=valid, segments=None)
    q, k, v = (flatten(x, size) for x in (q * width**-0.5, k, v))
    chunks = len(q) // (batch * size)
    if seen.shape[1] > 1:
        seen = jnp.pad(seen, ((0, 0), (0, -length % size), (0, 0))).reshape(len(seen), chunks, size, -1)
    seen = jnp.broadcast_to(seen.reshape(len(seen), -1, *seen.shape[-2:]), (batch, chunks, *seen.shape[-2:]))
    groups = beside(k, v, labels, batch=batch, block=size, before=before, after=after)
    attend = partial(_attend_chunks, own=within(size, before, after), spans=spans, drop=drop)
    terms = size + sum(group.key.shape[2] for group in groups) + seen.shape[-1]
    steps = divide(len(q) * heads * terms, chunks, at_once=drop is not None)
    attended = visit(attend, steps, batch, q, k, v, labels, groups, seen.reshape(-1, *seen.shape[2:]))
    return attended.reshape(batch, -1, heads, width)[:, :length]


def _attend_chunks(
    q: Float[Array, 'p h d'],
    k: Float[Array, 'p h d'],
    v: Float[Array, 'p h d'],
    labels: Int[Array, 'm c'] | None,
    groups: list[Siblings],
    seen: Bool[Array, 'm #c n'],
    *,
    own: Bool[Array, 'c c'],
    spans: Summary,
    drop: Drop | None,
) -> Float[Array, 'p h d']:
    """The attended values of some chunks, which see themselves, what is beside them and the summaries."""
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
