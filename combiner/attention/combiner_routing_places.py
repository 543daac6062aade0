"""Where the tokens of each cluster lie: in blocks of the cluster's own order.

Letters: `h` head, `b` batch, `l` length, `d` head width, `g` clusters, `n` blocks, `c` place in a block, `i = n·c`
slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Places(NamedTuple):
    """Positions by cluster: each cluster's tokens in their order, cut into blocks from the cluster's first token on.

    Blocks are numbered in the order of their first tokens, so that neither the block nor the place of a token
    depends on what comes after it.

    Attributes:
        slot: the slot of each position; the number of slots for padding.
        at: the position in each slot; the length where the slot is empty.
        following: the next position in the same block; the length if there is none.
    """

    slot: Int[Array, 'h b l']
    at: Int[Array, 'h b i']
    following: Int[Array, 'h b l']


class Tokens(NamedTuple):
    """Queries (not scaled), keys and values by slot; an empty slot holds those of some token."""

    q: Float[Array, 'h b n c d']
    k: Float[Array, 'h b n c d']
    v: Float[Array, 'h b n c d']


def places(clusters: Int[Array, 'h b l'], block: int, number: int) -> Places:
    """The places of all positions; clusters from `number` on mark padding, which has none.

    Room is for `(l + g·(block - 1)) // block` blocks, the most there can be, `g = min(number, l)`. O(l log l).
    """
    if block < 1 or number < 1:
        raise ValueError(f'block={block} and number={number} of clusters must be at least 1')
    length = clusters.shape[-1]
    slots = (length + min(number, length) * (block - 1)) // block * block
    here = jnp.arange(length)
    order = jnp.argsort(clusters, axis=-1, stable=True)  # from here on `x_` is x in this order
    clusters_ = take(clusters, order)
    goes_on_ = jnp.pad(clusters_[..., 1:] == clusters_[..., :-1], ((0, 0), (0, 0), (1, 0)))
    rank_ = here - jax.lax.cummax(jnp.where(goes_on_, 0, here), axis=2)
    opens_ = rank_ % block == 0
    back = jnp.argsort(order, axis=-1)
    opened = jnp.cumsum(take(opens_ & (clusters_ < number), back), axis=-1) - 1
    block_ = take(opened, take(order, here - rank_ % block))
    slot = take(jnp.where(clusters_ < number, block_ * block + rank_ % block, slots), back)
    last = jnp.full_like(order[..., :1], length)
    following_ = jnp.concatenate([jnp.where(opens_[..., 1:], length, order[..., 1:]), last], axis=-1)
    empty = jnp.full(slots, length)
    # Mapped: where heads and batch are indices of the scatter too, XLA gathers them from all devices.
    at = jax.vmap(jax.vmap(lambda slot: empty.at[slot].set(here, mode='drop')))(slot)
    return Places(slot, at, take(following_, back))


def by_first_token(clusters: Int[Array, 'h b l'], number: int) -> Int[Array, 'h b l']:
    """Clusters named by the positions of their first tokens; of more clusters than tokens so no more are counted.

    No token's name depends on what comes after it. Those from `number` on, which mark padding, become the length.
    """
    length = clusters.shape[-1]
    here = jnp.arange(length)
    order = jnp.argsort(clusters, axis=-1, stable=True)
    clusters_ = take(clusters, order)
    goes_on_ = jnp.pad(clusters_[..., 1:] == clusters_[..., :-1], ((0, 0), (0, 0), (1, 0)))
    first_ = take(order, jax.lax.cummax(jnp.where(goes_on_, 0, here), axis=2))
    return jnp.where(clusters < number, take(first_, jnp.argsort(order, axis=-1)), length)


def take(x: Array, index: Int[Array, 'h b k']) -> Array:
    """The rows `x[h, b, index[h, b]]`, of `x` `[h b l …]`; indices beyond the end give the last row."""
    index = index.reshape(index.shape + (1,) * (x.ndim - index.ndim))
    return jnp.take_along_axis(x, index, axis=2, mode='clip')
