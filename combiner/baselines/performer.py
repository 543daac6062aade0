"""Performer: attention through random features of the softmax kernel, FAVOR+ (Choromanski et al. 2021)."""

import math
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from combiner.core.kernelized import Kernelized
from combiner.core.mechanism import Count
from combiner.core.registry import register
from combiner.layers import state
from combiner.ops.linear import Kernel
from combiner.ops.softmax import einsum

KERNELS = ('softmax', 'relu')
RELU_FLOOR = 1e-3  # of the authors' code: so no query has only zero weights


def orthogonal(key: PRNGKeyArray, size: int, width: int) -> Float[Array, 'f d']:
    """Draws directions of random features: `size` standard normal vectors, orthogonal in blocks of `width`.

    Each alone is a standard normal vector, so that the estimate of the kernel has no bias.
    """
    turn, stretch = jax.random.split(key)
    square, upper = jnp.linalg.qr(jax.random.normal(turn, (-(-size // width), width, width), jnp.float32))
    even = square * jnp.sign(jnp.diagonal(upper, axis1=1, axis2=2))[:, None]  # all rotations equally likely
    lengths = jnp.linalg.norm(jax.random.normal(stretch, (size, width), jnp.float32), axis=1, keepdims=True)
    return even.reshape(-1, width)[:size] * lengths


def softmax_kernel(directions: Float[Array, 'f d']) -> Kernel:
    """Returns `E φ(q)·φ(k) = exp(q·k/√d)`, with `φ(x) = exp(w_f·x' - |x'|²/2) / √f` and `x' = x/d^¼` (paper, lemma 1).

    Up to `exp(s)`, the factor of a key, and a factor of each query.
    """

    def along(x: Array) -> tuple[Array, Array]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * x.shape[-1] ** -0.25
        return einsum('...d,fd->...f', x, directions.astype(x.dtype)), (x**2).sum(axis=-1, keepdims=True) / 2

    def query(q: Array) -> Array:
        exponents, _ = along(q)
        return jnp.exp(exponents - lax.stop_gradient(exponents.max(axis=-1, keepdims=True)))

    def key(k: Array) -> tuple[Array, Array]:
        exponents, half_square = along(k)
        top = lax.stop_gradient(exponents.max(axis=-1, keepdims=True))
        # The difference is zero and exact where half the square is great, and has its derivative.
        features = jnp.exp(exponents - top - (half_square - lax.stop_gradient(half_square)))
        return features, (top - half_square)[..., 0]

    return Kernel(len(directions), query, key)


def relu_kernel(directions: Float[Array, 'f d']) -> Kernel:
    """Returns `φ(x) = (relu(w_f·x') + 0.001) / √f`, `x' = x/d^¼`: generalised attention, up to a constant factor."""

    def features(x: Array) -> Array:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * x.shape[-1] ** -0.25
        return jax.nn.relu(einsum('...d,fd->...f', x, directions.astype(x.dtype))) + RELU_FLOOR

    def key(k: Array) -> tuple[Array, Array]:
        found = features(k)
        return found, jnp.zeros(found.shape[:-1], found.dtype)

    return Kernel(len(directions), features, key)


@register('performer')
class Performer(Kernelized):
    """FAVOR+: softmax attention with its weights estimated by positive orthogonal random features, O(l·f·d).

        out_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)        causal: j ≤ i

    A module keeps its directions `w [f d]` in the collection `state`, one set for all heads as in the authors' code.
    Each layer has its own. With `redraw`, it draws new ones once in so many training steps (of micro-batches, where
    gradients are accumulated) from a key and a count, which are variables: training is reproducible, also continued.
    They are drawn one step after each multiple of `redraw`: validation and the last step come at round numbers, and a
    model is much worse until it was trained with its new features. A function draws its directions from `seed`.

    The authors' code subtracts the maximum over all keys before the exponential and adds 10⁻⁶. Here a key counts
    relative to the greatest up to the query, so that the future has no effect (see `ops.linear`), and nothing is added.

    Attributes:
        features: number of features; None for the multiple of `d` nearest to `d·ln d`, which is 256 for heads of 64.
        kernel: `softmax` or `relu`.
        redraw: training steps between draws; 0 for never. The default is this project's choice: on associative recall,
            a model with 95 % right had 21 % after a draw, and did not recover while the learning rate fell.
        seed: of the directions if used as a function.
    """

    features: int | None = None
    kernel: Annotated[str, KERNELS] = 'softmax'
    redraw: Count = 0
    seed: Count = 0

    def variables(self, module):
        """Makes the key, the count of training steps, and the first directions."""
        key = state(module, 'key', lambda: jax.random.bits(module.make_rng('params'), (2,), jnp.uint32))
        steps = state(module, 'seen', lambda: jnp.zeros((), jnp.int32))
        directions = state(module, 'directions', lambda: self._draw(key, steps, module.head_width))
        return {'key': key, 'seen': steps, 'directions': directions}

    def kernel_of(self, width, context):
        own = context.variables
        directions = own['directions'] if own else orthogonal(jax.random.key(self.seed), self._size(width), width)
        return (softmax_kernel if self.kernel == 'softmax' else relu_kernel)(directions)

    def update_state(self, q, k, context):
        """Counts the step, and draws new directions when they are due."""
        if not self.redraw:
            return {}
        own = self.own_variables(context)
        steps, old = own['seen'] + 1, own['directions']
        draw = partial(self._draw, own['key'], steps, q.shape[-1])
        return {'seen': steps, 'directions': lax.cond(steps % self.redraw == 1 % self.redraw, draw, lambda: old)}

    def _draw(self, key: Array, number: Array, width: int) -> Float[Array, 'f d']:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), number)
        return orthogonal(key, self._size(width), width)

    def _size(self, width: int) -> int:
        return width * max(1, round(math.log(width))) if self.features is None else self.features
