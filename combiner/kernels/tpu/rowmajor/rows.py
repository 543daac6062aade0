"""Attention within the rows of a grid, and the summaries of rows by each of their positions, with gradients.

A row of the grid is summarised once for each of its positions: by its query, as a local expectation over the row. Both
use the logits of the row for itself.

Letters: as in `tile`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Tokens
from combiner.kernels.tpu.rowmajor.tile import GridTile, by_head, partial_softmax
from combiner.kernels.tpu.tiles import COLUMNS_BY_COLUMNS, ROWS_BY_ROWS, product


class Pair(NamedTuple):
    """Keys and values of summaries, or their gradients: `[t, e]`, tables `[sides, c, s, e]`, or tuples by side."""

    k: Any
    v: Any


def heads_of(tile: GridTile, x: Tokens) -> list[Array]:
    """Returns the scaled queries of a group once for each head that shares its lanes (see `tiles.of_each_head`)."""
    return tiles.of_each_head(tiles.scaled(x.q, tile.plan.scale, x.q.dtype), tile.plan.shared_by)


def attend_own(tile: GridTile, group: Any, v: Array, logits: list[Array]) -> tuple[Array, Array]:
    """Attends within rows: returns values `[t, e]`, and the logarithm of the sum of exponentials in the lanes of heads.

    Where every logit is masked, values are zero, and the logarithm is the lowest number.
    """
    _, own = tile.own_masks(group)
    values, sums = [], []
    for head, x in enumerate(logits):
        weights, total, top = partial_softmax(x, own)
        weights = tile.drop_own(weights, group, head)
        some = jnp.where(total > 0, total, 1.0)
        values.append(product(weights.astype(v.dtype), v) / some)
        sums.append(jnp.where(total > 0, top + jnp.log(some), tiles.LOWEST))
    return tiles.own_lanes(values), by_head(sums, v.shape[1])


class Local(NamedTuple):
    """The local expectations of the positions of a group: weights `[t, t]` of one head and side."""

    weights: Float[Array, 't t']
    queries: Bool[Array, 't 1'] | None  # positions whose query counts; None for all


def local(tile: GridTile, group: Any, side: int, logits: Float[Array, 't t']) -> Local:
    """Returns the weights over the members of a row; a position that is no member counts as a zero query."""
    members, in_lanes = tile.members(group, side)
    mask, _ = tile.own_masks(group)
    if members is not None and in_lanes is not None:
        logits, mask = jnp.where(members, logits, 0.0), mask & in_lanes
    weights, total, _ = partial_softmax(logits, mask)
    return Local(weights / jnp.where(total > 0, total, 1.0), members)


def summarise(tile: GridTile, group: Any, side: int, x: Tokens, logits: list[Array]) -> Pair:
    """Returns the summary of its row for each position of a group."""
    keys, values = [], []
    for of_head in logits:
        weights = local(tile, group, side, of_head).weights.astype(x.v.dtype)
        keys.append(product(weights, x.k) if tile.plan.attended else x.k.astype(jnp.float32))
        values.append(product(weights, x.v))
    key = tiles.own_lanes(keys)
    members, _ = tile.members(group, side)
    if members is not None and not tile.plan.attended:
        key = jnp.where(members, key, 0.0)
    return Pair(key, tiles.own_lanes(values))


class Sums(NamedTuple):
    """The logarithm of the sum of exponentials of a softmax, and Σ p·dp; `[t, 1]` of each head."""

    logarithm: list[Array]
    delta: list[Array]


def gradient(tile: GridTile, group: Any, x: Tokens, d_out: Array, sums: Sums, d_summaries: list[Pair]) -> Tokens:
    """Returns the gradients of the tokens of a group through its rows and their summaries; of queries, of scaled ones.

    Args:
        tile: the tile.
        group: the number of the group.
        x: its tokens.
        d_out: the gradient of the attended values.
        sums: of the joint softmax.
        d_summaries: the gradients of the summaries of each side, in float32.
    """
    _, own = tile.own_masks(group)
    dq, dk, dv = [], jnp.zeros(x.k.shape, jnp.float32), jnp.zeros(x.v.shape, jnp.float32)
    d_heads = tiles.of_each_head(d_out, tile.plan.shared_by)
    by_heads = [[tiles.of_each_head(d.astype(x.v.dtype), tile.plan.shared_by) for d in side] for side in d_summaries]
    for head, (q, d_head) in enumerate(zip(heads_of(tile, x), d_heads, strict=True)):
        logits = product(q, x.k, ROWS_BY_ROWS)
        weights = jnp.exp(jnp.where(own, logits, tiles.LOWEST) - sums.logarithm[head])
        change = tile.drop_own(product(d_head, x.v, ROWS_BY_ROWS), group, head)
        d_logits = weights * (change - sums.delta[head])
        dv += product(tile.drop_own(weights, group, head).astype(x.v.dtype), d_head, COLUMNS_BY_COLUMNS)
        for side, (d_keys, d_values) in enumerate(by_heads):
            weights, queries = local(tile, group, side, logits)
            change = product(d_values[head], x.v, ROWS_BY_ROWS)
            rounded = weights.astype(x.v.dtype)
            dv += product(rounded, d_values[head], COLUMNS_BY_COLUMNS)
            if tile.plan.attended:
                change += product(d_keys[head], x.k, ROWS_BY_ROWS)
                dk += product(rounded, d_keys[head], COLUMNS_BY_COLUMNS)
            (through,) = tiles.softmax_gradient([weights], [change])
            d_logits += through if queries is None else jnp.where(queries, through, 0.0)
        d_logits = d_logits.astype(x.q.dtype)
        dq.append(product(d_logits, x.k))
        dk += product(d_logits, q, COLUMNS_BY_COLUMNS)
    if not tile.plan.attended:
        for side, (d_key, _) in enumerate(d_summaries):
            members, _ = tile.members(group, side)
            dk += d_key if members is None else jnp.where(members, d_key, 0.0)
    return Tokens(tiles.own_lanes(dq), dk, dv)
