"""The nodes of the trees of `combiner_tree`: spans of spans.

The leaves are the positions. A node's local expectation runs over its children, by their summary keys and values: so a
level costs no more than there are children, and all levels together little more than the lowest.

Letters: as in `folds`; `c` children of a node.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from combiner.attention.folds import NOBODY, Lifted, finish, fold, lift, of_same
from combiner.attention.pooling import Pools
from combiner.attention.sums import weigh


class Nodes(NamedTuple):
    """Nodes of one level, those that have the same parent in a row; `h m 1 d` before their siblings are found."""

    lifted: Lifted
    key: Float[Array, 'h m c d']
    value: Float[Array, 'h m c d']

    def turn(self) -> 'Nodes':
        """With the first two axes, heads and rows, exchanged."""
        q, k, labels = self.lifted
        q, k, key, value = (x.swapaxes(0, 1) for x in (q, k, self.key, self.value))
        return Nodes(Lifted(q, k, labels), key, value)

    def labelled(self, labels: Int[Array, 'm c'] | None) -> 'Nodes':
        """With other labels."""
        return self._replace(lifted=self.lifted._replace(labels=labels))


def leaves(
    q: Float[Array, 'h m c d'],
    k: Float[Array, 'h m c d'],
    v: Float[Array, 'h m c d'],
    labels: Int[Array, 'm c'] | None,
    pools: Pools,
) -> Nodes:
    """Positions as nodes, in rows as `layout.split` gives them; `q` is not scaled."""
    return Nodes(lift(q, k, labels, pools), k, v)


def parents(children: Nodes, pools: Pools, *, last: bool) -> Nodes:
    """Every row's parent, as `h m 1 d`; `last` as in `folds.fold`."""
    spans = fold(children.lifted, children.key.shape[2], pools, last=last)
    query, key = finish(spans, pools, children.key.dtype)
    mask = of_same(spans.labels, children.lifted.labels, jnp.ones((1, 1, 1), bool))
    value = weigh(query, children.key, children.value, mask).average().astype(children.value.dtype)
    return Nodes(spans, key, value)


def in_rows(nodes: Nodes, batch: int, branch: int, pools: Pools) -> Nodes:
    """From `h m 1 d` to rows of `branch` siblings of one sequence, the last filled up with nodes without members."""

    def rows(x: Shaped[Array, '*h m 1 x'], fill: Any = 0) -> Shaped[Array, '*h g c x']:
        x = x.reshape(*x.shape[:-3], batch, -1, x.shape[-1])
        room = ((0, 0),) * (x.ndim - 2) + ((0, -x.shape[-2] % branch), (0, 0))
        return jnp.pad(x, room, constant_values=fill).reshape(*x.shape[:-3], -1, branch, x.shape[-1])

    q, k, labels = nodes.lifted
    labels = None if labels is None else rows(labels[..., None], NOBODY)[..., 0]
    lifted = Lifted(rows(q, pools.q.neutral(q)), rows(k, pools.k.neutral(k)), labels)
    return Nodes(lifted, rows(nodes.key), rows(nodes.value))
