"""Synthesizer: attention weights without products of queries and keys (Tay et al. 2021)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from combiner.core.module import Attention
from combiner.core.registry import register
from combiner.layers import parameter
from combiner.ops.chunking import Chunks, map_chunks
from combiner.ops.softmax import Drop, einsum, mask_logits, softmax, unnormalized_softmax

VARIANTS = ('dense', 'random', 'factorised_random')
ROWS_LOGITS = 2**24  # of the rows that are computed at once: 64 MiB of float32


def attend_rows(
    scores: Callable[[Array, Array], Array],
    x: Float[Array, 'b l e'],
    v: Float[Array, 'b l h d'],
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """`softmax(B) v`, `B = scores(x)`, O(l²) time; some rows of `B` at a time, O(l) memory. With dropout all, O(l²).

    Args:
        scores: of some rows, `(x [b r e], their positions [r]) -> [b|1 h r l]`, in float32.
        x: what scores may be made from.
        v: values.
        causal: whether a position sees only itself and what is before it.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the weights.
    """
    batch, length, heads, _ = v.shape
    rows = length if drop else min(length, max(1, ROWS_LOGITS // (batch * heads * length)))

    def attend(x: Array, position: Array) -> Array:
        """The attended values of some positions, the same of every sequence."""
        position = position.reshape(batch, -1)[0]
        logits = scores(x.reshape(batch, len(position), -1), position)
        logits = jnp.broadcast_to(logits, (batch, *logits.shape[1:]))
        if causal:
            logits = mask_logits(logits, jnp.arange(length) <= position[:, None])
        if valid is not None:
            logits = mask_logits(logits, valid[:, None, None])
        (weights,), total = unnormalized_softmax(logits, drop=drop)
        attended = einsum('bhrm,bmhd->bhrd', weights.astype(v.dtype), v) / total
        return jnp.moveaxis(attended, 1, 2).reshape(-1, *v.shape[2:]).astype(v.dtype)

    blocks = -(-length // rows)
    flat = jnp.pad(x, ((0, 0), (0, blocks * rows - length), (0, 0))).reshape(-1, x.shape[-1])
    attended = map_chunks(attend, Chunks(blocks, 1), batch, flat, jnp.tile(jnp.arange(blocks * rows), batch))
    return attended.reshape(batch, -1, *v.shape[2:])[:, :length]


@register('synthesizer')
class SynthesizerAttention(Attention):
    """Synthesizer: `softmax(B) v`, where scores `B [l l]` are no products of queries and keys. O(l²) by definition.

        dense              B_i = W₂ relu(W₁ x_i + b₁) + b₂, the hidden layer as wide as a head
        random             B = R, a parameter
        factorised_random  B = R₁ R₂ᵀ, of rank `rank`

    Every head has its own, of the whole input. There are no queries and keys, and so no projections of them. What is in
    memory are some rows of `B` at a time, so that long inputs fit but for `random`, whose parameters alone are 8.6 GB
    for 8 heads at a length of 16,384. Parameters are as long as `max_length`, which is needed; a shorter input uses
    their beginnings. Random scores start as standard normal numbers, in products approximately: this project's choice.

    Attributes:
        variant: which of them.
        rank: of factorised scores, the paper's `k`.
    """

    variant: str = 'dense'
    rank: int = 8

    full_support = True
    has_pattern = False
    requires = 'the parameters of its scores'
    projected = ('value', 'value', 'value')

    def setup(self) -> None:
        """Makes the projections, and what scores are made from."""
        super().setup()
        if self.max_length is None:
            raise ValueError('SynthesizerAttention has parameters for each position: set max_length')
        if self.variant not in VARIANTS:
            raise ValueError(f'unknown variant {self.variant!r}; choose {", ".join(VARIANTS)}')
        length, hidden = self.max_length, self.head_width

        def made(name: str, init: Any, *sizes: tuple[str, int]) -> Array:
            return parameter(self, name, init, *zip(('heads', self.heads), *sizes, strict=True))

        at, features = ('positions', length), ('features', self.rank)
        if self.variant == 'dense':
            init, zeros = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0), nn.initializers.zeros
            inner = ('features', hidden)
            self.hidden_kernel = made('hidden_kernel', init, ('embed', self.width), inner)
            self.hidden_bias = made('hidden_bias', zeros, inner)
            self.score_kernel = made('score_kernel', init, inner, at)
            self.score_bias = made('score_bias', zeros, at)
        elif self.variant == 'random':
            self.random = made('random', nn.initializers.normal(1.0), at, ('length', length))
        else:
            init = nn.initializers.normal(self.rank**-0.25)
            self.row_factor, self.column_factor = (made(f'{n}_factor', init, at, features) for n in ('row', 'column'))

    def scores(self, x: Float[Array, 'b r e'], position: Int[Array, ' r'], length: int) -> Float[Array, '#b h r l']:
        """Scores of some rows for the first `length` columns."""
        if length > (self.max_length or 0):
            raise ValueError(f'length {length} is more than the parameters hold, max_length={self.max_length}')
        if self.variant == 'dense':
            hidden = jax.nn.relu(einsum('bre,hef->bhrf', x, self.hidden_kernel) + self.hidden_bias[:, None])
            return (
                einsum('bhrf,hfl->bhrl', hidden, self.score_kernel[:, :, :length]) + self.score_bias[:, None, :length]
            )
        own = jnp.take(self.random if self.variant == 'random' else self.row_factor, position, axis=1, mode='clip')
        if self.variant == 'random':
            return own[None, ..., :length]
        return einsum('hrk,hlk->hrl', own, self.column_factor[:, :length])[None]

    def attend_from(self, x, q, k, v, **masks):
        del q, k
        return attend_rows(partial(self.scores, length=x.shape[1]), x, v, causal=self.causal, **masks)

    def init_cache(self, x, q, k, v, counts, capacity):
        return jnp.pad(v, ((0, 0), (0, capacity - x.shape[1]), (0, 0), (0, 0)))

    def decode_step(self, cache, index, x, q, k, v):
        cache = cache.at[jnp.arange(len(index)), index].set(v)
        return cache, jax.vmap(self._attend_one)(x, index, cache)

    def _attend_one(
        self, x: Float[Array, ' e'], index: Int[Array, ''], v: Float[Array, 'l h d']
    ) -> Float[Array, 'h d']:
        logits = self.scores(x[None, None], index[None], len(v))[0, :, 0]
        weights = softmax(mask_logits(logits, jnp.arange(len(v)) <= index))
        return einsum('hm,mhd->hd', weights.astype(v.dtype), v).astype(v.dtype)
