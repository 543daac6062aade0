"""Weights that are products of features, and the sums from which such attention is read (Katharopoulos et al. 2020).

    out_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j) = φ(q_i)ᵀ S / φ(q_i)ᵀ z      S = Σ_j φ(k_j) v_jᵀ, z = Σ_j φ(k_j)

Features may be exponentials that no float holds. A query's features may have any factor, it cancels. Those of a key
come with the logarithm `s_j` of a factor, which is taken relative to the greatest so far, `t_i = max_{j ≤ i} s_j`:

    φ(q_i)·φ(k_j) exp(s_j - t_i)

A maximum over all keys would cancel too, but not in the last bits: a later key would change what comes before it, and
one great enough would make it all vanish. A maximum over the keys so far does neither.

Features, weights and sums are not bounded as those of a softmax are: in float16, which holds no number above 65,504,
they are float32.

Letters: as in `layout`, and `f` features.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from combiner.attention.joint import dot, roomy

LEAST = 1e-30  # a sum of weights below this is one of underflows: its reciprocal would soon be infinite


class Kernel(NamedTuple):
    """A feature map for queries and one for keys, both of single vectors, to float32.

    Attributes:
        size: how many features there are.
        query: features of queries, up to a factor for each query.
        key: features of keys, and the logarithm of the factor that each key's features are still to get.
    """

    size: int
    query: Callable[[Array], Array]
    key: Callable[[Array], tuple[Array, Array]]

    def keys(
        self, k: Float[Array, '*n d'], members: Bool[Array, '...'] | None
    ) -> tuple[Float[Array, '*n f'], Float[Array, '*n']]:
        """As `key`, of no weight where a position is no member; the logarithm without a gradient, as it cancels."""
        features, log = self.key(k)
        log = lax.stop_gradient(log)
        if members is None:
            return features, log
        return jnp.where(members[..., None], features, 0), jnp.where(members, log, jnp.finfo(log.dtype).min)


class State(NamedTuple):
    """Sums over keys, `exp(top)` times smaller than they are: `S`, `z`, and the greatest `s_j`."""

    values: Float[Array, '*n f d']
    total: Float[Array, '*n f']
    top: Float[Array, '*n']

    def at(self, top: Float[Array, '*n']) -> 'State':
        """The same sums relative to another `top`, at least as great."""
        scale = jnp.exp(self.top - top)
        return State(scale[..., None, None] * self.values, scale[..., None] * self.total, top)

    def read(self, query: Float[Array, '*n q f']) -> tuple[Float[Array, '*n q d'], Float[Array, '*n q']]:
        """Weighted values and sums of weights for the features of queries."""
        return dot('...qf,...fd->...qd', query, self.values), dot('...qf,...f->...q', query, self.total)


def summed(
    kernel: Kernel, k: Float[Array, '*n c d'], v: Float[Array, '*n c d'], members: Bool[Array, '...'] | None = None
) -> State:
    """The sums over the last axis but one, of members only."""
    features, log = kernel.keys(k, members)
    top = log.max(axis=-1)
    features = features * jnp.exp(log - top[..., None])[..., None]
    return State(dot('...cf,...cd->...fd', features.astype(roomy(v.dtype)), v), features.sum(axis=-2), top)


def nothing_like(state: State) -> State:
    """The sums over no key."""
    values, total, top = map(jnp.zeros_like, state)
    return State(values, total, top + jnp.finfo(top.dtype).min)


def plus(one: State, other: State) -> State:
    """The sums over both."""
    top = jnp.maximum(one.top, other.top)
    one, other = one.at(top), other.at(top)
    return State(one.values + other.values, one.total + other.total, top)


def attend_chunks(
    kernel: Kernel,
    q: Float[Array, 'h m c d'],
    k: Float[Array, 'h m c d'],
    v: Float[Array, 'h m c d'],
    inside: Bool[Array, 'm c'] | None,
    past: State,
) -> Float[Array, 'h m c d']:
    """Causal attention of every chunk to its own positions and to the sums `past` of what is before it."""
    kind = roomy(v.dtype)
    query = kernel.query(q).astype(kind)
    features, log = kernel.keys(k, inside)
    so_far = jnp.maximum(lax.cummax(log, axis=2), past.top[..., None])
    factor = jnp.exp(jnp.minimum(log[..., None, :] - so_far[..., :, None], 0))  # above 0 only where it is masked
    weights = dot('hmqf,hmkf->hmqk', query, features.astype(kind)) * factor
    weights = jnp.where(jnp.tri(q.shape[2], dtype=bool), weights, 0)
    values, total = past.read(query)
    far = jnp.exp(past.top[..., None] - so_far)
    values = dot('hmqk,hmkd->hmqd', weights.astype(kind), v) + far[..., None] * values
    return quotient(values, weights.sum(axis=-1) + far * total).astype(v.dtype)


@jax.custom_jvp
def quotient(values: Float[Array, '*n d'], total: Float[Array, '*n']) -> Float[Array, '*n d']:
    """`values / total`, zeros where the total is less than `LEAST`.

    The derivative is written as `(dvalues - out·dtotal) / total`: that of the quotient divides by the square.
    """
    return values * _reciprocal(total)


@quotient.defjvp
def _quotient_tangents(primals, tangents):
    out, reciprocal = quotient(*primals), _reciprocal(primals[1])
    return out, reciprocal * (tangents[0] - out * tangents[1][..., None])


def _reciprocal(total: Float[Array, '*n']) -> Float[Array, '*n 1']:
    total = total[..., None]
    return jnp.where(total > LEAST, 1 / jnp.where(total > LEAST, total, 1), 0)
