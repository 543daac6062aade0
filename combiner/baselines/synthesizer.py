"""Synthesizer: attention weights without products of queries and keys (Tay et al. 2021)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.layers import parameters
from combiner.ops.blocks import Blocks
from combiner.ops.softmax import Drop, einsum, mask_logits, softmax, unnormalized_softmax

VARIANTS = ('dense', 'random', 'factorised_random')
ROWS_LOGITS = 2**24  # of the rows computed at once: 64 MiB of float32


def attend_rows(
    scores: Callable[[Array, Array], Array],
    x: Float[Array, 'b l e'],
    v: Float[Array, 'b l h d'],
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Returns `softmax(B) v`, `B = scores(x)`, O(l²) time; some rows of `B` at a time, O(l) memory. With dropout O(l²).

    Args:
        scores: of some rows, `(x [b r e], their positions [r]) -> [b|1 h r l]`, in float32.
        x: input of `scores`.
        v, causal, valid, drop: see `core.mechanism`.
    """
    batch, length, heads, _ = v.shape
    rows = length if drop else min(length, max(1, ROWS_LOGITS // (batch * heads * length)))

    blocks = Blocks.of(v, rows, drop)

    def attend(x: Float[Array, 'b r e'], positions: Int[Array, 'b r']) -> Float[Array, 'b r h d']:
        """Returns the attended values of some positions, the same of every sequence."""
        logits = scores(x, positions[0])
        logits = jnp.broadcast_to(logits, (batch, *logits.shape[1:]))
        if causal:
            logits = mask_logits(logits, jnp.arange(length) <= positions[0][:, None])
        if valid is not None:
            logits = mask_logits(logits, valid[:, None, None])
        (weights,), total = unnormalized_softmax(logits, drop=drop)
        attended = einsum('bhrm,bmhd->bhrd', weights.astype(v.dtype), v) / total
        return jnp.moveaxis(attended, 1, 2).astype(v.dtype)

    positions = jnp.tile(jnp.arange(blocks.count * rows).reshape(-1, rows), (batch, 1))
    return blocks.join(blocks.map_blocks_first(attend, blocks.split(x), positions, keys=None))


def attend_one_row(
    scores: Callable[[Array, Array], Array], x: Float[Array, ' e'], index: Int[Array, ''], v: Float[Array, 'l h d']
) -> Float[Array, 'h d']:
    """Attends as `attend_rows` does, from one position of one sequence to all up to it."""
    logits = scores(x[None, None], index[None])[0, :, 0]
    weights = softmax(mask_logits(logits, jnp.arange(len(v)) <= index))
    return einsum('hm,mhd->hd', weights.astype(v.dtype), v).astype(v.dtype)


@register('synthesizer')
class Synthesizer(Mechanism):
    """Synthesizer: `softmax(B) v`, where scores `B [l l]` are no products of queries and keys. O(l²) by definition.

        dense              B_i = W₂ relu(W₁ x_i + b₁) + b₂, the hidden layer as wide as a head
        random             B = R, a parameter
        factorised_random  B = R₁ R₂ᵀ, of rank `rank`

    Every head has its own `B`, of the whole input. There are no queries and keys, and so no projections of them. Only
    some rows of `B` are in memory, so that long inputs fit, except for `random`, whose parameters alone are 8.6 GB for
    8 heads at a length of 16,384. Parameters are as long as `max_length`, which is required; a shorter input uses their
    beginnings. Random scores start as standard normal numbers, in products approximately: this project's choice.

    Attributes:
        variant: the kind of scores.
        rank: of factorised scores, the paper's `k`.
    """

    variant: Annotated[str, VARIANTS] = 'dense'
    rank: int = 8

    full_support = True
    requires = 'the parameters of its scores'
    projections = ('value', 'value', 'value')

    def variables(self, module):
        """Makes the parameters of the scores."""
        if self.max_length is None:
            raise ValueError('Synthesizer has parameters for each position: set max_length')
        at, heads, hidden = ('positions', self.max_length), ('heads', module.heads), ('features', module.head_width)
        if self.variant == 'dense':
            init, zeros = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0), nn.initializers.zeros
            made = {
                'hidden_kernel': (init, (heads, ('embed', module.width), hidden)),
                'hidden_bias': (zeros, (heads, hidden)),
                'score_kernel': (init, (heads, hidden, at)),
                'score_bias': (zeros, (heads, at)),
            }
        elif self.variant == 'random':
            made = {'random': (nn.initializers.normal(1.0), (heads, at, ('length', self.max_length)))}
        else:
            factor = nn.initializers.normal(self.rank**-0.25), (heads, at, ('features', self.rank))
            made = {'row_factor': factor, 'column_factor': factor}
        return parameters(module, made)

    def scores(
        self, x: Float[Array, 'b r e'], position: Int[Array, ' r'], own: Mapping[str, Array], length: int
    ) -> Float[Array, '#b h r l']:
        """Returns the scores of some rows for the first `length` columns."""
        if length > (self.max_length or 0):
            raise ValueError(
                f'length {length} is more than the parameters hold, max_length={self.max_length}; set max_length to '
                'the longest input, or shorten the input'
            )
        if self.variant == 'dense':
            hidden = jax.nn.relu(einsum('bre,hef->bhrf', x, own['hidden_kernel']) + own['hidden_bias'][:, None])
            scores = einsum('bhrf,hfl->bhrl', hidden, own['score_kernel'][:, :, :length])
            return scores + own['score_bias'][:, None, :length]
        rows = jnp.take(own['random' if self.variant == 'random' else 'row_factor'], position, axis=1, mode='clip')
        if self.variant == 'random':
            return rows[None, ..., :length]
        return einsum('hrk,hlk->hrl', rows, own['column_factor'][:, :length])[None]

    def attend(self, q, k, v, context):
        scores = partial(self.scores, own=self.own_variables(context), length=v.shape[1])
        return attend_rows(scores, context.x, v, causal=self.causal, valid=context.valid, drop=context.drop)

    def init_cache(self, q, k, v, context, counts, capacity):
        return jnp.pad(v, ((0, 0), (0, capacity - v.shape[1]), (0, 0), (0, 0)))

    def decode_step(self, cache, index, q, k, v, context):
        cache = cache.at[jnp.arange(len(index)), index].set(v)
        scores = partial(self.scores, own=self.own_variables(context), length=cache.shape[1])
        return cache, jax.vmap(partial(attend_one_row, scores))(context.x, index, cache)
