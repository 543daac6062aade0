"""The module around mechanisms that pool spans: which pooling, and its parameters.

Letters: `b` batch, `l` length, `h` head, `d` head width.
"""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from combiner.core.module import Attention
from combiner.layers import parameter
from combiner.ops.pooling import PLAIN, POOLS, Pool, Pools, attention, deepsets, plain


class PooledAttention(Attention):
    """A mechanism that pools spans; subclasses supply `attend_pooled`.

    Attributes:
        pool: `max` (the paper's), `mean`, `deepsets` or `attention`. The last two own parameters, one set for queries
            and one for keys.
    """

    pool: str = 'max'

    def setup(self) -> None:
        """Makes the projections, and the parameters of the poolings."""
        super().setup()
        if self.pool in POOLS and self.pool not in PLAIN:
            scale = self.head_width**-0.5  # queries are scaled once they are pooled; the paper's pooling sees them so
            self.own_pools = Pools(self._own_pool('query', scale), self._own_pool('key', 1.0))

    @property
    def pools(self) -> Pools:
        """The poolings that `pool` names."""
        return self.own_pools if self.pool in POOLS and self.pool not in PLAIN else plain(self.pool)

    def attend_pooled(
        self,
        pools: Pools,
        q: Float[Array, 'b l h d'],
        k: Float[Array, 'b l h d'],
        v: Float[Array, 'b l h d'],
        **masks: Any,
    ) -> Float[Array, 'b l h d']:
        """As `attend`, with the poolings given."""
        raise NotImplementedError

    def attend(self, q, k, v, **masks):
        return self.attend_pooled(plain(self.pool), q, k, v, **masks)  # refuses what owns parameters

    def attend_from(self, x, q, k, v, **masks):
        del x
        return self.attend_pooled(self.pools, q, k, v, **masks)

    def _own_pool(self, prefix: str, scale: float) -> Pool:
        """The pooling of what a `scale` turns into what it is defined on."""
        heads, width = self.heads, self.head_width
        if self.pool == 'attention':
            init = nn.initializers.normal(width**-0.5)
            query = parameter(self, f'{prefix}_pool_query', init, ('heads', 'head_dim'), (heads, width))
            return attention(query * scale)
        # The other pooling needs no scale: it turns c·x into c times what it makes of x, for c > 0.
        axes, shape = ('heads', 'head_dim', 'features'), (heads, width, width)
        init = nn.initializers.he_normal(in_axis=1, out_axis=2, batch_axis=0)
        inner = parameter(self, f'{prefix}_pool_inner_kernel', init, axes, shape)
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        return deepsets(inner, parameter(self, f'{prefix}_pool_outer_kernel', init, axes, shape))
