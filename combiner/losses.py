"""Losses: pure functions of a model's output and its targets."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int


def token_nats(logits: Float[Array, 'b l v'], tokens: Int[Array, 'b l']) -> Float32[Array, 'b l']:
    """−log p(token) of every token, in nats, computed in float32 whatever the dtype of `logits`.

    Logit [b, l] predicts token [b, l] itself: the model shifts its input, not its output.
    Dividing by ln 2 gives bits; for an image a token is one dimension, so bits/dim.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens)
