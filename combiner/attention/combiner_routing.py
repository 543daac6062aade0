"""Combiner-Routing: own cluster directly, other clusters through summaries (Combiner; Roy et al. 2021)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from combiner import costs, patterns
from combiner.attention import combiner_routing_spans as spanned
from combiner.attention.centroids import Routed, directions, nearest
from combiner.attention.combiner_routing_places import Tokens, by_first_token, places, take
from combiner.attention.joint import Drop, dot, joint_exp, masked
from combiner.attention.layout import fit, scaled, summarise
from combiner.attention.pooled import PooledAttention
from combiner.attention.pooling import PLAIN, Pools
from combiner.attention.registry import register


def attend_combiner_routing(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    clusters: Int[Array, 'b l h'],
    *,
    number: int,
    block: int,
    causal: bool,
    pools: Pools = PLAIN['max'],
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Equation (7) for given clusters; the partition is `patterns.combiner_routing`.

    The tokens of a cluster, in their order, are cut into blocks of `block`, counted from the cluster's first token.
    Direct is the own block (causal: up to `i`). Every other block is one span: all of it, or causal what it holds
    before `i`. Where no cluster has more than `block` tokens this is the paper's partition: own cluster directly, each
    other cluster one span. Longer clusters are cut (this project's choice), so that the cost follows from the sizes.

    A block grows token by token: its distinct spans are its beginnings, of at most `block` members. The `l / block`
    full blocks are seen by all after them; an unfinished one has been cut off by its cluster's last token before `i`,
    which lies in the same stretch of `number` positions or was its cluster's last when the stretch began. So with
    `n ≤ l/block + number` blocks, in time and memory, O(l^1.5) for both near √l:

        l·(block + l/block + 2·number)   logits        n·block²   logits inside blocks, direct and local

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        clusters: the cluster of each position, `0 … number - 1`; it must not depend on later positions.
        number: how many clusters there are.
        block: tokens of a cluster in a block.
        causal: whether a position sees only itself and what is before it.
        pools: how the members of a span become its summary query and key.
        valid: positions that are no padding; padding must hold finite numbers. It belongs to no cluster.
        drop: dropout of the joint weights.
    """
    batch, length, heads, width = q.shape
    block = fit(block, length)
    if valid is not None:
        clusters = jnp.where(valid[:, :, None], clusters, number)
    clusters = jnp.moveaxis(clusters, 2, 0)
    if number > length:
        clusters, number = by_first_token(clusters, number), length
    where = places(clusters, block, number)
    q, k, v = (jnp.moveaxis(x, 2, 0) for x in (q, k, v))
    blocks = (heads, batch, -1, block)
    tokens = Tokens(*(take(x, where.at).reshape(*blocks, width) for x in (q, k, v)))
    filled = (where.at < length).reshape(blocks)
    own = masked(dot('hbncd,hbnkd->hbnck', scaled(tokens.q), tokens.k), filled[..., None, :])
    own = masked(own, jnp.tri(block, dtype=bool)) if causal else own
    far = _far(tokens, filled, where, clusters, number, causal, pools)
    own = take(own.reshape(heads, batch, -1, block), where.slot)  # by position, as the others are
    (own, *weights), total = joint_exp(own, *(seen.logits(scaled(q)) for seen in far), drop=drop)
    own = take(own.astype(v.dtype), where.at).reshape(*blocks, block)
    attended = take(dot('hbnck,hbnkd->hbncd', own, tokens.v).reshape(heads, batch, -1, width), where.slot)
    attended += sum(seen.read(weight) for seen, weight in zip(far, weights, strict=True))
    return jnp.moveaxis((attended / total).astype(v.dtype), 0, 2)


def _far(tokens: Tokens, filled, where, clusters, number, causal, pools):
    """The summaries that lie outside of the own block, with who sees them."""
    if not causal:
        return [spanned.others(summarise(*tokens, filled, pools=pools), where, filled.shape[-1])]
    spans = spanned.prefixes(*tokens, filled, pools=pools)
    return [
        spanned.closed(spans, where, clusters.shape[-1]),
        spanned.still_open(spans, where, clusters, number),
    ]


@register('combiner_routing')
class CombinerRoutingAttention(Routed, PooledAttention):
    """Combiner-Routing; a token's cluster is that of the centroid nearest to its query and key together.

    Attributes:
        block: tokens of a cluster in a block; None for the least power of two that holds `planned_length / clusters`,
            a cluster of average size.
    """

    block: int | None = None

    full_support = True

    def pattern_for(self, clusters: Int[np.ndarray, ' l']) -> patterns.Pattern:
        """The partition of the support for a sequence of these clusters; negative ones mark padding."""
        return patterns.combiner_routing(clusters, causal=self.causal, block=self._block(len(clusters)))

    def cost(self, length):
        return costs.combiner_routing(length, self._block(length), self.number, causal=self.causal)

    def attend_from(self, x, q, k, v, **masks):
        del x
        sizes = {'number': self.number, 'block': self._block(q.shape[1]), 'causal': self.causal}
        clusters = nearest(directions(q, k), self.centroids.value)
        return attend_combiner_routing(q, k, v, clusters, **sizes, pools=self.pools, **masks)

    def _block(self, length):
        if self.block is not None:
            return self.block
        return 1 << (-(-(self.planned_length or length) // self.number) - 1).bit_length()
