"""Losses: pure functions of a model's output and its targets."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int


def target_nats(logits: Float[Array, '*b v'], targets: Int[Array, '*b']) -> Float32[Array, '*b']:
    """Computes −log p(target) of every target, in nats and float32, for any dtype of `logits`.

    A target is a token or a class. Logits [b, l] of a language model predict token [b, l] itself: the model shifts
    its input, not its output. Divide by ln 2 for bits; a token of an image is one dimension, so these are bits/dim.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def hits(logits: Float[Array, '*b v'], targets: Int[Array, '*b']) -> Float32[Array, '*b']:
    """Returns 1 where the target has the largest logit (of equal logits: the first), else 0."""
    return (logits.argmax(axis=-1) == targets).astype(jnp.float32)
