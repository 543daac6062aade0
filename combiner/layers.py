"""The layers of a transformer besides attention: feed-forward network, normalisation, positions.

Letters: `b` batch, `l` length, `h` heads, `g` key heads, `d` head width, `e` model width, `f` feed-forward width.
"""

from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import spmd
from flax.typing import Dtype, Initializer
from jax import lax
from jaxtyping import Array, Float, Int

LANES = 128  # of a register of a TPU; a narrower last axis is padded to as many in memory
STATE = 'state'  # the collection of arrays without gradients: updated in training, or random and fixed


def parameter(module: nn.Module, name: str, init: Initializer, axes: tuple[str, ...], shape: tuple[int, ...]) -> Array:
    """Creates a float32 parameter with logical axis names, which `sharding.RULES` maps to the mesh."""
    return cast(Array, module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32))


Axes = tuple[tuple[str, int], ...]  # the logical name and the size of each axis


def parameters(module: nn.Module, made: Mapping[str, tuple[Initializer, Axes]]) -> dict[str, Array]:
    """Makes several parameters, by name, each from its initialiser and its axes."""
    return {name: parameter(module, name, init, *zip(*axes, strict=True)) for name, (init, axes) in made.items()}


def state(module: nn.Module, name: str, init: Callable[[], Array], axes: tuple[str | None, ...] | None = None) -> Array:
    """Makes a variable of collection `state` of a module, whose axes may carry their logical names."""
    made = module.variable(STATE, name, init if axes is None else nn.with_logical_partitioning(init, axes))
    return cast(Array, made.value)


def constrain(x: Float[Array, 'b l e']) -> Float[Array, 'b l e']:
    """Constrains the sharding of the activations between blocks."""
    return spmd.with_logical_constraint(x, ('batch', 'length', 'embed_act'))


def rotate(
    x: Float[Array, 'b l h d'], positions: Int[Array, '#b l'], base: float = 10_000.0, *, by_product: bool = False
) -> Float[Array, 'b l h d']:
    """Applies rotary positions (Su et al. 2021): rotates `(x_t, x_{t+d/2})` by the angle `position · base^(-2t/d)`.

    Args:
        x: heads.
        positions: of the tokens.
        base: of the angles.
        by_product: whether a product exchanges the halves of a head, which is the same; for TPUs, whose memory would
            otherwise hold each half by itself, padded to 128 lanes.

    Raises:
        ValueError: the head width is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f'rotary positions need an even head width, got {x.shape[-1]}; change qkv_width or heads')
    half, wide = x.shape[-1] // 2, jnp.promote_types(x.dtype, jnp.float32)
    angles = positions[..., None, None] * base ** (-jnp.arange(half, dtype=wide) / half)
    if by_product:
        return _rotate_by_product(x, angles)
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    rotated = [
        first * jnp.cos(angles) - second * jnp.sin(angles),
        first * jnp.sin(angles) + second * jnp.cos(angles),
    ]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _rotate_by_product(x: Float[Array, 'b l h d'], angles: Float[Array, '#b l 1 t']) -> Float[Array, 'b l h d']:
    """Rotates by angles, with the halves of a head exchanged by a product with a permutation.

    Narrow heads that fill registers side by side are rotated by register: an axis of such heads would be padded.
    """
    heads, width = x.shape[2:]
    together = LANES // width if LANES % width == 0 and heads * width % LANES == 0 else 1
    exchange = np.kron(np.eye(together), np.roll(np.eye(width), width // 2, axis=0)).astype(x.dtype)
    cos, sin = jnp.tile(jnp.cos(angles), 2), jnp.concatenate([-jnp.sin(angles), jnp.sin(angles)], axis=-1)
    cos, sin = (jnp.tile(factors, together) for factors in (cos, sin))

    def rotated(x: Float[Array, 'b l n f']) -> Float[Array, 'b l n f']:
        # Exact: each sum has one term, which no operand may round.
        options = {'precision': lax.Precision.HIGHEST, 'preferred_element_type': angles.dtype}
        exchanged = jnp.einsum('blhd,df->blhf', x, exchange, **options)
        return (x.astype(angles.dtype) * cos + exchanged * sin).astype(x.dtype)

    if together == 1:
        return rotated(x)
    features = x.reshape(*x.shape[:2], 1, -1)
    parts = [rotated(features[..., first : first + LANES]) for first in range(0, heads * width, LANES)]
    return jnp.concatenate(parts, axis=-1).reshape(x.shape)


def sinusoid(length: int, width: int) -> Float[np.ndarray, 'l e']:
    """Returns sinusoidal positions (Vaswani et al. 2017): all `sin`, then all `cos`, of `position · 10000^(-2t/e)`."""
    angles = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width].astype(np.float32)


def project_to_heads(x: Float[Array, 'b l e'], kernel: Float[Array, 'e h d']) -> Float[Array, 'b l h d']:
    """Projects to heads, in the type of `x`.

    Narrow heads are features `h·d` of one product: in the memory of a TPU their own axis would be padded to 128 lanes,
    or lie across the lanes, where a kernel would need a copy.
    """
    if kernel.shape[-1] >= LANES:
        return jnp.einsum('ble,ehd->blhd', x, kernel.astype(x.dtype))
    features = _as_features(kernel.reshape(len(kernel), -1)).astype(x.dtype)
    return jnp.einsum('ble,ef->blf', x, features).reshape(*x.shape[:2], *kernel.shape[1:])


@jax.custom_jvp
def _as_features(kernel: Float[Array, 'e f']) -> Float[Array, 'e f']:
    """Returns the kernel, whose gradient stays a matrix.

    XLA would reshape the product that computes the gradient, and for that transpose its operands.
    """
    return kernel


@_as_features.defjvp
def _as_features_tangent(primals, tangents):
    return primals[0], lax.optimization_barrier(tangents[0])


def project_from_heads(x: Float[Array, 'b l h d'], kernel: Float[Array, 'h d e']) -> Float[Array, 'b l e']:
    """Projects from heads, in the type of `x`; narrow heads as `project_to_heads` does."""
    if kernel.shape[1] >= LANES:
        return jnp.einsum('blhd,hde->ble', x, kernel.astype(x.dtype))
    features = kernel.reshape(-1, kernel.shape[-1]).astype(x.dtype)
    return jnp.einsum('blf,fe->ble', x.reshape(*x.shape[:2], -1), features)


def norm(dtype: Dtype = jnp.float32, *, bias: bool = False) -> nn.LayerNorm:
    """Returns layer normalisation of the last axis (Ba et al. 2016); statistics are float32 at any `dtype`."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ('embed',))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ('embed',))
    return nn.LayerNorm(use_bias=bias, scale_init=scale_init, bias_init=bias_init, dtype=dtype)


def layer_norm(
    x: Float[Array, '*n e'], scale: Float[Array, ' e'], bias: Float[Array, ' e'], epsilon: float = 1e-6
) -> Float[Array, '*n e']:
    """Normalises the last axis as `norm` does, with given parameters."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(axis=-1, keepdims=True)
    variance = jnp.maximum((wide**2).mean(axis=-1, keepdims=True) - mean**2, 0)
    return ((wide - mean) * (lax.rsqrt(variance + epsilon) * scale) + bias).astype(x.dtype)


class Mlp(nn.Module):
    """A position-wise feed-forward network, `dropout(gelu(x W_in + b_in)) W_out + b_out`.

    Attributes:
        hidden: feed-forward width `f`.
        dtype: type of the computation.
        out_init: initialiser of the second matrix.
        in_init: initialiser of the first matrix.
        bias: whether there are `b_in` and `b_out`.
        dropout: rate between the two matrices.
    """

    hidden: int
    dtype: Dtype = jnp.float32
    out_init: Initializer = nn.initializers.lecun_normal()
    in_init: Initializer = nn.initializers.lecun_normal()
    bias: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, 'b l e'], *, deterministic: bool = True) -> Float[Array, 'b l e']:
        """Maps every position independently."""

        def dense(x: Array, name: str, init: Initializer, axes: tuple[str, str], width: int) -> Array:
            kernel = parameter(self, f'{name}_kernel', init, axes, (x.shape[-1], width))
            product = x.astype(self.dtype) @ kernel.astype(self.dtype)
            if not self.bias:
                return product
            bias = parameter(self, f'{name}_bias', nn.initializers.zeros, axes[1:], (width,))
            return product + bias.astype(self.dtype)

        hidden = nn.gelu(dense(x, 'in', self.in_init, ('embed', 'mlp'), self.hidden))
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=deterministic)
        return dense(hidden, 'out', self.out_init, ('mlp', 'embed'), x.shape[-1])


class Positions(nn.Module):
    """Position embeddings that are added to the token embeddings.

    Attributes:
        kind: `sinusoid`, `learned` (one vector per position), `image` (the sum of one learned vector per axis of
            `shape`, e.g. row, column and channel, Child et al. 2019), or `rotary` (adds nothing: attention rotates
            queries and keys).
        shape: the axes; their product is the maximum length.
        width: model width `e`.
        std: initial standard deviation of the learned vectors.
    """

    kind: str
    shape: tuple[int, ...]
    width: int
    std: float = 0.02

    KINDS = ('sinusoid', 'learned', 'image', 'rotary')

    def setup(self) -> None:
        """Creates the tables of learned vectors."""
        if self.kind not in self.KINDS:
            raise ValueError(f'unknown positions {self.kind!r}; choose one of {", ".join(self.KINDS)}')
        axes = {'learned': (int(np.prod(self.shape)),), 'image': self.shape}.get(self.kind, ())
        init = nn.initializers.normal(self.std)
        self.tables = [
            parameter(self, f'axis_{i}', init, ('positions', 'embed'), (size, self.width))
            for i, size in enumerate(axes)
        ]

    def __call__(self, positions: Int[Array, '#b l']) -> Float[Array, '#b l e'] | float:
        """Returns the embedding of each position."""
        length = int(np.prod(self.shape))
        if self.kind == 'rotary':
            return 0.0
        if self.kind == 'sinusoid':
            return jnp.asarray(sinusoid(length, self.width))[positions]
        axes = jnp.unravel_index(positions, self.shape) if self.kind == 'image' else (positions,)
        return sum(table[axis] for table, axis in zip(self.tables, axes, strict=True))
