"""Mechanisms that route tokens to clusters, and the online k-means of their centroids (Roy et al. 2021).

Letters: `b` batch, `l` length, `h` head, `d` head width, `g` clusters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.core.mechanism import Mechanism
from combiner.costs import root_size
from combiner.layers import state


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


class Routed(Mechanism):
    """A mechanism with centroids: float32 `[h g d]`, variable `centroids` of collection `state`.

    A training step attends with the current centroids, then moves them: nothing of a sequence reaches its own output
    through them. They move only if `deterministic` is False, which needs `mutable=['state']`. With gradient
    accumulation they move at every micro-batch, and the next one attends with the moved centroids. The order is fixed,
    so training is reproducible, but a step in micro-batches is not quite the same as one of the whole batch.

    Attributes:
        clusters: number of clusters; None for the power of two nearest to `√max_length`.
        decay: fraction of a centroid that a step keeps (Roy et al.: 0.999).
    """

    clusters: int | None = None
    decay: float = 0.999

    input_dependent = True
    requires = 'centroids'

    def __post_init__(self) -> None:
        """Checks the fraction."""
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ValueError(f'{type(self).__name__}: decay={self.decay} is a fraction: set it from 0 to 1')

    @property
    def number(self) -> int:
        """Returns the number of clusters."""
        if self.clusters is None and self.max_length is None:
            raise ValueError(f'{type(self).__name__} makes its centroids before it sees a length: set clusters')
        return root_size(self.max_length or 1) if self.clusters is None else self.clusters

    def routing_heads(self, heads: int) -> int:
        """Returns the number of heads with centroids."""
        return heads

    def variables(self, module):
        """Makes the centroids, uniformly drawn unit vectors."""
        own = super().variables(module)
        shape = (self.routing_heads(module.heads), self.number, module.head_width)

        def draw() -> Float[Array, 'h g d']:
            return _unit(jax.random.normal(module.make_rng('params'), shape, jnp.float32))

        return own | {'centroids': state(module, 'centroids', draw, ('heads', 'features', 'head_dim'))}

    def update_state(self, q, k, context):
        """Moves the centroids."""
        held = self.own_variables(context)['centroids']
        return {'centroids': move_centroids(held, directions(q, k), context.valid, decay=self.decay)}
