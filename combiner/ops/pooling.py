"""Pooling of the members of a span into its summary query `Q_r` and its summary key `K_r` (Combiner, equation (7)).

The paper pools by maximum and allows DeepSets. A pooling here is a commutative monoid between two maps of single
vectors: each member is encoded alone, the encoded members are reduced by maximum or by sum, and the result is decoded.
So one definition serves blocks (a reduction), prefixes of a grid column (a scan) and trees of spans (reductions of
reductions).

A `Relation` defines one span for each position of a line, such as a row or a column of a grid: the positions before it,
after it, or all others. Sums over such spans are products with a triangle of ones; maxima have their own derivatives.

Letters: `h` head, `d` head width, `f` features of an encoded member; `*n` spans or lines, `m` lines, `c` members in a
span, or positions in a line.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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


def plain_name(pools: Pools) -> str | None:
    """Returns the name of poolings without parameters; None for others."""
    return next((name for name, plain in PLAIN.items() if pools == plain), None)


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


class Relation(NamedTuple):
    """The positions of its line to which a position attends.

    Attributes:
        matrix: for lines of a given length, whether the position of the row attends to the position of the column.
        maximum: the maximum over the related positions of each position of `[*n, c, f]`; the lowest number if none.
    """

    matrix: Callable[[int], Bool[np.ndarray, 'c c']]
    maximum: Callable[[Float[Array, '*n c f']], Float[Array, '*n c f']]

    def members(self, inside: Bool[Array, 'm c'] | None, size: int) -> Bool[Array, '#m c c']:
        """Returns to which positions of its line each position is related, only those `inside`."""
        related = jnp.asarray(self.matrix(size)[None])
        return related if inside is None else related & inside[:, None, :]

    def pool(
        self, pool: Pool, x: Float[Array, 'h m c d'], inside: Bool[Array, 'm c'] | None
    ) -> Float[Array, 'h m c d']:
        """Pools the related members of every position; zeros where there is no member."""
        features = pool.encode_members(x, inside)
        if pool.maximum:
            features = self.maximum(features)
        else:
            features = einsum('ij,...jf->...if', jnp.asarray(self.matrix(x.shape[2]), features.dtype), features)
        return pool.decode_or_zero(features, self.members(inside, x.shape[2]).any(axis=-1)).astype(x.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _running_maximum(reverse: bool, x: Float[Array, '*n c f']) -> Float[Array, '*n c f']:
    """Returns the maximum over the positions before (in reverse: after) each position."""

    def step(top: Array, at: Array) -> tuple[Array, Array]:
        return jnp.maximum(top, _at(x, at)), top

    lowest = jnp.full_like(x[..., 0, :], jnp.finfo(x.dtype).min)
    _, tops = jax.lax.scan(step, lowest, jnp.arange(x.shape[-2]), reverse=reverse)
    return jnp.moveaxis(tops, 0, -2)


@_running_maximum.defjvp
def _running_maximum_tangent(reverse, primals, tangents):
    """Shares the derivative evenly between a position and an equal maximum before it, as JAX does."""
    (x,), (tangent,) = primals, tangents
    tops = _running_maximum(reverse, x)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(change: Array, at: Array) -> tuple[Array, Array]:
        new, top = _at(x, at), _at(tops, at)
        share = jnp.where(new > top, 1, jnp.where(new == top, 0.5, 0)).astype(change.dtype)
        return change + share * (_at(tangent, at).astype(change.dtype) - change), change.astype(x.dtype)

    nothing = jnp.zeros(x[..., 0, :].shape, jnp.promote_types(x.dtype, jnp.float32))
    _, changes = jax.lax.scan(step, nothing, jnp.arange(x.shape[-2]), reverse=reverse)
    return tops, jnp.moveaxis(changes, 0, -2)


@jax.custom_jvp
def _maximum_of_others(x: Float[Array, '*n c f']) -> Float[Array, '*n c f']:
    """Returns the maximum over all other positions: the first or, for the only position of the first, the second."""
    first, second, alone = _two_highest(x)
    return jnp.where((x == first) & alone, second, first)


def _two_highest(x):
    """Returns the highest number, the next lower one, and whether only one position holds the first."""
    first = x.max(axis=-2, keepdims=True)
    second = jnp.where(x == first, jnp.finfo(x.dtype).min, x).max(axis=-2, keepdims=True)
    return first, second, (x == first).sum(axis=-2, keepdims=True) == 1


@_maximum_of_others.defjvp
def _maximum_of_others_tangent(primals, tangents):
    """Shares the derivative evenly among positions of an equal maximum, as JAX does."""
    (x,), (tangent,) = primals, tangents
    first, second, alone = _two_highest(x)
    tangent = tangent.astype(jnp.promote_types(x.dtype, jnp.float32))

    def total(terms: Array) -> Array:
        return terms.sum(axis=-2, keepdims=True)

    is_first, is_second = x == first, (x == second) & (second < first)
    held = total(is_first)
    of_first = total(jnp.where(is_first, tangent, 0))
    of_second = total(jnp.where(is_second, tangent, 0)) / jnp.maximum(total(is_second), 1)
    of_tied = of_first / jnp.maximum(held - 1, 1)
    own = jnp.where(alone, 0, 1 / jnp.maximum(held - 1, 1)).astype(tangent.dtype)
    change = jnp.where(is_first, jnp.where(alone, of_second, of_tied), of_first / held)
    change -= own * jnp.where(is_first, tangent, 0)
    return _maximum_of_others(x), change.astype(x.dtype)


def _at(x: Float[Array, '*n c f'], at: Array) -> Float[Array, '*n f']:
    return jax.lax.dynamic_index_in_dim(x, at, axis=-2, keepdims=False)


BEFORE = Relation(lambda size: np.tri(size, k=-1, dtype=bool), partial(_running_maximum, False))
AFTER = Relation(lambda size: np.tri(size, k=-1, dtype=bool).T, partial(_running_maximum, True))
OTHERS = Relation(lambda size: ~np.eye(size, dtype=bool), _maximum_of_others)
