"""A softmax over groups of keys of which each is summed by itself (Combiner, equation (9)).

`joint.joint_exp` needs all logits of a query side by side. Here each group keeps the layout that suits it, and only its
sums are brought together. So a group can also serve several softmaxes.

Letters: `h` head, `m` lines (blocks, rows or columns), `q` query and `k` key in a line, `d` head width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner.attention.joint import Drop, dot, highest, masked


class Sums(NamedTuple):
    """For each query over a group of keys: `Σ exp(logit - top)` and `Σ exp(logit - top) v`, and `top`."""

    top: Float[Array, '*queries 1']
    total: Float[Array, '*queries 1']
    values: Float[Array, '*queries d']

    def average(self) -> Float[Array, '*queries d']:
        """The softmax's weighted mean of the values; zeros where every key was masked."""
        return self.values / jnp.where(self.total > 0, self.total, 1)


def weigh(
    q: Float[Array, 'h m q d'],
    k: Float[Array, 'h m k d'],
    v: Float[Array, 'h m k d'],
    mask: Bool[Array, '#m #q #k'] | None = None,
    drop: Drop | None = None,
) -> Sums:
    """The sums over one group of keys, those that `mask` lets through; `drop` acts on the weights of the values."""
    return of(masked(dot('hmqd,hmkd->hmqk', q, k), mask), v, drop)


def of(logits: Float[Array, 'h m q k'], v: Float[Array, 'h m k d'], drop: Drop | None = None) -> Sums:
    """The sums over one group of keys, given their logits."""
    top = highest(logits)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights if drop is None else drop(weights)
    return Sums(top, total, dot('hmqk,hmkd->hmqd', weights.astype(v.dtype), v))


def together(*groups: Sums) -> Sums:
    """The sums over several groups together."""
    top = groups[0].top
    for group in groups[1:]:
        top = jnp.maximum(top, group.top)
    total, values = jnp.zeros_like(groups[0].total), jnp.zeros_like(groups[0].values)
    for group in groups:
        scale = jnp.exp(group.top - top)
        total, values = total + scale * group.total, values + scale * group.values
    return Sums(top, total, values)


def over(groups: Sums, axis: int) -> Sums:
    """The sums over groups that are stacked along an axis."""
    top = groups.top.max(axis=axis, keepdims=True)
    scale = jnp.exp(groups.top - top)
    total, values = ((scale * x).sum(axis=axis) for x in groups[1:])
    return Sums(top.squeeze(axis), total, values)


def look(q: Float[Array, 'h d'], k: Float[Array, 'h k d'], v: Float[Array, 'h k d'], mask: Bool[Array, ' k']) -> Sums:
    """The sums of a single query of each head, as `h 1 1 d`: for decoding."""
    return weigh(q[:, None, None], k[:, None], v[:, None], mask[None, None])
