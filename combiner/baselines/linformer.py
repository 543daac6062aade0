"""Linformer: keys and values projected along the length to a few positions (Wang et al. 2020)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from combiner.core.mechanism import Mechanism
from combiner.core.registry import register
from combiner.layers import parameters
from combiner.ops.blocks import Blocks, KeyGroup, attend_groups
from combiner.ops.segments import without_padding
from combiner.ops.softmax import Drop, einsum

BLOCK = 64  # positions of a step are a multiple of it


def attend_linformer(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    of_keys: Float[Array, '... n r'],
    of_values: Float[Array, '... n r'],
    *,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Computes `softmax(q (Eᵀk)ᵀ/√d) Fᵀv` for every head (equation (7) of the paper), O(l·r·d) time, O(l·r) memory.

    Bidirectional only: a projected key mixes keys of all positions.

    Args:
        of_keys: `E`, for each head or one for all. A shorter input uses the first rows, as if it were padded.
        of_values: `F`, likewise.
        q, k, v, valid, drop: see `core.mechanism`.

    Raises:
        ValueError: the input is longer than the projections.
    """
    length = q.shape[1]
    if length > of_keys.shape[-2]:
        raise ValueError(
            f'length {length} is more than the projections hold, max_length={of_keys.shape[-2]}; set max_length to the '
            'longest input, or shorten the input'
        )

    def project(x: Array, by: Array) -> Array:
        equation = 'blhd,lr->brhd' if by.ndim == 2 else 'blhd,hlr->brhd'
        # In the type of the parameters: XLA has no such product of bfloat16 on a CPU.
        return einsum(equation, without_padding(x, valid), by[..., :length, :]).astype(x.dtype)

    projected = KeyGroup(*(jnp.moveaxis(project(x, by), 2, 0) for x, by in ((k, of_keys), (v, of_values))))
    blocks = Blocks.of(q, min(BLOCK, length), drop)

    def attend(q: Float[Array, 'h m c d']) -> Float[Array, 'h m c d']:
        return attend_groups(q, [projected], drop=drop)

    return blocks.attend(attend, blocks.split(q), keys=of_keys.shape[-1])


@register('linformer')
class Linformer(Mechanism):
    """Linformer, bidirectional only.

    Its projections are as long as `max_length`, which is required. Their initial values are normal numbers of variance
    `1/max_length`, so that projected keys are no longer than keys: this project's choice. Sharing among layers, which
    the paper also tries, is not offered.

    Attributes:
        rank: number of positions to which keys and values are projected, the paper's `k`.
        share_heads: whether the heads of a layer have the same projections (the paper's headwise sharing).
        share_values: whether values have the projection of keys (with `share_heads`, the paper's key-value sharing).
    """

    rank: int = 256
    share_heads: bool = True
    share_values: bool = True

    full_support = True
    requires = 'projections along the length'
    supported_causal = (False,)

    def variables(self, module):
        """Makes the projections along the length."""
        if self.max_length is None:
            raise ValueError('Linformer has parameters for each position: set max_length')
        by_head = () if self.share_heads else (('heads', module.heads),)
        axes = *by_head, ('positions', self.max_length), ('features', self.rank)
        roles = ('key',) if self.share_values else ('key', 'value')
        init = nn.initializers.normal(self.max_length**-0.5)
        return parameters(module, {f'{role}_length_kernel': (init, axes) for role in roles})

    def attend(self, q, k, v, context):
        own = self.own_variables(context)
        of_keys = own['key_length_kernel']
        of_values = own.get('value_length_kernel', of_keys)
        return attend_linformer(q, k, v, of_keys, of_values, valid=context.valid, drop=context.drop)
