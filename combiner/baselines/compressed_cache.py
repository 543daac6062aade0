"""Decoding of `compressed`. Letters: as there, and `r` positions that are kept themselves."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.attention.layout import Summary, by_sequence
from combiner.attention.sums import look, together
from combiner.baselines.compressed_summaries import pooled, summaries


class Cache(NamedTuple):
    """Keys and values of the last positions, by position modulo their number, and summaries: O(window + l/block)."""

    k: Float[Array, '*b h r d']
    v: Float[Array, '*b h r d']
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
    blocks = -(-k.shape[1] // block)
    room = ((0, 0), (0, 0), (0, -(-capacity // block) - blocks), (0, 0))
    spans = (jnp.pad(by_sequence(x, blocks), room) for x in summaries(k, v, gates, block=block))
    at = jnp.maximum(_positions(counts - 1, max(window, block)), 0)
    recent_k, recent_v = (jnp.moveaxis(jnp.take_along_axis(x, at[..., None, None], axis=1), 2, 1) for x in (k, v))
    return Cache(recent_k, recent_v, Summary(*spans))


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
    kept = cache.k.shape[1]
    recent_k, recent_v = (held.at[:, index % kept].set(new) for held, new in ((cache.k, k), (cache.v, v)))
    position, own = _positions(index, kept), index // block
    one = pooled(recent_k, recent_v, gates, position >= own * block)  # final, and first seen, when it is closed
    spans = Summary(*(held.at[:, own].set(new) for held, new in zip(cache.spans, one, strict=True)))
    near = look(q, recent_k, recent_v, (position >= 0) & (position > index - window))
    far = look(q, *spans, jnp.arange(spans.key.shape[1]) * block <= index - window)
    attended = together(near, far).average()[:, 0, 0].astype(v.dtype)
    return Cache(recent_k, recent_v, spans), attended


def _positions(last: Int[Array, '*b'], kept: int) -> Int[Array, '*b r']:
    """The position that each place holds: the last one up to `last` that is equal to it modulo `kept`."""
    return last[..., None] - (last[..., None] - jnp.arange(kept)) % kept
