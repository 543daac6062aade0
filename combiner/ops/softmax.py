"""Softmax attention from its parts: one softmax over several groups of keys (Combiner, equation (9)).

`unnormalized_softmax` takes the logits of all groups separately and concatenates nothing. `PartialSoftmax` is the
partial softmax of one group, in the layout that suits it; `merge_partials` merges the partial softmaxes of several
groups. So a group can also serve several softmaxes. `attend_full` is the dense softmax over one group.

Letters: `b` batch, `l` query and `m` key position, `h` head, `g` key head, `d` head width; of groups: `m` lines
(blocks, rows or columns), `q` query and `k` key in a line.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Drop = Callable[[Array], Array]


class Dropout:
    """Dropout of the weights of one call: each group of weights has a key of its own.

    Attributes:
        key: a random key.
        rate: the part of the weights that is dropped.
    """

    def __init__(self, key: Array, rate: float | Array) -> None:
        self.key, self.rate = key, rate
        self._groups = itertools.count()

    def __call__(self, weights: Float[Array, '*weights']) -> Float[Array, '*weights']:
        """Drops weights, and divides the others by their part."""
        kept = jax.random.bernoulli(jax.random.fold_in(self.key, next(self._groups)), 1 - self.rate, weights.shape)
        return jnp.where(kept, weights / (1 - self.rate), 0)


def einsum(equation: str, *operands: Array) -> Array:
    """Computes an einsum that accumulates in float32 at least, as logits and the sums of a softmax need."""
    accumulator = jnp.promote_types(jnp.result_type(*operands), jnp.float32)
    return jnp.einsum(equation, *operands, preferred_element_type=accumulator)


def wide_dtype(dtype: Any) -> Any:
    """Returns the type for numbers that are not bounded by their inputs: `dtype`, or float32 if its range is greater.

    Features, sums and norms need the range of float32, which bfloat16 has and float16 has not.
    """
    return dtype if jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp else jnp.float32


def mask_logits(logits: Float[Array, '*logits'], mask: Bool[Array, '...'] | None) -> Float[Array, '*logits']:
    """Replaces logits where `mask` is False by the most negative finite number: infinities would make gradients NaN."""
    return logits if mask is None else jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def unnormalized_softmax(*logits: Float[Array, '...'], drop: Drop | None = None) -> tuple[list[Array], Array]:
    """Computes unnormalised weights of one softmax over the last axes of all groups, and their divisor.

        Z = Σ_groups Σ_last exp(logit - top)          top = the maximum over all groups

    The caller divides: it is cheaper on the weighted sum of values than on the weights. Where every logit is masked
    (see `mask_logits`), the weights are zero and the divisor is one: the result is zero, with a zero gradient.

    Args:
        *logits: groups of logits, equal but for their last axis.
        drop: applied to the weights, not to the divisor (dropout).

    Returns:
        The weights of each group, and the divisor with a last axis of one.
    """
    top = max_logit(*logits)
    weights = [jnp.exp(group - top) for group in logits]
    total = _sum([group.sum(axis=-1, keepdims=True) for group in weights])
    if drop is not None:
        weights = [drop(group) for group in weights]
    return weights, jnp.where(total > 0, total, 1)


def max_logit(*logits: Float[Array, '...']) -> Float[Array, '*queries 1']:
    """Returns the greatest logit over the last axes of all groups, without gradient: it cancels out of a softmax.

    Where every logit is masked it is half of the lowest number, so that `exp(logit - top)` is exactly zero there.
    """
    tops = [group.max(axis=-1, keepdims=True) for group in logits]
    top = functools.reduce(jnp.maximum, tops)
    return jax.lax.stop_gradient(jnp.maximum(top, jnp.finfo(top.dtype).min / 2))


@jax.custom_jvp
def joint_softmax(*logits: Float[Array, '...']) -> list[Array]:
    """Computes the normalised weights of one softmax over the last axes of all groups.

    Its derivative is written in the weights, `p·(dx - Σ p·dx)`: the derivative of the quotient goes through the sums as
    well, and takes longer.
    """
    weights, total = unnormalized_softmax(*logits)
    return [group / total for group in weights]


@joint_softmax.defjvp
def _joint_softmax_tangents(logits, tangents):
    weights = joint_softmax(*logits)
    mean = _sum([(group * change).sum(axis=-1, keepdims=True) for group, change in zip(weights, tangents, strict=True)])
    return weights, [group * (change - mean) for group, change in zip(weights, tangents, strict=True)]


def softmax(logits: Float[Array, '*logits']) -> Float[Array, '*logits']:
    """Computes the softmax over the last axis; zeros where every logit is masked (see `mask_logits`)."""
    return joint_softmax(logits)[0]


def _sum(terms: Sequence[Array]) -> Array:
    return functools.reduce(operator.add, terms)


class PartialSoftmax(NamedTuple):
    """Softmax of each query over one group of keys, not normalised: `Σ exp(logit - top)`, `Σ exp(logit - top) v`."""

    top: Float[Array, '*queries 1']
    total: Float[Array, '*queries 1']
    values: Float[Array, '*queries d']

    def normalize(self) -> Float[Array, '*queries d']:
        """Returns the weighted mean of the values; zeros where every key was masked."""
        return self.values / jnp.where(self.total > 0, self.total, 1)


def partial_softmax(
    q: Float[Array, 'h m q d'],
    k: Float[Array, 'h m k d'],
    v: Float[Array, 'h m k d'],
    mask: Bool[Array, '... #q #k'] | None = None,
    drop: Drop | None = None,
) -> PartialSoftmax:
    """Attends to the keys of one group that `mask` allows; `drop` acts on the weights of the values."""
    return partial_softmax_of_logits(mask_logits(einsum('hmqd,hmkd->hmqk', q, k), mask), v, drop)


def partial_softmax_of_logits(
    logits: Float[Array, 'h m q k'], v: Float[Array, 'h m k d'], drop: Drop | None = None
) -> PartialSoftmax:
    """Computes `partial_softmax` for given logits."""
    top = max_logit(logits)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights if drop is None else drop(weights)
    return PartialSoftmax(top, total, einsum('hmqk,hmkd->hmqd', weights.astype(v.dtype), v))


def merge_partials(*groups: PartialSoftmax) -> PartialSoftmax:
    """Merges the partial softmaxes of several groups of keys into one over their union."""
    top = groups[0].top
    for group in groups[1:]:
        top = jnp.maximum(top, group.top)
    total, values = jnp.zeros_like(groups[0].total), jnp.zeros_like(groups[0].values)
    for group in groups:
        scale = jnp.exp(group.top - top)
        total, values = total + scale * group.total, values + scale * group.values
    return PartialSoftmax(top, total, values)


def merge_along(groups: PartialSoftmax, axis: int) -> PartialSoftmax:
    """Merges as `merge_partials` does, for groups that are stacked along an axis."""
    top = groups.top.max(axis=axis, keepdims=True)
    scale = jnp.exp(groups.top - top)
    total, values = ((scale * x).sum(axis=axis) for x in groups[1:])
    return PartialSoftmax(top.squeeze(axis), total, values)


def partial_softmax_one(
    q: Float[Array, 'h d'], k: Float[Array, 'h k d'], v: Float[Array, 'h k d'], mask: Bool[Array, ' k']
) -> PartialSoftmax:
    """Computes `partial_softmax` for one query of each head, as in decoding; the result is `h 1 1 d`."""
    return partial_softmax(q[:, None, None], k[:, None], v[:, None], mask[None, None])


def repeat_heads(x: Float[Array, 'b l g d'], heads: int) -> Float[Array, 'b l h d']:
    """Repeats each key (or value) head for `heads / g` consecutive query heads (grouped queries)."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)


def attend_full(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b m h d'],
    v: Float[Array, 'b m h d'],
    mask: Bool[Array, '#b #l m'] | None,
    *,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Computes `softmax(q·k/√d) v` (Vaswani et al. 2017), O(l·m) time and memory.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        mask: which keys each query attends to; a query that attends to no key gets zeros.
        drop: dropout of the weights.
    """
    logits = einsum('blhd,bmhd->bhlm', q * q.shape[-1] ** -0.5, k)
    (weights,), total = unnormalized_softmax(mask_logits(logits, None if mask is None else mask[:, None]), drop=drop)
    attended = einsum('bhlm,bmhd->bhld', weights.astype(v.dtype), v) / total
    return jnp.moveaxis(attended, 1, 2).astype(v.dtype)


def support_mask(
    length: int,
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
) -> Bool[Array, '#b #l l'] | None:
    """Returns which keys each query attends to: valid, of its own segment, and if causal not later; None for all."""
    masks = [None if valid is None else valid[:, None]]
    if causal:
        masks.append(jnp.tri(length, dtype=bool)[None])
    if segments is not None:
        masks.append(segments[:, :, None] == segments[:, None, :])
    masks = [mask for mask in masks if mask is not None]
    return functools.reduce(operator.and_, masks) if masks else None
