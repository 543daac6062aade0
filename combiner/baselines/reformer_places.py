"""Tokens in the order of their buckets, in chunks. Letters: as in `reformer`."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


class Places(NamedTuple):
    """The order of the tokens in every round, and the place of every token."""

    tokens: Int[Array, 'b h r l']
    of_token: Int[Array, 'b h r l']

    def sorted(self, x: Shaped[Array, 'b h l e'], chunk: int) -> Shaped[Array, 'm s c e']:
        """What tokens have, in the order of each round, in chunks."""
        batch, heads, rounds, length = self.tokens.shape
        x = jnp.take_along_axis(x, self.tokens.reshape(batch, heads, -1, 1), axis=2)
        x = jnp.moveaxis(x.reshape(batch, heads * rounds, length // chunk, chunk, -1), 2, 1)
        return x.reshape(-1, *x.shape[2:])

    def restored(self, x: Float[Array, 'm s c e'], batch: int) -> Float[Array, 'b h r l e']:
        """The inverse, of what differs by round."""
        x = jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 2, 1).reshape(*self.tokens.shape, -1)
        return jnp.take_along_axis(x, self.of_token[..., None], axis=3)


def sort(buckets: Int[Array, 'b h r l']) -> Places:
    """By bucket and, within one, by position."""
    tokens = jnp.argsort(buckets, axis=-1)  # stable
    return Places(tokens, jnp.argsort(tokens, axis=-1))


def with_previous(x: Shaped[Array, 'm s c e'], batch: int) -> Shaped[Array, 'm s k e']:
    """Every chunk behind the one before it; zeros before the first of a sequence."""
    by_sequence = x.reshape(batch, -1, *x.shape[1:])
    previous = jnp.pad(by_sequence[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0))).reshape(x.shape)
    return jnp.concatenate([previous, x], axis=2)
