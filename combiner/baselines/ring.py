"""Decoding of windows: the last few keys and values, each at its position modulo their number.

Letters: `b` batch, `l` length, `h` head, `d` head width, `w` places.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.attention.sums import look


class Ring(NamedTuple):
    """The last `w` keys and values."""

    k: Float[Array, 'b h w d']
    v: Float[Array, 'b h w d']


def start_ring(k: Float[Array, 'b l h d'], v: Float[Array, 'b l h d'], counts: Int[Array, ' b'], places: int) -> Ring:
    """The last `places` of the first `counts` positions of every sequence."""
    at = positions_held(counts[:, None] - 1, places)
    at = jnp.clip(at, 0, k.shape[1] - 1)[:, :, None, None]  # places that hold nothing yet are not seen
    return Ring(*(jnp.moveaxis(jnp.take_along_axis(x, at, axis=1), 2, 1) for x in (k, v)))


def step_ring(
    ring: Ring,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    lowest: Int[Array, ' b'],
) -> tuple[Ring, Float[Array, 'b h d']]:
    """Takes a token at `index` in, and attends from it (`q` is not scaled) to the positions from `lowest` on: O(w)."""

    def step(ring, index, q, k, v, lowest):
        places = ring.k.shape[1]
        ring = Ring(*(held.at[:, index % places].set(new) for held, new in zip(ring, (k, v), strict=True)))
        seen = positions_held(index, places) >= jnp.maximum(lowest, 0)
        return ring, look(q, ring.k, ring.v, seen).average()[:, 0, 0].astype(v.dtype)

    return jax.vmap(step)(ring, index, q * q.shape[-1] ** -0.5, k, v, lowest)


def positions_held(last: Int[Array, '*b 1'] | Int[Array, ''], places: int) -> Int[Array, '*b w']:
    """The position whose key is at each place once that of `last` is there; negative where there is none yet."""
    return last - (last - jnp.arange(places)) % places
