"""Clusters of tokens by online k-means, for mechanisms that route (Roy et al. 2021).

Letters: `b` batch, `l` length, `h` head, `d` head width, `g` clusters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from combiner.attention.base import Attention
from combiner.costs import root_size
from combiner.layers import STATE


def directions(q: Float[Array, 'b l h d'], k: Float[Array, 'b l h d']) -> Float[Array, 'b l h d']:
    """What a token is clustered by: `x = unit(unit(q) + unit(k))`, in float32 and without a gradient.

    Roy et al. share queries and keys in a causal model; where they differ, this direction is the nearest to both. It
    depends on the token at its position alone.
    """
    return _unit(_unit(q) + _unit(k))


def nearest(tokens: Float[Array, 'b l h d'], centroids: Float[Array, 'h g d']) -> Int[Array, 'b l h']:
    """The cluster of each token, `argmax_g x·μ_g`, the first of equal ones.

    At the highest precision, so that a token does not change its cluster with the length it is computed at.
    """
    return similarity(tokens, centroids).argmax(axis=-1)


def similarity(tokens: Float[Array, 'b l h d'], centroids: Float[Array, 'h g d']) -> Float[Array, 'b l h g']:
    """The cosine `x·μ_g` of every token and centroid."""
    return jnp.einsum('blhd,hgd->blhg', tokens, centroids, precision='highest')


def moved(
    centroids: Float[Array, 'h g d'],
    tokens: Float[Array, 'b l h d'],
    valid: Bool[Array, 'b l'] | None = None,
    *,
    decay: float,
) -> Float[Array, 'h g d']:
    """One step of spherical mini-batch k-means: `μ_g ← unit(decay · μ_g + (1 - decay) · mean of the x nearest to μ_g)`.

    The mean is over the whole batch, all devices together. A centroid without tokens stays where it is.
    """
    own = jax.nn.one_hot(nearest(tokens, centroids), centroids.shape[1])
    if valid is not None:
        own = own * valid[:, :, None, None]
    total, count = jnp.einsum('blhg,blhd->hgd', own, tokens), own.sum(axis=(0, 1))[..., None]
    step = _unit(decay * centroids + (1 - decay) * total / jnp.maximum(count, 1))
    return jnp.where(count > 0, step, centroids)


class Routed(Attention):
    """A mechanism that owns centroids: float32 `[h g d]`, variable `centroids` of collection `state`.

    A training step attends with the centroids as they are, then moves them: nothing of a sequence reaches its own
    output through them. They move only where `deterministic` is False, which needs `mutable=['state']`. With gradient
    accumulation they move at every micro-batch, and the next one attends with them so moved: always in the same order,
    so that training is reproducible, but a step in micro-batches is not quite that of the whole batch.

    Attributes:
        clusters: how many; None for the power of two nearest to `√planned_length`.
        decay: how much of a centroid stays in a step (Roy et al.: 0.999).
    """

    clusters: int | None = None
    decay: float = 0.999

    by_content = True
    owns = 'centroids'

    @property
    def number(self) -> int:
        """How many clusters there are."""
        if self.clusters is None and self.planned_length is None:
            raise ValueError(f'{type(self).__name__} makes its centroids before it sees a length: set clusters')
        return root_size(self.planned_length or 1) if self.clusters is None else self.clusters

    @property
    def routing_heads(self) -> int:
        """How many heads have centroids."""
        return self.heads

    def setup(self) -> None:
        """Makes the projections and the centroids, unit vectors drawn evenly."""
        super().setup()
        shape = (self.routing_heads, self.number, self.head_width)

        def init() -> Any:
            names = ('heads', 'features', 'head_dim')
            draw = nn.with_logical_partitioning(lambda key: _unit(jax.random.normal(key, shape, jnp.float32)), names)
            return draw(self.make_rng('params'))

        self.centroids = self.variable(STATE, 'centroids', init)

    def observe(self, q, k, *, valid=None):
        if not self.is_initializing():
            self.centroids.value = moved(self.centroids.value, directions(q, k), valid, decay=self.decay)

    def attend(self, q, k, v, **masks):
        return Attention.attend(self, q, k, v, **masks)  # refuses, where another base class may not


def _unit(x: Float[Array, '*n d']) -> Float[Array, '*n d']:
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
