"""One softmax over several groups of logits, without concatenating them (Combiner, equation (9))."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Drop = Callable[[Array], Array]


def dot(equation: str, *operands: Array) -> Array:
    """An einsum that accumulates in float32 at least, as logits and the sums of a softmax need it."""
    accumulator = jnp.promote_types(jnp.result_type(*operands), jnp.float32)
    return jnp.einsum(equation, *operands, preferred_element_type=accumulator)


def roomy(dtype: Any) -> Any:
    """The type for numbers that are not bounded by those they are made from: `dtype`, or float32 if that holds more.

    Features, sums and norms need the range of float32, which bfloat16 has and float16 has not.
    """
    return dtype if jnp.finfo(dtype).maxexp >= jnp.finfo(jnp.float32).maxexp else jnp.float32


def masked(logits: Float[Array, '*logits'], mask: Bool[Array, '...'] | None) -> Float[Array, '*logits']:
    """Logits, the most negative finite number where `mask` is False: infinities would make gradients NaN."""
    return logits if mask is None else jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def joint_exp(*logits: Float[Array, '...'], drop: Drop | None = None) -> tuple[list[Array], Array]:
    """Unnormalised weights of a softmax over the last axes of all groups together, and what to divide by.

        Z = Σ_groups Σ_last exp(logit - top)          top = the maximum over all groups

    The division is left to the caller: it is cheaper on the weighted sum of values than on the weights. Where
    every logit is masked (see `masked`), the weights are zero and the divisor is one: zeros come out, and a
    zero gradient.

    Args:
        *logits: groups of logits, equal but for their last axis.
        drop: applied to the weights, not to the divisor (dropout).

    Returns:
        The weights of each group, and the divisor with a last axis of one.
    """
    top = highest(*logits)
    weights = [jnp.exp(group - top) for group in logits]
    total = _sum([group.sum(axis=-1, keepdims=True) for group in weights])
    if drop is not None:
        weights = [drop(group) for group in weights]
    return weights, jnp.where(total > 0, total, 1)


def highest(*logits: Float[Array, '...']) -> Float[Array, '*queries 1']:
    """The greatest logit over the last axes of all groups, without gradient: it cancels out of a softmax.

    Where every logit is masked it is half of the lowest number, so that `exp(logit - highest)` is exactly zero there.
    """
    tops = [group.max(axis=-1, keepdims=True) for group in logits]
    top = functools.reduce(jnp.maximum, tops)
    return jax.lax.stop_gradient(jnp.maximum(top, jnp.finfo(top.dtype).min / 2))


@jax.custom_jvp
def joint_softmax(*logits: Float[Array, '...']) -> list[Array]:
    """The weights of a softmax over the last axes of all groups, divided: `joint_exp` where the divisor is in the way.

    Its derivative is written in the weights, `p·(dx - Σ p·dx)`. That of the quotient goes through the sums as well: on
    a CPU it took `combiner_axial_rowmajor` 70 ms forward and backward where this takes 53 ms.
    """
    weights, total = joint_exp(*logits)
    return [group / total for group in weights]


@joint_softmax.defjvp
def _joint_softmax_tangents(logits, tangents):
    weights = joint_softmax(*logits)
    mean = _sum([(group * change).sum(axis=-1, keepdims=True) for group, change in zip(weights, tangents, strict=True)])
    return weights, [group * (change - mean) for group, change in zip(weights, tangents, strict=True)]


def softmax(logits: Float[Array, '*logits']) -> Float[Array, '*logits']:
    """Softmax over the last axis; zeros where every logit is masked (see `masked`)."""
    return joint_softmax(logits)[0]


def _sum(terms: Sequence[Array]) -> Array:
    return functools.reduce(operator.add, terms)
