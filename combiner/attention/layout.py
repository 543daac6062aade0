"""What mechanisms over blocks and grid rows share: the layout, masks inside a block, and the summary of a span.

Letters: `b` batch, `l` length, `h` head, `d` head width, `n` blocks (or grid rows) of a sequence, `m = b·n` those of
the whole batch, `c` position in a block, or grid column.

Inside a mechanism the layout is `h m c d`: heads first, then the blocks of all sequences. All products are then matrix
multiplications with two batch axes, seldom of size one. XLA's CPU back end ran forward and backward 1.5 times
faster so than over `b h n c d`, and twice as fast as over `b n c h d`. Heads and batch lead their axes, so both can be
sharded.
"""

from numbers import Integral
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner.attention.joint import dot, masked, softmax
from combiner.attention.pooling import Pools


class Summary(NamedTuple):
    """How spans look from outside: `key` K_r says how much a span weighs, `value` is its local expectation."""

    key: Float[Array, '*spans d']
    value: Float[Array, '*spans d']


class Recent(NamedTuple):
    """The tokens of the open block (or of the last two grid rows) while decoding, as they came in."""

    q: Float[Array, '*rows c d']
    k: Float[Array, '*rows c d']
    v: Float[Array, '*rows c d']


def split(x: Float[Array, 'b l h d'], size: int) -> Float[Array, 'h m c d']:
    """Cuts every sequence into blocks of `size` positions, padding the last with zeros."""
    _check_size(size)
    _, length, heads, width = x.shape
    x = jnp.moveaxis(jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0))), 2, 0)
    return x.reshape(heads, -1, size, width)


def merge(x: Float[Array, 'h m c d'], length: int) -> Float[Array, 'b l h d']:
    """The inverse of `split`, without the padding."""
    heads, _, size, width = x.shape
    return jnp.moveaxis(x.reshape(heads, -1, -(-length // size) * size, width), 0, 2)[:, :length]


def flatten(x: Float[Array, 'b l h d'], size: int) -> Float[Array, 'p h d']:
    """All positions of the batch, with those that complete the last block of each sequence."""
    _check_size(size)
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0))).reshape(-1, *x.shape[2:])


def scaled(q: Float[Array, '*n d']) -> Float[Array, '*n d']:
    """Queries over `√d`. What pools queries does so before: rounded, two that differ can be equal."""
    return q * q.shape[-1] ** -0.5


def split_all(size: int, *tokens: Float[Array, 'p h d']) -> list[Array]:
    """Positions by block `h m c d`."""
    return [split(x[None], size) for x in tokens]


def split_scaled(size: int, q: Float[Array, 'p h d'], *others: Float[Array, 'p h d']) -> list[Array]:
    """As `split_all`; queries are scaled here, block by block, and not in a copy of them all."""
    return split_all(size, scaled(q), *others)


def by_heads(x: Float[Array, 'p h d'], batch: int) -> Float[Array, 'h b s d']:
    """Spans of the whole batch, by head and sequence."""
    return jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 2, 0)


def by_sequence(x: Float[Array, 'h m *rest'], blocks: int) -> Float[Array, 'b h n *rest']:
    """Blocks by batch row, for decoding."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, blocks, *x.shape[2:]), 0, 1)


def transpose_grid(x: Float[Array, 'h m c e'], rows: int) -> Float[Array, 'h k n e']:
    """From rows of a grid to its columns, `k = b·c`, or, with the number of columns in place of `rows`, back."""
    heads, _, columns, last = x.shape
    return x.reshape(heads, -1, rows, columns, last).swapaxes(2, 3).reshape(heads, -1, rows, last)


def split_valid(
    valid: Bool[Array, 'b l'] | None, batch: int, length: int, size: int, *, causal: bool
) -> Bool[Array, 'm c'] | None:
    """Which positions of the blocks are padding neither of the batch nor of the last block; None for all.

    Causal attention alone never reaches the padding of the last block.
    """
    _check_size(size)
    if valid is None:
        if causal or length % size == 0:
            return None
        valid = jnp.ones((batch, length), bool)
    return split_labels(valid, size)


def split_labels(labels: Shaped[Array, 'b l'], size: int) -> Shaped[Array, 'm c']:
    """Cuts labels of positions (validity, segments) into blocks; the padding of the last block is 0 or False."""
    return jnp.pad(labels, ((0, 0), (0, -labels.shape[1] % size))).reshape(-1, size)


def mask_own(
    logits: Float[Array, 'h m c c'],
    *,
    causal: bool,
    inside: Bool[Array, 'm c'] | None,
    segments: Int[Array, 'm c'] | None = None,
) -> Float[Array, 'h m c c']:
    """Logits inside blocks, where the key is valid, of the query's segment and (causal) not after the query."""
    if inside is not None:
        logits = masked(logits, inside[:, None, :])
    if segments is not None:
        logits = masked(logits, segments[:, :, None] == segments[:, None, :])
    return masked(logits, jnp.tri(logits.shape[-1], dtype=bool)) if causal else logits


def summarise(
    q: Float[Array, '*n c d'],
    k: Float[Array, '*n c d'],
    v: Float[Array, '*n c d'],
    members: Bool[Array, '...'] | None = None,
    *,
    pools: Pools,
) -> Summary:
    """Pooled summary of blocks (Combiner, equation (7)); that of a block without members is zero.

        K_r = pool_j k_j        V_r = Σ_j softmax_j(Q_r·k_j/√d) v_j        Q_r = pool_j q_j

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        members: which positions belong to the span, broadcastable to `*n c`; None for all.
        pools: how queries and keys are pooled.
    """
    local_query, key = scaled(pools.q(q, members)), pools.k(k, members)
    return Summary(key, expectation(local_query, k, v, members))


def expectation(
    query: Float[Array, '*n d'],
    k: Float[Array, '*n c d'],
    v: Float[Array, '*n c d'],
    members: Bool[Array, '...'] | None = None,
) -> Float[Array, '*n d']:
    """Local expectation `Σ_j softmax_j(query·k_j) v_j` over the members of each span; zero where there are none."""
    weights = softmax(masked(dot('...d,...cd->...c', query, k), members))
    return dot('...c,...cd->...d', weights.astype(v.dtype), v).astype(v.dtype)


def fit(size: int, length: int) -> int:
    """The length of a block or grid row, and no more than that of the sequence: beyond it nothing would change.

    Raises:
        ValueError: it is no positive integer.
    """
    _check_size(size)
    return min(size, length)


def _check_size(size: int) -> None:
    if not isinstance(size, Integral) or size < 1:
        raise ValueError(f'a block or grid row must hold at least 1 position, got {size}')
