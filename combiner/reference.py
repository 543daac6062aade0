"""The oracle: equation (7) of Combiner computed directly from a `Pattern`, in O(l²) time and memory.

Tests compare every fast implementation with it, gradients included. Letters: `b` batch, `l` query position, `m` key
position, `h` head, `d` head width, `s` span.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from combiner.patterns import Mixture, Pattern

KEYS = ('token', 'attended')

Drop = Callable[[Array], Array]
Pool = Callable[[Float[Array, 'b l h d'], Bool[Array, 'b s l']], Float[Array, 'b s h d']]
SpanKeys = Float[Array, 'b s h d']


def attend(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    pattern: Pattern | Mixture,
    *,
    valid: Bool[Array, 'b l'] | None = None,
    key: str | Callable[[SpanKeys], SpanKeys] = 'attended',
    pools: tuple[Pool, Pool] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Computes Combiner attention, equations (7) and (9), for any pattern.

        A(i)     = Σ_{j∈Ω^0} p~(j|i) v_j + Σ_r p(Ω^r|i) V_r        p~(j|i) = exp(q_i·k_j/√d) / Z_i
        V_r      = Σ_{j∈Ω^r} softmax_j(Q_r·k_j/√d) v_j             p(Ω^r|i) = exp(q_i·K_r/√d) / Z_i
        Z_i      = Σ_{j∈Ω^0} exp(q_i·k_j/√d) + Σ_r exp(q_i·K_r/√d)

    For a pooled span, `Q_r = max q_j` and `K_r = max k_j` over its members, or `pools` computes them. For an anchored
    span (`pattern.anchors`), `Q_r` is the anchor's query, and `key` chooses `K_r`: `token` (the anchor's key),
    `attended` (`Σ_j softmax_j(Q_r·k_j/√d) k_j`) or a function of all values `V_r`. In the local expectation of a span
    of spans (`pattern.nested`), `K_s` and `V_s` of a nested span `s` replace `k_j` and `v_j`.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        pattern: the partition of every position's support; for a mixture, the result is the mean of the attentions.
        valid: False for padding, which is in no sum, maximum or normaliser, and whose output is zero.
        key: the summary key of anchored spans.
        pools: replace the maximum of queries and of keys: functions of the scaled queries (or the keys)
            `[b, l, h, d]` and of the members of all spans `[b, s, l]`, which return `[b, s, h, d]`.
        drop: dropout function, applied to the joint weights; None for no dropout.

    Returns:
        The output in the type of `v`; zeros at positions that have nothing to attend to.

    Raises:
        ValueError: the summary key is unknown.
    """
    if isinstance(pattern, Mixture):
        options = {'valid': valid, 'key': key, 'pools': pools, 'drop': drop}
        exact = v.astype(jnp.promote_types(v.dtype, jnp.float32))
        parts = [attend(q, k, exact, part, **options) for part in pattern.parts]
        return jnp.mean(jnp.stack(parts), axis=0).astype(v.dtype)
    q, k, values = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q, k, v))
    if valid is None:
        valid = jnp.ones(q.shape[:2], bool)
    q, k, values = (jnp.where(valid[:, :, None, None], x, 0) for x in (q, k, values))
    q = q / jnp.sqrt(q.shape[-1])
    members = jnp.asarray(pattern.spans)[None] & valid[:, None, :]
    span_k, span_v = _summaries(q, k, values, members, pattern, key, pools)

    direct = jnp.asarray(pattern.direct)[None] & valid[:, None, :]
    uses = jnp.asarray(pattern.uses)[None] & members.any(-1)[:, None, :]
    logits = jnp.concatenate([jnp.einsum('blhd,bmhd->bhlm', q, k), jnp.einsum('blhd,bshd->bhls', q, span_k)], axis=-1)
    reached = jnp.concatenate([direct, uses], axis=-1)[:, None] & valid[:, None, :, None]
    weights = _masked_softmax(logits, reached)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum('bhlm,bmhd->blhd', weights, jnp.concatenate([values, span_v], axis=1)).astype(v.dtype)


def _summaries(q, k, v, members, pattern, key, pools):
    """Returns the summary key and the local expectation of every span, each `[b, s, h, d]`."""
    if pattern.anchors is None:
        pool_q, pool_k = pools or (_masked_max, _masked_max)
        span_q, span_k = pool_q(q, members), pool_k(k, members)
    else:
        present = jnp.asarray(pattern.anchors >= 0)[None, :, None, None]
        span_q, span_k = (jnp.where(present, x[:, pattern.anchors], 0) for x in (q, k))
    if pattern.nested is not None:
        return span_k, _nested_expectations(span_q, span_k, k, v, members, pattern)
    local = _masked_softmax(jnp.einsum('bshd,bmhd->bhsm', span_q, k), members[:, None])
    span_v = jnp.einsum('bhsm,bmhd->bshd', local, v)
    if pattern.anchors is not None and callable(key):
        span_k = key(span_v)
    elif pattern.anchors is not None and key == 'attended':
        span_k = jnp.einsum('bhsm,bmhd->bshd', local, k)
    elif key not in KEYS:
        raise ValueError(f'unknown summary key {key!r}; choose one of {", ".join(KEYS)}')
    return span_k, span_v


def _nested_expectations(span_q, span_k, k, v, members, pattern):
    """Solves `V = P v + N V` for the local expectations; P and N are the weights of positions and nested spans."""
    positions, spans = (jnp.asarray(parts)[None] for parts in pattern.parts())
    reached = jnp.concatenate([positions & members, spans & members.any(-1)[:, None]], axis=-1)
    local = _masked_softmax(
        jnp.einsum('bshd,bmhd->bhsm', span_q, jnp.concatenate([k, span_k], axis=1)), reached[:, None]
    )
    of_positions = jnp.einsum('bhsm,bmhd->bhsd', local[..., : v.shape[1]], v)
    span_v = jnp.linalg.solve(jnp.eye(span_k.shape[1], dtype=local.dtype) - local[..., v.shape[1] :], of_positions)
    return jnp.moveaxis(span_v, 1, 2)


def _masked_max(x: Float[Array, 'b l h d'], members: Bool[Array, 'b s l']) -> Float[Array, 'b s h d']:
    lowest = jnp.finfo(x.dtype).min
    most = jnp.where(members[..., None, None], x[:, None], lowest).max(axis=2)
    return jnp.where(members.any(-1)[..., None, None], most, 0)


def _masked_softmax(logits: Float[Array, 'b h l m'], mask: Bool[Array, 'b #h l m']) -> Float[Array, 'b h l m']:
    """Computes the softmax of the entries where `mask` is True; zeros with a zero gradient where there are none."""
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0)
