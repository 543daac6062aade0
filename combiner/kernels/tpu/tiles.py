"""Operations on the arrays that a kernel holds in a TPU's vector memory.

A tile is some whole blocks. Its positions are rows. Its lanes are the head width, or the widths of several narrow heads
side by side: products of one head then see zeros in the lanes of the others.

Letters: `t` positions of a tile, `m` its blocks, `c` positions of a block, `s` keys, `e` lanes.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

LOWEST = float(jnp.finfo(jnp.float32).min)
ROWS_BY_COLUMNS = ((1,), (0,))  # a @ b
ROWS_BY_ROWS = ((1,), (1,))  # a @ b.T
COLUMNS_BY_COLUMNS = ((0,), (0,))  # a.T @ b


def product(a: Array, b: Array, contracted: Any = ROWS_BY_COLUMNS) -> Float[Array, 'x y']:
    """Multiplies matrices and accumulates in float32; float32 operands keep their precision."""
    if contracted == ROWS_BY_ROWS and b.shape[0] == 1:  # which Pallas does not lower in bfloat16
        return (a.astype(jnp.float32) * b.astype(jnp.float32)).sum(axis=1, keepdims=True)
    # None would be `jax_default_matmul_precision`, and a TPU multiplies bfloat16 in no other precision than its own.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (contracted, ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def scaled(x: Array, factor: float, dtype: Any) -> Array:
    """Multiplies in float32."""
    return (x.astype(jnp.float32) * factor).astype(dtype)


def of_each_head(x: Array, heads: int) -> list[Array]:
    """Returns the array once for each head that shares its lanes, with zeros in the lanes of the others."""
    if heads == 1:
        return [x]
    head = lax.broadcasted_iota(jnp.int32, (1, x.shape[-1]), 1) // (x.shape[-1] // heads)
    return [jnp.where(head == one, x, jnp.zeros_like(x)) for one in range(heads)]


def roll_lanes(x: Array, lanes: int) -> Array:
    """Rotates lanes to the right, in 32 bits, as a TPU can."""
    return pltpu.roll(x.astype(jnp.float32), lanes % x.shape[-1], 1).astype(x.dtype)


def own_lanes(parts: list[Array]) -> Array:
    """Takes the lanes of each head from its own part."""
    merged = parts[0]
    head = lax.broadcasted_iota(jnp.int32, (1, merged.shape[-1]), 1) // (merged.shape[-1] // len(parts))
    for one, part in enumerate(parts[1:], 1):
        merged = jnp.where(head == one, part, merged)
    return merged


def column(row: Array) -> Array:
    """Transposes `[1, t]` to `[t, 1]`."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def block_columns(x: Bool[Array, 'm c']) -> Int[Array, 't 1']:
    """Puts the rows of blocks one below the other, as a column: 1 for True."""
    rows = x.astype(jnp.int32)
    if rows.shape[0] % 8:
        rows = jnp.pad(rows, ((0, -rows.shape[0] % 8), (0, 0)))
    columns = rows.T
    return jnp.concatenate([columns[:, i : i + 1] for i in range(x.shape[0])], axis=0)


def repeat_lanes(x: Bool[Array, 'm c']) -> Bool[Array, 'm t']:
    """Repeats the row of every block for all blocks; with `in_block`, each block has its own row in its own lanes."""
    rows = x.astype(jnp.int32)
    return jnp.concatenate([rows] * x.shape[0], axis=1) != 0


def in_block(blocks: int, size: int) -> Bool[Array, 'm t']:
    """Returns which positions of a tile belong to which of its blocks."""
    shape = (blocks, blocks * size)
    position, block = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (1, 0))
    return (position >= block * size) & (position < (block + 1) * size)


def pool(x: Array, members: Array | None, blocks: int, kind: str) -> Float[Array, 'm e']:
    """Pools the members of every block, in float32; zeros for a block without members.

    Args:
        x: rows of a tile.
        members: int `[t, 1]`, not zero for members; None for all.
        blocks: blocks of the tile.
        kind: `max` or `mean`.
    """
    x = x.astype(jnp.float32)
    if members is not None:
        x = jnp.where(members != 0, x, LOWEST if kind == 'max' else 0.0)
    rows = _by_block(x, blocks)
    if kind == 'mean':
        return rows.sum(axis=1) / _counts(members, blocks, rows.shape[1])
    best = rows.max(axis=1)
    return best if members is None else jnp.where(best > LOWEST, best, 0.0)


def pool_gradient(
    gradient: Float[Array, 'm e'], x: Array, members: Array | None, blocks: int, kind: str
) -> Float[Array, 't e']:
    """Returns the gradient of `pool` for its rows; positions that share a maximum get equal parts."""
    if kind == 'mean':
        share = jnp.ones(x.shape, jnp.float32) if members is None else jnp.broadcast_to(members, x.shape) != 0
        share = _by_block(share.astype(jnp.float32), blocks)
        gradient = gradient / _counts(members, blocks, share.shape[1])
        return (share * gradient[:, None]).reshape(x.shape)
    x = x.astype(jnp.float32)
    if members is not None:
        x = jnp.where(members != 0, x, LOWEST)
    rows = _by_block(x, blocks)
    best = rows.max(axis=1)
    hit = ((rows == best[:, None]) & (rows > LOWEST)).astype(jnp.float32)
    return (hit * (gradient / jnp.maximum(hit.sum(axis=1), 1.0))[:, None]).reshape(x.shape)


def _by_block(x: Array, blocks: int) -> Array:
    return x.reshape(blocks, -1, x.shape[-1])


def _counts(members: Array | None, blocks: int, size: int) -> Any:
    """Returns the number of members of every block, at least one."""
    if members is None:
        return float(size)
    rows = _by_block(jnp.broadcast_to((members != 0).astype(jnp.float32), (members.shape[0], 128)), blocks)
    return jnp.maximum(rows.sum(axis=1)[:, :1], 1.0)


def softmax(logits: list[Array], masks: list[Array | None]) -> tuple[list[Array], Float[Array, 'c 1']]:
    """Returns the unnormalised weights of one softmax over several groups of keys, and its divisor.

    Where every logit is masked the weights are zero, and the divisor is one.
    """
    logits = [x if mask is None else jnp.where(mask, x, LOWEST) for x, mask in zip(logits, masks, strict=True)]
    sizes = [x.shape[1] for x in logits]
    joined = jnp.concatenate(logits, axis=1) if len(logits) > 1 else logits[0]
    top = jnp.maximum(joined.max(axis=1, keepdims=True), LOWEST / 2)
    weights = jnp.exp(joined - top)
    total = weights.sum(axis=1, keepdims=True)
    return _split(weights, sizes), jnp.where(total > 0, total, 1.0)


def _split(x: Array, sizes: list[int]) -> list[Array]:
    """Inverts a concatenation along the lanes."""
    if len(sizes) == 1:
        return [x]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [x[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]


def softmax_gradient(weights: list[Array], change: list[Array]) -> list[Array]:
    """Returns the gradient of the logits, for the normalised weights and the gradients of the weights."""
    sizes = [x.shape[1] for x in weights]
    p, dp = (jnp.concatenate(x, axis=1) if len(x) > 1 else x[0] for x in (weights, change))
    return _split(p * (dp - (p * dp).sum(axis=1, keepdims=True)), sizes)


def _mix(x: Array) -> Array:
    """Hashes 32-bit integers: every bit of the input changes about half of the bits of the output."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x = (x ^ lax.shift_right_logical(x, jnp.int32(shift))) * jnp.int32(factor)
    return x ^ lax.shift_right_logical(x, jnp.int32(16))


def kept_weights(
    seed: Int[Array, ''], first_row: Any, first_key: int, shape: tuple[int, ...], kept: Int[Array, ''], stride: int = 1
) -> Bool[Array, 'c s']:
    """Returns the weights that dropout keeps, by the seed, the position of the query and the number of the key.

    Args:
        seed: of a sequence and head.
        first_row: the position of the first query.
        first_key: the number of the first key: the keys of the own block come first, then the summaries.
        shape: the numbers of queries and keys.
        kept: of `KEPT_UNIT` weights, how many are kept.
        stride: from the position of a query to that of the next.
    """
    row = _mix((lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0) * stride + first_row) ^ seed)
    key = lax.broadcasted_iota(jnp.int32, shape, 1) + first_key
    return lax.shift_right_logical(_mix(row + key), jnp.int32(8)) < kept
