"""Incremental decoding of `combiner_logsparse`: O(log l) work for a token, amortised.

The left sibling that a position sees at level `t` is complete when that level's bit of the position is set, and no
longer seen when the next one is complete: one summary for each level is remembered. Position `i` completes exactly
one left sibling, at the level of its lowest zero bit. Its pooled query and key come from those of the left siblings
below, as a binary counter carries. Its local expectation runs over all of its positions, a piece after another; of
`2^t` positions that happens once in `2^(t+1)` tokens, so that each level adds half a position to a token's work.

Letters: as in `layout`, and `t` levels, `f` features of a pooling.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.attention.folds import along, finish, fold, join, lift
from combiner.attention.layout import Summary, scaled
from combiner.attention.pooling import Pool, Pools
from combiner.attention.sums import Sums, look, together, weigh

PIECE = 64


class Cache(NamedTuple):
    """Keys and values of all positions; of the left sibling at each level, lifted queries and keys, and its summary."""

    k: Float[Array, 'b h l d']
    v: Float[Array, 'b h l d']
    lifted_q: Float[Array, 'b h t f']
    lifted_k: Float[Array, 'b h t f']
    spans: Summary


def start(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    counts: Int[Array, ' b'],
    capacity: int,
    pools: Pools,
) -> Cache:
    """The cache after the first `counts` positions, with room for `capacity`; `q` is not scaled."""
    levels = max(1, (capacity - 1).bit_length())
    room = max(PIECE, 1 << levels) - q.shape[1]
    q, k, v = (jnp.moveaxis(jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))), 2, 0) for x in (q, k, v))
    number = (counts[:, None] >> jnp.arange(levels)) - 1  # of the left siblings, where the level's bit is set
    spans, found = lift(q, k, None, pools), []
    for level in range(levels):
        spans = fold(spans, 2, pools, last=True) if level else spans
        at = jnp.maximum(number[None, :, level, None, None], 0)
        found.append(along(spans, lambda x, axis, at=at: jnp.take_along_axis(x, at, axis)))
    lifted = join(found, jnp.concatenate)
    query, key = finish(lifted, pools, q.dtype)
    members = jnp.arange(k.shape[2]) >> jnp.arange(levels)[:, None] == number[..., None]
    value = weigh(query, k, v, members).average().astype(v.dtype)
    cache = Cache(k, v, lifted.q, lifted.k, Summary(key, value))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), cache)


def step(
    cache: Cache,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    pools: Pools,
) -> tuple[Cache, Float[Array, 'b h d']]:
    """One token of each sequence, at position `index`; `q` is not scaled."""
    return jax.vmap(partial(_step, pools=pools))(cache, index, q, k, v)


def _step(cache, index, q, k, v, pools):
    levels = jnp.arange(cache.lifted_q.shape[1])
    held_k, held_v = cache.k.at[:, index].set(k), cache.v.at[:, index].set(v)
    pair = jnp.stack([index, index ^ 1])
    direct = look(scaled(q), held_k[:, pair], held_v[:, pair], pair <= index)
    left = look(scaled(q), cache.spans.key, cache.spans.value, (index >> levels & 1 == 1) & (levels > 0))
    attended = together(direct, left).average()[:, 0, 0].astype(v.dtype)

    closed = jax.lax.population_count(index & ~(index + 1))  # the number of ones below the lowest zero bit
    lifted_q, pooled_q = _carry(pools.q, cache.lifted_q, q, index)
    lifted_k, pooled_k = _carry(pools.k, cache.lifted_k, k, index)
    new = Summary(
        pooled_k.astype(k.dtype), _expectation(scaled(pooled_q.astype(q.dtype)), held_k, held_v, index, closed)
    )
    spans = jax.tree.map(lambda held, one: held.at[:, closed].set(one, mode='drop'), cache.spans, new)
    return Cache(held_k, held_v, lifted_q, lifted_k, spans), attended


def _carry(
    pool: Pool, held: Float[Array, 'h t f'], x: Float[Array, 'h d'], index: Int[Array, '']
) -> tuple[Float[Array, 'h t f'], Float[Array, 'h d']]:
    """Adds a position: what each level then holds, and the block that it completes, pooled."""
    new, going_on, levels = pool.lift(x), jnp.array(True), []
    for level in range(held.shape[1]):
        one = index >> level & 1 == 1
        levels.append(jnp.where(going_on & ~one, new, held[:, level]))
        new = jnp.where(going_on & one, pool.combine(held[:, level], new), new)
        going_on &= one
    return jnp.stack(levels, axis=1), pool.finish(new)


def _expectation(query, k, v, index, level):
    """The local expectation over the `2^level` positions up to `index`; at level 0 nothing, as nobody needs it."""
    first = index + 1 - (1 << level)
    position = jnp.arange(PIECE)

    def add(piece: Int[Array, ''], sums: Sums) -> Sums:
        at = piece * PIECE
        some_k, some_v = (jax.lax.dynamic_slice_in_dim(x, at, PIECE, axis=1) for x in (k, v))
        inside = (at + position >= first) & (at + position <= index)
        return together(sums, look(query, some_k, some_v, inside))

    nothing = look(query, k[:, :1], v[:, :1], jnp.zeros(1, bool))
    pieces = jnp.where(level > 0, index // PIECE + 1, 0)
    return jax.lax.fori_loop(first // PIECE, pieces, add, nothing).average()[:, 0, 0].astype(v.dtype)
