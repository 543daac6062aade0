"""Neighbouring spans folded into one, level after level: what logsparse and tree have in common.

Padding and packed documents are one thing here: a position has a label, which is the number of its segment, or `NOBODY`
for padding. A summary has one label too, as it is of one segment's members: of the last segment in the span where later
positions see it, for they can share no other, and of the first where earlier ones do.

Letters: as in `layout`, and `n` spans in a row, `f` features of a pooling.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner.attention.layout import scaled, split_labels, split_valid
from combiner.attention.pooling import Pool, Pools

NOBODY = int(np.iinfo(np.int32).min)


class Lifted(NamedTuple):
    """Lifted queries and keys (see `pooling`) of spans, reduced; no labels if all members are of one segment."""

    q: Float[Array, '*h n f']
    k: Float[Array, '*h n f']
    labels: Int[Array, '*m n'] | None


def label(
    batch: int,
    length: int,
    size: int,
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None,
    segments: Int[Array, 'b l'] | None,
) -> Int[Array, 'm c'] | None:
    """Labels of the positions of blocks; None if all that are ever reached have the same.

    In both directions there always are some: they tell spans without members, beyond the end, from others.
    """
    if valid is None and not causal:
        valid = jnp.ones((batch, length), bool)
    inside = split_valid(valid, batch, length, size, causal=causal)
    if segments is None:
        return None if inside is None else jnp.where(inside, 0, NOBODY)
    labels = split_labels(segments.astype(jnp.int32), size)
    return labels if inside is None else jnp.where(inside, labels, NOBODY)


def edge(labels: Int[Array, '*m c'], *, last: bool) -> Int[Array, '*m']:
    """The last (or first) label that is not `NOBODY`; `NOBODY` if there is none."""
    if last:
        labels = labels[..., ::-1]
    at = (labels != NOBODY).argmax(axis=-1, keepdims=True)
    return jnp.take_along_axis(labels, at, axis=-1)[..., 0]


def lift(
    q: Float[Array, '*h c d'], k: Float[Array, '*h c d'], labels: Int[Array, '*m c'] | None, pools: Pools
) -> Lifted:
    """Positions as spans of one; `q` is not scaled."""
    members = None if labels is None else labels != NOBODY
    return Lifted(pools.q.lifted(q, members), pools.k.lifted(k, members), labels)


def fold(spans: Lifted, count: int, pools: Pools, *, last: bool) -> Lifted:
    """`count` neighbours into one, seen from later (`last`) or earlier positions; `count` divides their number."""
    members = labels = None
    if spans.labels is not None:
        neighbours = spans.labels.reshape(*spans.labels.shape[:-1], -1, count)
        labels = edge(neighbours, last=last)
        members = neighbours == labels[..., None]

    def reduced(pool: Pool, x: Array) -> Array:
        x = x.reshape(*x.shape[:-2], -1, count, x.shape[-1])
        return pool.reduce(x if members is None else pool.only(x, members), axis=-2)

    return Lifted(reduced(pools.q, spans.q), reduced(pools.k, spans.k), labels)


def along(spans: Lifted, change: Callable[[Array, int], Array]) -> Lifted:
    """A change to the axis of spans, which is the last but one, and the last of labels."""
    labels = None if spans.labels is None else change(spans.labels, -1)
    return Lifted(change(spans.q, -2), change(spans.k, -2), labels)


def join(found: Sequence[Lifted], how: Callable[..., Array]) -> Lifted:
    """Concatenates or stacks spans, by `jnp.concatenate` or `jnp.stack`."""
    q, k, labels = zip(*found, strict=True)
    return Lifted(how(q, axis=-2), how(k, axis=-2), None if labels[0] is None else how(labels, axis=-1))


def finish(spans: Lifted, pools: Pools, dtype: Any) -> tuple[Float[Array, '*h n d'], Float[Array, '*h n d']]:
    """The summary queries, scaled, and the summary keys; zeros for a span without members."""
    some = None if spans.labels is None else spans.labels != NOBODY
    return scaled(pools.q.finished(spans.q, some).astype(dtype)), pools.k.finished(spans.k, some).astype(dtype)


def of_same(
    labels: Int[Array, '*m c'] | None, others: Int[Array, '*m n'] | None, mask: Bool[Array, '...']
) -> Bool[Array, '...']:
    """The mask from `c` to `n`, where the labels are equal; no labels are all equal."""
    if labels is None or others is None:
        return mask
    return mask & (labels[..., :, None] == others[..., None, :])
