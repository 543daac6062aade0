"""Sparse Sinkhorn attention: own block, and one block that a learned sorting puts beside it (Tay et al. 2020).

Letters: `b` batch, `l` length, `h` heads, `d` head width, `e` model width, `n` and `m` blocks.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from combiner.attention.base import Attention
from combiner.attention.folds import label
from combiner.attention.joint import Drop, dot
from combiner.attention.layout import fit, flatten, split_labels
from combiner.attention.registry import register
from combiner.attention.siblings import Siblings
from combiner.baselines.sinkhorn_cache import start, step
from combiner.baselines.sinkhorn_sorting import balance, pool
from combiner.baselines.windows import attend_window, within
from combiner.costs import root_size
from combiner.layers import parameter


def attend_sinkhorn(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    scores: Float[Array, 'b h n m'],
    *,
    block: int,
    iterations: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    drop: Drop | None = None,
) -> Float[Array, 'b l h d']:
    """Softmax over the own block and, beside it, a sorted one, whose position `c` mixes positions `c`.

        R = balance(exp(scores))        K'_nc = Σ_m R_nm k_mc        V'_nc = Σ_m R_nm v_mc
        A(i) = Σ_{j ∈ n} p_j v_j + Σ_c p'_c V'_nc,  p and p' one softmax of q_i·k_j/√d (causal: j ≤ i) and q_i·K'_nc/√d

    O(l·(block + l/block)) time and memory, of which `l²/block` is the sorting. Causal, block `n` sorts blocks `m < n`
    only, and the first one sees itself alone.

    This project's reading: the paper writes the sum of the two products of a query where all its implementations, as
    here, attend to both blocks. Padding, also of a last, partial block, adds nothing to a sorted position, which is
    masked where it has nothing else; blocks of padding are not balanced.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        scores: of every block and the block to be put beside it.
        block: positions in a block; the last block may be partial.
        iterations: of balancing.
        causal: whether a position sees only itself and what is before it.
        valid: positions that are no padding; padding must hold finite numbers.
        drop: dropout of the weights.
    """
    batch, length, heads, width = q.shape
    block = fit(block, length)
    labels = label(batch, length, block, causal=causal, valid=valid, segments=None)
    inside = split_labels(jnp.ones((batch, length), bool) if valid is None else valid, block).reshape(batch, -1, block)
    some = inside.any(axis=2)
    pairs = some[:, :, None] & some[:, None]
    if causal:
        pairs = pairs & jnp.tri(some.shape[1], k=-1, dtype=bool)
    sorting = balance(scores, pairs[:, None], iterations=iterations, causal=causal)
    uses = (pairs[..., None] & inside[:, None]).any(axis=2).reshape(-1, 1, block)
    q, k, v = (flatten(x, block) for x in (q * width**-0.5, k, v))

    def beside(x: Float[Array, 'p h d']) -> Float[Array, 'n h c d']:
        x = jnp.where(inside[..., None, None], x.reshape(*inside.shape, heads, width), 0)
        return dot('bhnm,bmchd->bnhcd', sorting.astype(x.dtype), x).astype(x.dtype).reshape(-1, heads, block, width)

    own = within(block, before=block, after=0 if causal else block)
    attended = attend_window(q, k, v, labels, own, [Siblings(beside(k), beside(v), None, uses)], batch, drop)
    return attended.reshape(batch, -1, heads, width)[:, :length]


@register('sinkhorn')
class SinkhornAttention(Attention):
    """Sinkhorn attention with a sorting network for each head, `scores = relu(relu(pool(x) W_P + b_P) W_B + b_B)`.

    In training Gumbel noise, of the random stream `dropout`, joins the scores before the temperature divides them.

    Attributes:
        block: positions in a block; None for the power of two nearest `√planned_length`.
        temperature: the lower, the closer a sorted block is to one block.
        iterations: of balancing.
    """

    block: int | None = None
    temperature: float = 0.75
    iterations: int = 7

    from_zero = ('iterations',)
    by_content = True
    owns = 'a sorting network'
    draws = True

    @property
    def size(self) -> int:
        """Positions in a block."""
        return root_size(self.planned_length or 1) if self.block is None else self.block

    def setup(self) -> None:
        """Makes the projections and the sorting network."""
        super().setup()
        if self.planned_length is None or not self.temperature > 0:
            raise ValueError(f'set planned_length, and a temperature above 0; got {self.temperature}')
        heads, width, blocks = self.heads, self.head_width, -(-self.planned_length // self.size)
        init = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        axes, shape = ('embed', 'heads', 'head_dim'), (self.width, heads, width)
        self.inner_kernel = parameter(self, 'sort_inner_kernel', init, axes, shape)
        self.inner_bias = parameter(self, 'sort_inner_bias', nn.initializers.zeros, axes[1:], shape[1:])
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)
        axes, shape = ('heads', 'head_dim', 'features'), (heads, width, blocks)
        self.outer_kernel = parameter(self, 'sort_outer_kernel', init, axes, shape)
        self.outer_bias = parameter(self, 'sort_outer_bias', nn.initializers.zeros, axes[::2], shape[::2])

    def attend_from(self, x, q, k, v, *, valid=None, drop=None, noise=None):
        block = min(self.size, x.shape[1])
        settings = {'block': block, 'iterations': self.iterations, 'causal': self.causal}
        pooled = pool(x, block, causal=self.causal)
        scores = self.scores(pooled, pooled.shape[1], noise)
        return attend_sinkhorn(q, k, v, scores, **settings, valid=valid, drop=drop)

    def start(self, x, q, k, v, counts, capacity):
        block = min(self.size, capacity)
        scores = self.scores(pool(x, block, causal=True), -(-capacity // block))
        return start(x, k, v, scores, counts, block=block, iterations=self.iterations)

    def step(self, cache, index, x, q, k, v):
        cache = cache._replace(total=cache.total + x)
        scores = self.scores(cache.total[:, None], cache.k.shape[2])
        return step(cache.sort(scores[:, :, 0], index), index, q * q.shape[-1] ** -0.5, k, v)

    def scores(self, pooled: Float[Array, 'b n e'], blocks: int, noise: Array | None = None) -> Float[Array, 'b h n m']:
        """What the sorting network makes of pooled inputs, for `blocks` blocks, with noise of a random key if given."""
        if blocks > self.outer_bias.shape[1]:
            raise ValueError(f'{blocks} blocks of {self.size} are more than planned_length={self.planned_length}')
        hidden = nn.relu(dot('bne,ehd->bhnd', pooled, self.inner_kernel) + self.inner_bias[:, None])
        scores = nn.relu(dot('bhnd,hdm->bhnm', hidden, self.outer_kernel) + self.outer_bias[:, None])[..., :blocks]
        return (scores if noise is None else scores + jax.random.gumbel(noise, scores.shape)) / self.temperature
