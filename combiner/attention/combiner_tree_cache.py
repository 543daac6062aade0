"""Incremental decoding of `combiner_tree`: O(branch · log(l)) work for a token and as much memory.

Of every level only the open row is remembered: the children so far of the node that a token is below. Each token makes
that node anew from them. It is final, and first seen, once it has all its children.

Letters: as in `nodes`, and `t` levels, the positions first.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from combiner.attention.folds import NOBODY
from combiner.attention.layout import by_sequence, scaled, split
from combiner.attention.nodes import Nodes, in_rows, leaves, parents
from combiner.attention.pooling import Pools
from combiner.attention.sums import look, together


def start(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    counts: Int[Array, ' b'],
    *,
    branch: int,
    levels: int,
    pools: Pools,
) -> Nodes:
    """The open rows after the first `counts` positions, `b h t c d`; `q` is not scaled, `levels` are those of spans."""
    q, k, v = (split(x, branch) for x in (q, k, v))
    batch, nodes = len(counts), leaves(q, k, v, None, pools)
    found = []
    for level in range(levels + 1):
        if level:
            nodes = in_rows(parents(nodes, pools, last=True), batch, branch, pools)
        found.append(_row(nodes, counts // branch ** (level + 1), batch))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), *found)


def step(
    cache: Nodes,
    index: Int[Array, ' b'],
    q: Float[Array, 'b h d'],
    k: Float[Array, 'b h d'],
    v: Float[Array, 'b h d'],
    pools: Pools,
) -> tuple[Nodes, Float[Array, 'b h d']]:
    """One token of each sequence, at position `index`; `q` is not scaled."""
    return jax.vmap(partial(_step, pools=pools))(cache, index, q, k, v)


def _step(cache, index, q, k, v, pools):
    _, levels, branch, _ = cache.key.shape
    child = jnp.arange(branch)
    node = leaves(q[:, None, None], k[:, None, None], v[:, None, None], None, pools)
    rows, sums = [], []
    for level in range(levels):
        own = index // branch**level % branch
        row = _put(cache, level, own, node.labelled(None))
        sums.append(look(scaled(q), row.key[:, 0], row.value[:, 0], child < own if level else child <= own))
        node = parents(row.labelled(jnp.where(child <= own, 0, NOBODY)[None]), pools, last=True)
        rows.append(row)
    attended = together(*sums).average()[:, 0, 0].astype(v.dtype)
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *rows), attended


def _row(nodes: Nodes, number: Int[Array, ' b'], batch: int) -> Nodes:
    """One row of each sequence, as `b h 1 c d`; the last one where that row does not exist yet."""
    rows = nodes.key.shape[1] // batch
    at = jnp.minimum(number, rows - 1)[:, None, None, None, None]
    return jax.tree.map(lambda x: jnp.take_along_axis(by_sequence(x, rows), at, axis=2), nodes)


def _put(cache: Nodes, level: int, at: Int[Array, ''], node: Nodes) -> Nodes:
    """The row of a level with a node in its place, as `h 1 c d`."""
    return jax.tree.map(lambda held, new: held[:, level, None].at[:, :, at].set(new[:, :, 0]), cache, node)
