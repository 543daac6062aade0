"""Linear attention: weights that are products of positive features (Katharopoulos et al. 2020)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from combiner.core.kernelized import Kernelized
from combiner.core.registry import register
from combiner.ops.linear import Kernel


def elu_plus_one(x: Float[Array, '*n d']) -> tuple[Float[Array, '*n d'], Float[Array, '*n']]:
    """Returns `φ(x) = elu(x) + 1` over `exp(s)`, and `s = min(0, max_d x_d)`: some feature then is at least one."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    log = lax.stop_gradient(jnp.minimum(x.max(axis=-1), 0))
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0) - log[..., None])), log


@register('linear')
class Linear(Kernelized):
    """Linear attention (sections 3.2 and 3.3 of the paper), with the features `φ(x) = elu(x) + 1`.

        out_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)        causal: j ≤ i

    Queries and keys are not scaled, as published. O(l·d²) time; causal, in chunks of `chunk` positions, O(l·d·(d +
    chunk)). Decoding keeps the two sums, O(d²) at any length. The authors' code adds 10⁻⁶ to the denominator; here a
    query that attends to no key gets zeros.
    """

    allows_value_width = False  # elu(0) + 1 is not zero

    def kernel_of(self, width, context):
        del context
        return Kernel(width, lambda q: elu_plus_one(q)[0], elu_plus_one)
