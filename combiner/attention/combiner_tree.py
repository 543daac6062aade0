"""Combiner-Tree, of this project: spans of spans, which the paper allows (Combiner, section 3)."""

import operator
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from combiner import costs, patterns
from combiner.attention import combiner_tree_cache as tree_cache
from combiner.attention.folds import label
from combiner.attention.joint import Drop
from combiner.attention.layout import flatten, split_all, split_scaled
from combiner.attention.nodes import Nodes, in_rows, leaves, parents
from combiner.attention.pooled import PooledAttention
from combiner.attention.pooling import PLAIN, Pools
from combiner.attention.registry import register
from combiner.attention.siblings import Siblings, attend_blocks
from combiner.attention.steps import divide, visit


def attend_combiner_tree(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    branch: int,
    causal: bool,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Equation (7) on a tree in which `branch` nodes of a level have one parent; the leaves are the positions.

    `Ω_i^0` are the leaves that share the parent of `i` (causal: up to `i`). The spans are, at every higher level, the
    earlier (bidirectional: all) siblings of the node above `i`. A node's local expectation runs over its children:

        V_r = Σ_s softmax_s(Q_r·K_s) V_s        Q_r = pool_s q, K_r = pool_s k over all leaves below r

    O(l·branch·log(l) / log(branch)) time. With `l ≤ branch²` this is `combiner_fixed` with `block = branch`.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        branch: children of a node, at least 2.
        causal: whether a position sees only itself and what is before it.
        pools: how the members of a span become its summary query and key.
        valid: positions that are no padding; padding must hold finite numbers.
        segments: packed documents, each a contiguous run of positions with one number; they do not see each other.
        drop: dropout of the joint weights.
    """
    batch, length, heads, width = q.shape
    branch = _fit(branch, length)
    labels = label(batch, length, branch, causal=causal, valid=valid, segments=segments)
    q, k, v = (flatten(x, branch) for x in (q, k, v))
    blocks, levels = len(q) // (batch * branch), patterns.tree_levels(length, branch)
    steps = divide(len(q) * heads * branch * (levels + 1), blocks, at_once=drop is not None)

    def look(q, k, v, labels, *, last):
        """The parents of the positions of some blocks, blocks first."""
        q, k, v = split_all(branch, q, k, v)
        return parents(leaves(q, k, v, labels, pools), pools, last=last).turn()

    def attend(q, k, v, labels, number):
        """The attended values of some blocks, the same of all sequences."""
        number = number.reshape(batch, -1)[0]
        groups = [_siblings(nodes, number // branch**level, batch, sees) for level, sees, nodes in seen]
        q, k, v = split_scaled(branch, q, k, v)
        return attend_blocks(q, k, v, labels, own, groups, drop)

    own, seen = jnp.asarray(patterns.support(branch, causal=causal)), []
    for last, sees in _views(causal, segments) if levels else ():
        nodes = visit(partial(look, last=last), steps, batch, q, k, v, labels).turn()
        for level in range(levels):
            nodes = in_rows(parents(nodes, pools, last=last) if level else nodes, batch, branch, pools)
            seen.append((level, sees, nodes))
    numbers = jnp.tile(jnp.arange(blocks), batch)
    return visit(attend, steps, batch, q, k, v, labels, numbers).reshape(batch, -1, heads, width)[:, :length]


def _fit(branch: int, length: int) -> int:
    """No more children than there are positions: beyond them there are no more leaves."""
    return min(branch, max(2, length))


def _views(causal, segments):
    """Whether summaries are of a node's last or first segment, and which siblings of a node see it so."""
    if causal:
        return [(True, operator.lt)]
    return [(True, operator.ne)] if segments is None else [(True, operator.lt), (False, operator.gt)]


def _siblings(nodes: Nodes, number: Int[Array, ' n'], batch: int, sees: Callable[..., Array]) -> Siblings:
    """For each of several blocks the siblings of the node above it that has that number at its level."""
    branch = nodes.key.shape[2]

    def pick(x: Shaped[Array, '*h g c d']) -> Shaped[Array, '*h m c d']:
        rows = x.reshape(*x.shape[:-3], batch, -1, *x.shape[-2:])
        return jnp.take(rows, number // branch, axis=-3).reshape(*x.shape[:-3], -1, *x.shape[-2:])

    labels = nodes.lifted.labels
    labels = None if labels is None else pick(labels[..., None])[..., 0]
    uses = jnp.tile(sees(jnp.arange(branch), number[:, None] % branch), (batch, 1))
    return Siblings(pick(nodes.key), pick(nodes.value), labels, uses[:, None])


@register('combiner_tree')
class CombinerTreeAttention(PooledAttention):
    """Combiner-Tree with `branch` children of a node."""

    branch: int = 32

    full_support = packs = True

    def pattern(self, length):
        return patterns.combiner_tree(length, causal=self.causal, branch=self.branch)

    def cost(self, length):
        return costs.combiner_tree(length, self.branch, causal=self.causal)

    def attend_pooled(self, pools, q, k, v, **masks):
        return attend_combiner_tree(q, k, v, branch=self.branch, causal=self.causal, pools=pools, **masks)

    def start(self, x, q, k, v, counts, capacity):
        branch = _fit(self.branch, capacity)
        sizes = {'branch': branch, 'levels': patterns.tree_levels(capacity, branch)}
        return tree_cache.start(q, k, v, counts, pools=self.pools, **sizes)

    def step(self, cache, index, x, q, k, v):
        return tree_cache.step(cache, index, q, k, v, self.pools)
