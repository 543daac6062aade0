"""What positions, or summaries of a level, get from the gradients of the summary that pools them, their parent.

    K = pool_j k_j        V = Σ_j softmax_j(Q·k_j/√d) v_j        Q = pool_j q_j

Letters: `n` parents, `s` children of a slice.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from combiner.kernels.gpu.slices import Plan, Slice
from combiner.ops.segments import PADDING_ID

LOWEST = float(np.finfo(np.float32).min)  # a masked logit; a query without keys has a maximum of half of it


class Parents(NamedTuple):
    """The parents of a level, or references to them.

    Attributes:
        q: their queries, pooled.
        k: their keys, pooled.
        dq: the gradient of a member whose query was pooled; of `max` one that holds the maximum.
        dk: the same of keys.
        dv: the gradients of their values.
        lse: the log-sum-exps of their softmax.
        mean: the means, by the weights, of the gradients of the weights.
        ids: their segment ids; None if all are equal.
    """

    q: Any
    k: Any
    dq: Any
    dk: Any
    dv: Any
    lse: Any
    mean: Any
    ids: Any


def members_of(children: Slice, parent_ids: Any, end: Any, plan: Plan) -> Bool[Array, 's 1']:
    """Returns which children, before the `end`, belong to their parents, whose ids are given."""
    members = children.column.at < end
    if children.ids is not None:
        members &= children.column.ids != PADDING_ID
        if plan.packed:
            members &= children.column.ids == parent_ids[:, None]
    return members


def pooled_here(x: Array, pooled: Array, members: Array, pool: str) -> Float[Array, 's d']:
    """Returns for each number whether the pooled vector depends on it."""
    if pool == 'mean':
        return jnp.broadcast_to(members, x.shape).astype(jnp.float32)
    return (members & (x.astype(jnp.float32) == pooled)).astype(jnp.float32)


def local_logits(query: Array, k: Array, members: Array, plan: Plan) -> Float[Array, 's 1']:
    """Returns the logits of members, to the base of 2, for the query of their parent, or one for each of them."""
    products = (k.astype(jnp.float32) * query.astype(jnp.float32)).sum(axis=1)[:, None]
    return jnp.where(members, products * (math.log2(math.e) * plan.width**-0.5), LOWEST)


def weights_and_changes(
    query: Array, k: Array, v: Array, dv: Array, lse: Array, mean: Array, members: Array, plan: Plan
) -> tuple[Float[Array, 's 1'], Float[Array, 's 1']]:
    """Returns the weights of members in the value of their parent, and the gradients of their logits."""
    weights = jnp.exp2(local_logits(query, k, members, plan) - lse)
    return weights, weights * ((v.astype(jnp.float32) * dv).sum(axis=1)[:, None] - mean)


def add_to_keys(
    parents: Parents, children: Slice, k: Array, v: Array, dk: Array, dv: Array, level: int, pool: str, plan: Plan
) -> tuple[Float[Array, 's d'], Float[Array, 's d']]:
    """Adds to the gradients of children's keys and values what they get as members of their parents of a level."""
    query, value = (children.load_parents(ref, plan).astype(jnp.float32) for ref in (parents.q, parents.dv))
    lse, mean = (children.load_parents(ref, plan)[:, None] for ref in (parents.lse, parents.mean))
    members = _members(parents, children, level, plan)
    weights, change = weights_and_changes(query, k, v, value, lse, mean, members, plan)
    dv, dk = dv + weights * value, dk + change * query * plan.width**-0.5
    key, of_key = (children.load_parents(ref, plan).astype(jnp.float32) for ref in (parents.k, parents.dk))
    return dk + pooled_here(k, key, members, pool) * of_key, dv


def add_to_queries(
    parents: Parents, children: Slice, q: Array, dq: Array, level: int, pool: str, plan: Plan
) -> Float[Array, 's d']:
    """Adds to the gradients of children's queries what they get as members of their parents of a level."""
    query, of_query = (children.load_parents(ref, plan).astype(jnp.float32) for ref in (parents.q, parents.dq))
    return dq + pooled_here(q, query, _members(parents, children, level, plan), pool) * of_query


def _members(parents, children, level, plan):
    ids = None if parents.ids is None or not plan.packed else children.load_parents(parents.ids, plan)
    return members_of(children, ids, plan.count(level - 1), plan)
