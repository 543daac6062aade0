"""Linformer: keys and values projected along the length to a few positions (Wang et al. 2020)."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from combiner.core.module import Attention
from combiner.core.registry import register
from combiner.layers import parameter, without_padding
from combiner.ops.blocks import Blocks, KeyGroup, attend_groups
from combiner.ops.softmax import Drop, einsum

BLOCK = 64  # positions of which a step takes a multiple


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
    """`softmax(q (Eᵀk)ᵀ/√d) Fᵀv` for every head (equation (7) of the paper), O(l·r·d) time, O(l·r) memory.

    Bidirectional only: a projected key mixes keys of all positions.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        of_keys: `E`, for each head or one for all. An input that is shorter uses the first rows, as if it were padded.
        of_values: `F`, likewise.
        valid: positions that are no padding, which do not take part; padding must hold finite numbers.
        drop: dropout of the weights.

    Raises:
        ValueError: the input is longer than the projections.
    """
    length = q.shape[1]
    if length > of_keys.shape[-2]:
        raise ValueError(f'length {length} is more than the projections hold; plan for it, not for {of_keys.shape[-2]}')

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
class LinformerAttention(Attention):
    """Linformer, bidirectional only.

    Its projections are as long as `max_length`, which is needed. They start as normal numbers of variance
    `1/max_length`, so that projected keys are no longer than keys: this project's choice. Sharing them among layers
    too, as the paper also tries, is not offered.

    Attributes:
        rank: to how many positions keys and values are projected, the paper's `k`.
        share_heads: whether the heads of a layer have the same projections (the paper's headwise sharing).
        share_values: whether values have the projection of keys (with the former, the paper's key-value sharing).
    """

    rank: int = 256
    share_heads: bool = True
    share_values: bool = True

    full_support = True
    has_pattern = False
    requires = 'projections along the length'
    supported_causal = (False,)

    def setup(self) -> None:
        """Makes the projections, those along the length too."""
        super().setup()
        if self.max_length is None:
            raise ValueError('LinformerAttention has parameters for each position: set max_length')
        self.of_keys = self._along_length('key_length_kernel')
        self.of_values = self.of_keys if self.share_values else self._along_length('value_length_kernel')

    def attend_from(self, x, q, k, v, **masks):
        del x
        return attend_linformer(q, k, v, self.of_keys, self.of_values, **masks)

    def _along_length(self, name: str) -> Array:
        axes, shape = ('positions', 'features'), (self.max_length or 0, self.rank)
        if not self.share_heads:
            axes, shape = ('heads', *axes), (self.heads, *shape)
        return parameter(self, name, nn.initializers.normal(shape[-2] ** -0.5), axes, shape)
