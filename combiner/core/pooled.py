"""Mechanisms that pool spans: their pooling, and its parameters.

Letters: `h` head, `d` head width.
"""

from typing import Annotated

from flax import linen as nn

from combiner.core.mechanism import Context, Mechanism
from combiner.layers import parameters
from combiner.ops.pooling import PLAIN, POOLS, Pools, attention, deepsets, plain

ROLES = ('query', 'key')  # each is pooled by its own parameters


class Pooled(Mechanism):
    """A mechanism that pools spans.

    Attributes:
        pool: `max` (the paper's), `mean`, `deepsets` or `attention`. The last two have parameters, one set for queries
            and one for keys.
    """

    pool: Annotated[str, POOLS] = 'max'

    def variables(self, module):
        """Makes the parameters of the poolings, if any."""
        heads, width = ('heads', module.heads), ('head_dim', module.head_width)
        made = {}
        if self.pool == 'attention':
            query = nn.initializers.normal(module.head_width**-0.5), (heads, width)
            made = {f'{role}_pool_query': query for role in ROLES}
        elif self.pool == 'deepsets':
            axes = heads, width, ('features', module.head_width)
            inner = nn.initializers.he_normal(in_axis=1, out_axis=2, batch_axis=0), axes
            outer = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0), axes
            for role in ROLES:
                made |= {f'{role}_pool_inner_kernel': inner, f'{role}_pool_outer_kernel': outer}
        return super().variables(module) | parameters(module, made)

    def attend(self, q, k, v, context):
        """Attends by the oracle, whose summaries are pooled by max; a subclass defines a faster form for every pooling.

        Raises:
            ValueError: the pooling is another one.
        """
        if self.pool != 'max':
            name = type(self).__name__
            raise ValueError(f'pool={self.pool}: the oracle pools by max; set pool=max, or define {name}.attend')
        return super().attend(q, k, v, context)

    def pools(self, context: Context) -> Pools:
        """Returns the poolings that `pool` names.

        Raises:
            ValueError: the pooling has parameters that are not in the context.
        """
        own = context.variables
        if self.pool in PLAIN or not own:
            return plain(self.pool)
        if self.pool == 'attention':
            queries, keys = (own[f'{role}_pool_query'] for role in ROLES)
            # Queries are scaled after pooling; the paper pools scaled queries.
            return Pools(attention(queries * queries.shape[-1] ** -0.5), attention(keys))
        # This pooling needs no scale: for c > 0, it maps c·x to c times the result for x.
        return Pools(*(deepsets(own[f'{role}_pool_inner_kernel'], own[f'{role}_pool_outer_kernel']) for role in ROLES))
