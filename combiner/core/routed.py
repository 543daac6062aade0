"""The module around mechanisms that route tokens to clusters: it owns the centroids.

Letters: `b` batch, `l` length, `h` head, `d` head width, `g` clusters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from combiner.core.module import Attention
from combiner.costs import root_size
from combiner.layers import STATE
from combiner.ops.kmeans import _unit, directions, move_centroids


class Routed(Attention):
    """A mechanism that owns centroids: float32 `[h g d]`, variable `centroids` of collection `state`.

    A training step attends with the centroids as they are, then moves them: nothing of a sequence reaches its own
    output through them. They move only where `deterministic` is False, which needs `mutable=['state']`. With gradient
    accumulation they move at every micro-batch, and the next one attends with them so moved: always in the same order,
    so that training is reproducible, but a step in micro-batches is not quite that of the whole batch.

    Attributes:
        clusters: how many; None for the power of two nearest to `√max_length`.
        decay: how much of a centroid stays in a step (Roy et al.: 0.999).
    """

    clusters: int | None = None
    decay: float = 0.999

    input_dependent = True
    requires = 'centroids'

    @property
    def number(self) -> int:
        """How many clusters there are."""
        if self.clusters is None and self.max_length is None:
            raise ValueError(f'{type(self).__name__} makes its centroids before it sees a length: set clusters')
        return root_size(self.max_length or 1) if self.clusters is None else self.clusters

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

    def update_state(self, q, k, *, valid=None):
        if not self.is_initializing():
            self.centroids.value = move_centroids(self.centroids.value, directions(q, k), valid, decay=self.decay)

    def attend(self, q, k, v, **masks):
        return Attention.attend(self, q, k, v, **masks)  # refuses, where another base class may not
