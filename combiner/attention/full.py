"""Softmax attention, which every other mechanism approximates."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from combiner import patterns
from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.costs import triangle
from combiner.ops.backends import attend_by_library, attend_splash, choose
from combiner.ops.flash import attend_blockwise
from combiner.ops.softmax import attend_full, support_mask
from combiner.patterns import Cost, Pattern, sparse, support


def pattern(length: int, *, causal: bool) -> Pattern:
    """Returns the pattern of dense softmax attention: every position of the support directly."""
    return sparse(support(length, causal=causal))


def cost(length: int, *, causal: bool) -> Cost:
    """Returns `pattern(…).cost()` in closed form."""
    return Cost(triangle(length) if causal else length**2, 0)


IN_LINEAR_MEMORY = {'blockwise': attend_blockwise, 'cudnn': attend_by_library, 'splash': attend_splash}


class Cache(NamedTuple):
    """Keys and values of all positions so far."""

    k: Float[Array, 'b l h d']
    v: Float[Array, 'b l h d']


@register('full')
class Full(Mechanism):
    """Softmax attention, exact; `implementation` is a name of `ops.backends`, None for the best on the platform.

    Dropout of weights takes the dense form, O(l²) memory.
    """

    implementation: str | None = None

    full_support = True
    supports_segments = True

    def pattern(self, length: int) -> patterns.Pattern:
        return pattern(length, causal=self.causal)

    def cost(self, length: int) -> patterns.Cost:
        return cost(length, causal=self.causal)

    def attend(self, q, k, v, context):
        valid, segments = context.valid, context.segments
        chosen = choose(self.implementation, q, dropping=context.drop is not None)
        if chosen == 'dense':
            mask = support_mask(q.shape[1], causal=self.causal, valid=valid, segments=segments)
            return attend_full(q, k, v, mask, drop=context.drop)
        return IN_LINEAR_MEMORY[chosen](q, k, v, causal=self.causal, valid=valid, segments=segments)

    def init_cache(self, q, k, v, context, counts, capacity):
        room = ((0, 0), (0, capacity - q.shape[1]), (0, 0), (0, 0))
        return Cache(jnp.pad(k, room), jnp.pad(v, room))

    def decode_step(self, cache, index, q, k, v, context):
        rows = jnp.arange(index.shape[0])
        cache = Cache(cache.k.at[rows, index].set(k), cache.v.at[rows, index].set(v))
        past = jnp.arange(cache.k.shape[1]) <= index[:, None, None]
        return cache, attend_full(q[:, None], *cache, past)[:, 0]
