"""Attention from the positions of one chunk to themselves, to nodes of the chunk and to spans of whole chunks.

All keys of a chunk are one array: the nodes of each side, then the spans. No node is in the first row: its column is
for the position itself, whose logit and value are not products of matrices.

Letters: as in `tiles`, and `s` keys of a chunk.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.arrays import Tokens
from combiner.kernels.tpu.logsparse import nodes
from combiner.kernels.tpu.logsparse.nodes import Pooling
from combiner.kernels.tpu.logsparse.spans import Chunk, Tables
from combiner.kernels.tpu.summaries import expectation, expectation_gradient
from combiner.kernels.tpu.tiles import COLUMNS_BY_COLUMNS, ROWS_BY_ROWS, product


class Keys(NamedTuple):
    """The keys of a chunk.

    Attributes:
        queries: of the nodes of each side, scaled.
        k: keys `[s, e]`.
        v: values `[s, e]`.
        visible: which keys each position sees, `[c, s]`.
    """

    queries: list[Array]
    k: Array
    v: Array
    visible: Bool[Array, 'c s']


class Pools(NamedTuple):
    """The poolings of the queries and the keys of a chunk."""

    q: Pooling
    k: Pooling


def keys_of(chunk: Chunk, x: Tokens, pools: Pools, tables: Tables) -> Keys:
    """Returns the keys of a chunk."""
    plan, queries, k, v, visible = chunk.plan, [], [], [], []
    for side in range(plan.sides):
        query, key = (pool.pool(side).astype(x.q.dtype) for pool in pools)
        queries.append(tiles.scaled(query, plan.scale, query.dtype))
        k.append(key)
        inside = nodes.members(plan.block, side, chunk.ids)
        v.append(expectation(plan, queries[side], x.k, x.v, inside).astype(x.v.dtype))
        visible.append(nodes.visible(plan.block, side, chunk.ids))
    k.append(chunk.summary(tables.k, own=False).astype(x.k.dtype))
    v.append(chunk.expectation(tables.v, own=False).astype(x.v.dtype))
    visible.append(jnp.broadcast_to(chunk.visible(), (plan.block, plan.spans)))
    visible = jnp.concatenate([one.astype(jnp.int32) for one in visible], axis=1) != 0
    return Keys(queries, jnp.concatenate(k, axis=0), jnp.concatenate(v, axis=0), visible | _is_self(visible))


def _is_self(x: Array) -> Array:
    """Returns the column of the position itself."""
    return lax.broadcasted_iota(jnp.int32, x.shape, 1) == 0


def _with_self(x: Array, one: Array, other: Array) -> Array:
    """Puts the products of the rows of two arrays into the column of the position itself."""
    own = (one.astype(jnp.float32) * other.astype(jnp.float32)).sum(axis=1, keepdims=True)
    return jnp.where(_is_self(x), own, x)


def attend(chunk: Chunk, x: Tokens, tables: Tables) -> Float[Array, 'c e']:
    """Returns the attended values of the positions of a chunk."""
    plan, parts = chunk.plan, []
    pools = Pools(*(Pooling(plan, rows, chunk.ids) for rows in x[:2]))
    keys = keys_of(chunk, x, pools, tables)
    for one, head in enumerate(tiles.of_each_head(tiles.scaled(x.q, plan.scale, x.q.dtype), plan.shared_by)):
        logits = _with_self(product(head, keys.k, ROWS_BY_ROWS), head, x.k)
        (weights,), total = tiles.softmax([logits], [keys.visible])
        (weights,) = chunk.tile.drop([weights], chunk.block, one)
        own = weights[:, :1].astype(x.v.dtype).astype(jnp.float32) * x.v.astype(jnp.float32)
        parts.append((product(weights.astype(x.v.dtype), keys.v) + own) / total)
    return tiles.own_lanes(parts)


def attend_gradient(chunk: Chunk, x: Tokens, d_out: Array, tables: Tables) -> tuple[Tokens, Tokens]:
    """Returns the gradients of the (scaled) rows of a chunk, and of the keys and values of the spans that it sees."""
    plan = chunk.plan
    pools = Pools(*(Pooling(plan, rows, chunk.ids) for rows in x[:2]))
    keys = keys_of(chunk, x, pools, tables)
    dq: list[Any] = []
    d_own: list[Any] = [0.0, 0.0]
    d_k: Any = 0.0
    d_v: Any = 0.0
    heads = [tiles.of_each_head(y, plan.shared_by) for y in (tiles.scaled(x.q, plan.scale, x.q.dtype), d_out)]
    for one, (head, d_head) in enumerate(zip(*heads, strict=True)):
        (weights,), total = tiles.softmax([_with_self(product(head, keys.k, ROWS_BY_ROWS), head, x.k)], [keys.visible])
        weights = weights / total
        change = chunk.tile.drop([_with_self(product(d_head, keys.v, ROWS_BY_ROWS), d_head, x.v)], chunk.block, one)
        (d_logits,) = (y.astype(x.q.dtype) for y in tiles.softmax_gradient([weights], change))
        weights = chunk.tile.drop([weights], chunk.block, one)[0].astype(x.q.dtype)
        own_logit, own_weight = (y[:, :1].astype(jnp.float32) for y in (d_logits, weights))
        dq.append(product(d_logits, keys.k) + own_logit * x.k.astype(jnp.float32))
        d_own = [d_own[0] + own_logit * head.astype(jnp.float32), d_own[1] + own_weight * d_head.astype(jnp.float32)]
        d_k += product(d_logits, head, COLUMNS_BY_COLUMNS)
        d_v += product(weights, d_head, COLUMNS_BY_COLUMNS)
    d = Tokens(tiles.own_lanes(dq), *d_own)
    through = _nodes_gradient(chunk, x, pools, keys, d_k, d_v)
    spans = slice(plan.sides * plan.block, None)
    return Tokens(*(one + other for one, other in zip(d, through, strict=True))), Tokens(None, d_k[spans], d_v[spans])


def _nodes_gradient(chunk: Chunk, x: Tokens, pools: Pools, keys: Keys, d_k: Array, d_v: Array) -> Tokens:
    """Returns the gradients of the rows of a chunk through its nodes."""
    plan, d_queries, d_keys, dk, dv = chunk.plan, [], [], 0.0, 0.0
    for side, query in enumerate(keys.queries):
        rows = slice(side * plan.block, (side + 1) * plan.block)
        inside = nodes.members(plan.block, side, chunk.ids)
        d_query, one_k, one_v = expectation_gradient(plan, query, x.k, x.v, inside, d_v[rows])
        d_queries.append(d_query)
        d_keys.append(d_k[rows])
        dk, dv = dk + one_k, dv + one_v
    return Tokens(pools.q.gradient(d_queries), dk + pools.k.gradient(d_keys), dv)
