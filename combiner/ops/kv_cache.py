"""Decoding where a position attends to others directly: keys and values of all positions, or of the last few.

Letters: `b` batch, `l` length, `h` head, `d` head width, `w` slots, `n` positions that a token attends to.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.ops.blocks import KeyGroup, attend_one


class Cache(NamedTuple):
    """Keys and values of the last `w` positions; position `i` is in slot `i mod w`."""

    k: Float[Array, 'b h w d']
    v: Float[Array, 'b h w d']


def init_full_cache(k: Float[Array, 'b l h d'], v: Float[Array, 'b l h d'], capacity: int) -> Cache:
    """Returns a cache of all positions, with room for `capacity`; unused positions are overwritten before use."""
    room = ((0, 0), (0, capacity - k.shape[1]), (0, 0), (0, 0))
    return Cache(*(jnp.moveaxis(jnp.pad(x, room), 2, 1) for x in (k, v)))


def init_window_cache(
    k: Float[Array, 'b l h d'], v: Float[Array, 'b l h d'], counts: Int[Array, ' b'], slots: int
) -> Cache:
    """Returns a cache of the last `places` of the first `counts` positions of every sequence."""
    held = cached_positions(counts - 1, slots)
    at = jnp.clip(held, 0, k.shape[1] - 1)[:, :, None, None]  # empty slots are not visible
    return Cache(*(jnp.moveaxis(jnp.take_along_axis(x, at, axis=1), 2, 1) for x in (k, v)))


def cached_positions(last: Int[Array, ' b'], slots: int) -> Int[Array, 'b w']:
    """Returns the position in each slot when `last` is the latest; negative for an empty slot."""
    return last[:, None] - (last[:, None] - jnp.arange(slots)) % slots


def decode_gathered(
    cache: Cache,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    at: Int[Array, 'b n'],
    visible: Bool[Array, 'b n'],
) -> tuple[Cache, Float[Array, 'b h d']]:
    """Caches a token at `index`, and attends from it (`q` is not scaled) to the positions `at` that are `visible`."""

    def step(cache, index, q, k, v, at, visible):
        slots = cache.k.shape[1]
        cache = Cache(*(held.at[:, index % slots].set(new) for held, new in zip(cache, (k, v), strict=True)))
        return cache, attend_one(q, KeyGroup(cache.k[:, at % slots], cache.v[:, at % slots], visible))

    return jax.vmap(step)(cache, index, q, k, v, at, visible)


def decode_window(
    cache: Cache,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    lowest: Int[Array, ' b'],
) -> tuple[Cache, Float[Array, 'b h d']]:
    """Decodes as `decode_gathered` does, to all positions from `lowest` on, which the cache must hold."""
    at = cached_positions(index, cache.k.shape[2])
    return decode_gathered(cache, index, q, k, v, at, at >= jnp.maximum(lowest, 0)[:, None])
