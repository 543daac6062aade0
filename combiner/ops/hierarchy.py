"""Spans of spans: neighbouring spans are pooled into one, level after level.

A summary has one label, as it is of the members of one document: of the last document in the span where later positions
see it, for they can share no other, and of the first where earlier ones do.

Letters: as in `blocks`, and `n` spans in a row, `f` features of a pooling.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from combiner.ops.blocks import scaled
from combiner.ops.pooling import Pool, Pools
from combiner.ops.segments import NOBODY, edge


class Lifted(NamedTuple):
    """Lifted queries and keys (see `pooling`) of spans, reduced; no labels if all members are of one segment."""

    q: Float[Array, '*h n f']
    k: Float[Array, '*h n f']
    labels: Int[Array, '*m n'] | None


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
