"""Spans of spans: neighbouring spans are pooled into one, level after level.

A summary has one segment id, as its members are of one document. For later positions it is the last document of the
span, the only one that they can share; for earlier positions the first.

Letters: as in `blocks`, and `n` spans in a row, `f` features of a pooling.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from combiner.ops.blocks import scale_queries
from combiner.ops.pooling import Pool, Pools
from combiner.ops.segments import PADDING_ID, edge_id


class EncodedSpans(NamedTuple):
    """Encoded queries and keys (see `pooling`) of spans, reduced; no segment ids if all members are of one segment."""

    q: Float[Array, '*h n f']
    k: Float[Array, '*h n f']
    segment_ids: Int[Array, '*m n'] | None


def encode_tokens(
    q: Float[Array, '*h c d'], k: Float[Array, '*h c d'], segment_ids: Int[Array, '*m c'] | None, pools: Pools
) -> EncodedSpans:
    """Encodes positions as spans of one position; `q` is not scaled."""
    members = None if segment_ids is None else segment_ids != PADDING_ID
    return EncodedSpans(pools.q.encode_members(q, members), pools.k.encode_members(k, members), segment_ids)


def merge_neighbours(spans: EncodedSpans, count: int, pools: Pools, *, last: bool) -> EncodedSpans:
    """Merges every `count` neighbours, for later (`last`) or earlier positions; `count` divides their number."""
    members = segment_ids = None
    if spans.segment_ids is not None:
        neighbours = spans.segment_ids.reshape(*spans.segment_ids.shape[:-1], -1, count)
        segment_ids = edge_id(neighbours, last=last)
        members = neighbours == segment_ids[..., None]

    def reduced(pool: Pool, x: Array) -> Array:
        x = x.reshape(*x.shape[:-2], -1, count, x.shape[-1])
        return pool.reduce(x if members is None else pool.keep(x, members), axis=-2)

    return EncodedSpans(reduced(pools.q, spans.q), reduced(pools.k, spans.k), segment_ids)


def map_spans(spans: EncodedSpans, change: Callable[[Array, int], Array]) -> EncodedSpans:
    """Applies `change` to the axis of spans: the last but one, of segment ids the last."""
    segment_ids = None if spans.segment_ids is None else change(spans.segment_ids, -1)
    return EncodedSpans(change(spans.q, -2), change(spans.k, -2), segment_ids)


def join_spans(found: Sequence[EncodedSpans], how: Callable[..., Array]) -> EncodedSpans:
    """Concatenates or stacks spans, by `jnp.concatenate` or `jnp.stack`."""
    q, k, segment_ids = zip(*found, strict=True)
    return EncodedSpans(how(q, axis=-2), how(k, axis=-2), None if segment_ids[0] is None else how(segment_ids, axis=-1))


def decode_spans(
    spans: EncodedSpans, pools: Pools, dtype: Any
) -> tuple[Float[Array, '*h n d'], Float[Array, '*h n d']]:
    """Decodes the summary queries, which are scaled, and the summary keys; zeros for a span without members."""
    some = None if spans.segment_ids is None else spans.segment_ids != PADDING_ID
    query, key = pools.q.decode_or_zero(spans.q, some), pools.k.decode_or_zero(spans.k, some)
    return scale_queries(query.astype(dtype)), key.astype(dtype)
