"""Softmax attention: every position attends directly to its whole support."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner import patterns
from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.costs import triangle
from combiner.kernels.choice import Implementation
from combiner.kernels.libraries import (
    attend_by_library,
    attend_splash,
    on_shards,
    refuse_cudnn,
    refuse_dropout,
    refuse_splash,
)
from combiner.kernels.ring import attend_ring, refuse_ring
from combiner.ops.flash import attend_blockwise
from combiner.ops.softmax import Drop, attend_full, support_mask
from combiner.patterns import Cost, Pattern, sparse, support


def pattern(length: int, *, causal: bool) -> Pattern:
    """Returns the pattern of dense softmax attention: every position of the support directly."""
    return sparse(support(length, causal=causal))


def cost(length: int, *, causal: bool) -> Cost:
    """Returns `pattern(…).cost()` in closed form."""
    return Cost(triangle(length) if causal else length**2, 0)


def attend_dense(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Computes `softmax(q·k/√d) v` in O(l²) time and memory; the arguments are those of `core.mechanism`."""
    mask = support_mask(q.shape[1], causal=causal, valid=valid, segments=segments)
    return attend_full(q, k, v, mask, drop=drop)


def attend_in_loops(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    drop: Drop | None = None,
    **options: Any,
) -> Float[Array, 'b l h d']:
    """Computes the same in O(l) memory, on any platform; `drop` is None, as `refuse_dropout` makes sure."""
    del drop
    return attend_blockwise(q, k, v, **options)


class Cache(NamedTuple):
    """Keys and values of all positions so far."""

    k: Float[Array, 'b l h d']
    v: Float[Array, 'b l h d']


@register('full')
class Full(Mechanism):
    """Softmax attention, exact; `implementation` is a name of `kernels.choice`, None for the best on the platform.

    Dropout of weights takes the dense form, O(l²) memory.
    """

    implementation: str | None = None

    full_support = True
    supports_segments = True
    supports_context = True
    implementations = {  # noqa: RUF012
        'cudnn': Implementation(on_shards(attend_by_library), refuse_cudnn),
        'splash': Implementation(on_shards(attend_splash), refuse_splash),
        'blockwise': Implementation(attend_in_loops, refuse_dropout),
        'dense': Implementation(attend_dense),
        'ring': Implementation(attend_ring, refuse_ring, groups=True),
    }

    def pattern(self, length: int) -> patterns.Pattern:
        return pattern(length, causal=self.causal)

    def cost(self, length: int) -> patterns.Cost:
        return cost(length, causal=self.causal)

    def attend(self, q, k, v, context):
        return self.attend_by_best(q, k, v, context)

    def init_cache(self, q, k, v, context, counts, capacity):
        room = ((0, 0), (0, capacity - q.shape[1]), (0, 0), (0, 0))
        return Cache(jnp.pad(k, room), jnp.pad(v, room))

    def decode_step(self, cache, index, q, k, v, context):
        rows = jnp.arange(index.shape[0])
        cache = Cache(cache.k.at[rows, index].set(k), cache.v.at[rows, index].set(v))
        past = jnp.arange(cache.k.shape[1]) <= index[:, None, None]
        return cache, attend_full(q[:, None], *cache, past)[:, 0]
