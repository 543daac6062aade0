"""Clusters of tokens by online k-means, for mechanisms that route (Roy et al. 2021).

Letters: `b` batch, `l` length, `h` head, `d` head width, `g` clusters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def directions(q: Float[Array, 'b l h d'], k: Float[Array, 'b l h d']) -> Float[Array, 'b l h d']:
    """Returns the vectors by which tokens are clustered, `x = unit(unit(q) + unit(k))`, in float32, without gradient.

    Roy et al. share queries and keys in a causal model; where they differ, this direction is the nearest to both. It
    depends on the token at its position alone.
    """
    return _unit(_unit(q) + _unit(k))


def nearest_centroid(tokens: Float[Array, 'b l h d'], centroids: Float[Array, 'h g d']) -> Int[Array, 'b l h']:
    """Returns the cluster of each token, `argmax_g x·μ_g`, the first of equal ones.

    At the highest precision, so that the cluster of a token does not depend on the length of the input.
    """
    return similarity(tokens, centroids).argmax(axis=-1)


def similarity(tokens: Float[Array, 'b l h d'], centroids: Float[Array, 'h g d']) -> Float[Array, 'b l h g']:
    """Returns the cosine `x·μ_g` of every token and centroid."""
    return jnp.einsum('blhd,hgd->blhg', tokens, centroids, precision='highest')


def move_centroids(
    centroids: Float[Array, 'h g d'],
    tokens: Float[Array, 'b l h d'],
    valid: Bool[Array, 'b l'] | None = None,
    *,
    decay: float,
) -> Float[Array, 'h g d']:
    """Takes one step of spherical mini-batch k-means: `μ_g ← unit(decay · μ_g + (1 - decay) · mean x)`.

    The mean is over the `x` nearest to `μ_g` in the whole batch, all devices together. A centroid without tokens stays.
    """
    own = jax.nn.one_hot(nearest_centroid(tokens, centroids), centroids.shape[1])
    if valid is not None:
        own = own * valid[:, :, None, None]
    total, count = jnp.einsum('blhg,blhd->hgd', own, tokens), own.sum(axis=(0, 1))[..., None]
    step = _unit(decay * centroids + (1 - decay) * total / jnp.maximum(count, 1))
    return jnp.where(count > 0, step, centroids)


def _unit(x: Float[Array, '*n d']) -> Float[Array, '*n d']:
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
