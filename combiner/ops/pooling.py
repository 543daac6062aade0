"""Pooling of the members of a span into its summary query `Q_r` and its summary key `K_r` (Combiner, equation (7)).

The paper pools by maximum and allows DeepSets. A pooling here is a commutative monoid between two maps of single
vectors: each member is encoded alone, the encoded members are reduced by maximum or by sum, and the result is decoded.
So one definition serves blocks (a reduction), prefixes of a grid column (a scan) and trees of spans (reductions of
reductions).

Letters: `h` head, `d` head width, `f` features of an encoded member; `*n` spans, `c` members in a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner.ops.softmax import einsum

POOLS = ('max', 'mean', 'deepsets', 'attention')
LOGIT_CAP = 30.0  # e^±30 and the sum of 10^9 such weights fit into float32: weights may be summed unscaled


class Pool(NamedTuple):
    """A pooling in three steps, `decode(reduce(encode(x)))`.

    Attributes:
        encode: from every member `[h, …, d]` to its features `[h, …, f]`.
        decode: from the reduced features `[h, …, f]` of at least one member to the pooled vector `[h, …, d]`.
        maximum: whether to reduce by maximum; otherwise by sum.
    """

    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]
    maximum: bool = False

    @property
    def reduce(self) -> Callable[..., Array]:
        """Reduces features along an axis."""
        return jnp.max if self.maximum else jnp.sum

    @property
    def combine(self) -> Callable[[Array, Array], Array]:
        """Reduces two arrays of features to one."""
        return jnp.maximum if self.maximum else jnp.add

    def encode_members(
        self, x: Float[Array, '*n d'], members: Bool[Array, '...'] | None = None
    ) -> Float[Array, '*n f']:
        """Encodes every position; a position that is no member becomes the identity of the reduction."""
        features = self.encode(x)
        return features if members is None else self.keep(features, members)

    def keep(self, features: Float[Array, '*n f'], members: Bool[Array, '...']) -> Float[Array, '*n f']:
        """Keeps the members; other positions become the identity of the reduction."""
        return jnp.where(members[..., None], features, self.identity(features))

    def identity(self, features: Float[Array, '...']) -> Any:
        """Returns the number that changes no reduction of such features."""
        return jnp.finfo(features.dtype).min if self.maximum else 0

    def decode_or_zero(
        self, features: Float[Array, '*n f'], some: Bool[Array, '...'] | None = None
    ) -> Float[Array, '*n d']:
        """Decodes the pooled vectors; zeros where not `some` member was present."""
        if some is None:
            return self.decode(features)
        some = some[..., None]
        return jnp.where(some, self.decode(jnp.where(some, features, 1)), 0)  # decode(0) may have no gradient

    def __call__(self, x: Float[Array, '*n c d'], members: Bool[Array, '...'] | None = None) -> Float[Array, '*n d']:
        """Pools along the last axis but one."""
        some = None if members is None else members.any(axis=-1)
        return self.decode_or_zero(self.reduce(self.encode_members(x, members), axis=-2), some).astype(x.dtype)


class Pools(NamedTuple):
    """The poolings of queries and of keys."""

    q: Pool
    k: Pool


def _same(x: Array) -> Array:
    return x


def _counted(x: Array) -> Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def _average(features: Array) -> Array:
    return features[..., :-1] / features[..., -1:]


MAX = Pool(_same, _same, maximum=True)
MEAN = Pool(_counted, _average)
PLAIN = {'max': Pools(MAX, MAX), 'mean': Pools(MEAN, MEAN)}


def deepsets(inner: Float[Array, 'h d f'], outer: Float[Array, 'h f d']) -> Pool:
    """Returns the pooling `outer · mean_j relu(inner · x_j)` (Zaheer et al. 2017), by head."""

    def encode(x: Array) -> Array:
        return _counted(jax.nn.relu(einsum('h...d,hdf->h...f', x, inner.astype(x.dtype))))

    return Pool(encode, lambda features: einsum('h...f,hfd->h...d', _average(features), outer.astype(features.dtype)))


def attention(query: Float[Array, 'h d']) -> Pool:
    """Returns the pooling by a learned query: `Σ_j w_j x_j / Σ_j w_j` with `w_j = exp(30 tanh(query · x_j / 30))`.

    The logits saturate at ±30, so that the weights can be summed without their maximum.
    """

    def encode(x: Array) -> Array:
        logits = einsum('h...d,hd->h...', x, query.astype(x.dtype))
        return jnp.exp(LOGIT_CAP * jnp.tanh(logits / LOGIT_CAP))[..., None] * _counted(x)

    return Pool(encode, _average)


def plain(name: str) -> Pools:
    """Returns the poolings of a name that have no parameters.

    Raises:
        ValueError: the name is unknown, or the pooling has parameters.
    """
    if name in PLAIN:
        return PLAIN[name]
    if name in POOLS:
        raise ValueError(f'pool={name!r} owns parameters: use the Linen module of the mechanism, or choose max or mean')
    raise ValueError(f'unknown pool {name!r}; choose {", ".join(POOLS)}')
