"""What mechanisms over blocks and grid rows share: the layout, and the summary of a span.

Letters: `b` batch, `l` length, `h` head, `d` head width, `n` blocks or grid rows, `c` position in a block, or
grid column.

Inside a mechanism heads come before positions, `b h n c d`: the products become plain batched matrix
multiplications, which run twice as fast on a CPU as the same einsums over `b n c h d`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner.attention.joint import dot, masked, softmax


class Summary(NamedTuple):
    """How spans look from outside: `key` K_r says how much a span weighs, `value` is its local expectation."""

    key: Float[Array, '*spans d']
    value: Float[Array, '*spans d']


class Recent(NamedTuple):
    """The tokens of the open block (or of the last two grid rows) while decoding, as they came in."""

    q: Float[Array, '*rows c d']
    k: Float[Array, '*rows c d']
    v: Float[Array, '*rows c d']


def split(x: Float[Array, 'b l h d'], size: int) -> Float[Array, 'b h n c d']:
    """Cuts the length into blocks of `size` positions, padding the last with zeros, and puts heads first."""
    if size < 1:
        raise ValueError(f'a block or grid row must hold at least 1 position, got {size}')
    batch, length, heads, width = x.shape
    x = jnp.moveaxis(jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0))), 2, 1)
    return x.reshape(batch, heads, -1, size, width)


def merge(x: Float[Array, 'b h n c d'], length: int) -> Float[Array, 'b l h d']:
    """The inverse of `split`, without the padding."""
    batch, heads, _, _, width = x.shape
    return jnp.moveaxis(x.reshape(batch, heads, -1, width), 1, 2)[:, :length]


def split_valid(
    valid: Bool[Array, 'b l'] | None, length: int, size: int, *, causal: bool
) -> Bool[Array, '#b 1 n c'] | None:
    """Which positions of the blocks are padding neither of the batch nor of the last block; None for all.

    Causal attention alone never reaches the padding of the last block.
    """
    if valid is None:
        if causal or length % size == 0:
            return None
        valid = jnp.ones((1, length), bool)
    return jnp.pad(valid, ((0, 0), (0, -length % size))).reshape(valid.shape[0], 1, -1, size)


def summarise(
    q: Float[Array, '*n c d'],
    k: Float[Array, '*n c d'],
    v: Float[Array, '*n c d'],
    members: Bool[Array, '...'] | None = None,
) -> Summary:
    """Max-pooled summary of blocks (Combiner, equation (7)); that of a block without members is zero.

        K_r = max_j k_j        V_r = Σ_j softmax_j(Q_r·k_j) v_j        Q_r = max_j q_j

    Args:
        q: queries, already scaled.
        k: keys.
        v: values.
        members: which positions belong to the span, broadcastable to `*n c`; None for all.
    """
    inside = None if members is None else members[..., None]
    local_query, key = (masked(x, inside).max(axis=-2) for x in (q, k))
    if members is not None:
        some = members.any(axis=-1)[..., None]
        local_query, key = (jnp.where(some, x, 0) for x in (local_query, key))
    weights = softmax(masked(dot('...d,...cd->...c', local_query, k), members))
    value = dot('...c,...cd->...d', weights.astype(v.dtype), v)
    return Summary(key, value.astype(v.dtype))
