"""Mechanisms that route tokens to clusters: their centroids.

Letters: `b` batch, `l` length, `h` head, `d` head width, `g` clusters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from combiner.core.mechanism import Mechanism
from combiner.costs import root_size
from combiner.layers import state
from combiner.ops.kmeans import _unit, directions, move_centroids


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
