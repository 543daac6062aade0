"""Decoding of `sinkhorn`. Letters: as there, and `t` iterations, `c` positions of a block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.attention.joint import dot
from combiner.attention.layout import by_sequence, split
from combiner.attention.sums import look, together
from combiner.baselines.sinkhorn_sorting import next_row


class Cache(NamedTuple):
    """All keys and values, what is sorted beside the open block, and what sorting the next one needs.

    Attributes:
        k: keys by block.
        v: values by block.
        beside_k: the sorted keys.
        beside_v: the sorted values.
        total: the sum of the inputs.
        columns: see `next_row`.
    """

    k: Float[Array, 'b h n c d']
    v: Float[Array, 'b h n c d']
    beside_k: Float[Array, 'b h c d']
    beside_v: Float[Array, 'b h c d']
    total: Float[Array, 'b e']
    columns: Float[Array, 'b t h n']

    def sort(self, scores: Float[Array, 'b h n'], index: Int[Array, ' b']) -> 'Cache':
        """With a new block beside the open one, where that begins at `index`."""
        block = self.k.shape[3]

        def renewed() -> 'Cache':
            columns, weights = next_row(self.columns, scores, index // block)
            sorted_k, sorted_v = (
                dot('bhn,bhncd->bhcd', weights.astype(x.dtype), x).astype(x.dtype) for x in (self.k, self.v)
            )
            new = self._replace(columns=columns, beside_k=sorted_k, beside_v=sorted_v)
            begins = index % block == 0
            return jax.tree.map(lambda x, y: jnp.where(begins.reshape(-1, *(1,) * (x.ndim - 1)), x, y), new, self)

        return jax.lax.cond((index % block == 0).any(), renewed, lambda: self)


def start(
    x: Float[Array, 'b l e'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    scores: Float[Array, 'b h n m'],
    counts: Int[Array, ' b'],
    *,
    block: int,
    iterations: int,
) -> Cache:
    """A cache of the first `counts` positions, given the scores of their blocks, with room for `m` blocks.

    What it holds of other positions is overwritten before it is seen.
    """
    batch, length, heads, _ = k.shape
    room = ((0, 0), (0, 0), (0, scores.shape[3] - scores.shape[2]), (0, 0), (0, 0))
    k, v = (jnp.pad(by_sequence(split(a, block), scores.shape[2]), room) for a in (k, v))
    inside = (jnp.arange(length) < counts[:, None])[..., None]
    total = jnp.where(inside, x.astype(jnp.float32), 0).sum(axis=1)
    columns = jnp.full((batch, iterations, heads, scores.shape[3]), jnp.finfo(jnp.float32).min)
    cache = Cache(k, v, jnp.zeros_like(k[:, :, 0]), jnp.zeros_like(v[:, :, 0]), total, columns)

    def sort(cache: Cache, row: tuple[Array, Array]) -> tuple[Cache, None]:
        number, scores = row
        index = number * block
        return cache.sort(scores, jnp.where(index < counts, index, 1 - block)), None  # which begins no block

    rows = jnp.arange(scores.shape[2]), jnp.moveaxis(scores, 2, 0)
    return jax.lax.scan(sort, cache, rows)[0]


def step(
    cache: Cache,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
) -> tuple[Cache, Float[Array, 'b h d']]:
    """One token of each sequence, after sorting where it begins a block; `q` is scaled."""
    block, rows = cache.k.shape[3], jnp.arange(len(index))
    row, here = index // block, index % block
    held_k, held_v = (held.at[rows, :, row, here].set(new) for held, new in ((cache.k, k), (cache.v, v)))
    own = jnp.arange(block) <= here[:, None]
    near = jax.vmap(look)(q, held_k[rows, :, row], held_v[rows, :, row], own)
    far = jax.vmap(look)(q, cache.beside_k, cache.beside_v, jnp.broadcast_to(row[:, None] > 0, own.shape))
    return cache._replace(k=held_k, v=held_v), together(near, far).average()[:, :, 0, 0].astype(v.dtype)
