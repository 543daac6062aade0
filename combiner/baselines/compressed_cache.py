"""Decoding of `compressed`. Letters: as there."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.attention.layout import Summary, by_sequence
from combiner.attention.sums import look, together
from combiner.baselines import decoding
from combiner.baselines.compressed_summaries import pooled, summaries


class Cache(NamedTuple):
    """The last positions, and summaries: O(window + l/block)."""

    recent: decoding.Cache
    spans: Summary


def start(
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    gates: Summary,
    counts: Int[Array, ' b'],
    capacity: int,
    *,
    block: int,
    window: int,
) -> Cache:
    """A cache of the first `counts` positions. What it holds of others is overwritten before it is seen."""
    kept, block = min(max(window, block), capacity), min(block, capacity)
    blocks = -(-k.shape[1] // block)
    room = ((0, 0), (0, 0), (0, -(-capacity // block) - blocks), (0, 0))
    spans = (jnp.pad(by_sequence(x, blocks), room) for x in summaries(k, v, gates, block=block))
    return Cache(decoding.start_last(k, v, counts, kept), Summary(*spans))


def step(
    cache: Cache,
    index: Int[Array, ''],
    q: Float[Array, 'h d'],
    k: Float[Array, 'h d'],
    v: Float[Array, 'h d'],
    *,
    gates: Summary,
    block: int,
    window: int,
) -> tuple[Cache, Float[Array, 'h d']]:
    """One token of one sequence; `q` is scaled."""
    kept, own = cache.recent.k.shape[1], index // block
    recent = decoding.Cache(*(x.at[:, index % kept].set(new) for x, new in zip(cache.recent, (k, v), strict=True)))
    (position,) = decoding.positions_held(index[None], kept)
    one = pooled(*recent, gates, position >= own * block)  # final, and first seen, when it is closed
    spans = Summary(*(held.at[:, own].set(new) for held, new in zip(cache.spans, one, strict=True)))
    near = look(q, *recent, (position >= 0) & (position > index - window))
    far = look(q, *spans, jnp.arange(spans.key.shape[1]) * block <= index - window)
    attended = together(near, far).average()[:, 0, 0].astype(v.dtype)
    return Cache(recent, spans), attended
