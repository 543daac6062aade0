"""Kernel attention over a whole sequence: what `linear` and `performer` have in common (see `feature_kernels`).

Letters: as in `layout`, and `f` features.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from combiner.attention.base import Attention
from combiner.attention.layout import flatten, merge, split, split_valid
from combiner.attention.steps import step_count, visit
from combiner.baselines.feature_kernels import Kernel, attend_chunks, nothing_like, plus, quotient, summed
from combiner.baselines.kernel_documents import attend_documents


def attend_kernel(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    kernel: Kernel,
    *,
    chunk: int,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
) -> Float[Array, 'b l h d']:
    """Attention with weights `φ(q_i)·φ(k_j)`, divided by their sum, over all `j`, or if causal `j ≤ i`.

    Within a chunk one masked product of its queries and keys, and the sums over all chunks before. O(l·f·(d + chunk))
    time if causal, else O(l·f·d), and O(l·f·d / chunk) memory. A query whose weights all vanish, because it sees only
    padding or they are too small for float32, gets zeros. On a CPU the chunks are visited in steps (see `steps`).

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        kernel: the feature maps.
        chunk: positions that are computed at once. The result does not depend on it.
        causal: whether a position sees only itself and what is before it.
        valid: positions that are no padding; padding must hold finite numbers.
    """
    batch, length, heads, width = q.shape
    chunk = min(chunk, length)
    inside = split_valid(valid, batch, length, chunk, causal=causal)
    q, k, v = (flatten(x, chunk) for x in (q, k, v))
    chunks = len(q) // (batch * chunk)
    steps = step_count(len(q) * heads * (2 * kernel.size + chunk), chunks)

    def collect(k, v, inside):
        """The sums over each of some chunks, chunks first."""
        k, v = (split(x[None], chunk) for x in (k, v))
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), summed(kernel, k, v, inside))

    def attend_all(q):
        """The attended values of some positions, which see everything."""
        by_row = jnp.moveaxis(q.reshape(batch, -1, heads, width), 2, 1)
        attended = quotient(*everything.read(kernel.query(by_row).astype(v.dtype)))
        return jnp.moveaxis(attended, 1, 2).reshape(q.shape).astype(v.dtype)

    def attend_past(q, k, v, inside, past):
        """The attended values of some chunks, which see what is before."""
        q, k, v = (split(x[None], chunk) for x in (q, k, v))
        past = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), past)
        return merge(attend_chunks(kernel, q, k, v, inside, past), q.shape[1] * chunk)[0]

    sums = visit(collect, steps, batch, k, v, inside)
    in_order = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(batch, chunks, *x.shape[1:]), 1, 0), sums)
    nothing = nothing_like(jax.tree.map(lambda x: x[0], in_order))
    everything, before = lax.scan(lambda sums, one: (plus(sums, one), sums if causal else None), nothing, in_order)
    if causal:
        past = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), before)
        attended = visit(attend_past, steps, batch, q, k, v, inside, past)
    else:
        attended = visit(attend_all, steps, batch, q)
    return attended.reshape(batch, -1, heads, width)[:, :length]


class KernelAttention(Attention):
    """A mechanism whose weights are products of features; subclasses supply `kernel_of`.

    There are no weights one by one, and so no dropout of them.

    Attributes:
        chunk: how many positions are computed at once.
    """

    chunk: int = 64

    full_support = True
    partitions = False
    packs = True
    has_weights = False

    def kernel_of(self, width: int, *, own: bool) -> Kernel:
        """The feature maps for heads of this width, with the module's own variables, or (not `own`) without."""
        raise NotImplementedError

    def attend(self, q, k, v, **masks):
        return self._attend(q, k, v, own=False, **masks)

    def attend_from(self, x, q, k, v, **masks):
        del x
        return self._attend(q, k, v, own=True, **masks)

    def _attend(self, q, k, v, *, own, valid=None, segments=None, drop=None):
        if drop is not None:
            raise ValueError(f'{type(self).__name__} has no weights to drop: set the dropout of attention to 0')
        kernel = self.kernel_of(q.shape[-1], own=own)
        options = {'chunk': self.chunk, 'causal': self.causal, 'valid': valid}
        if segments is None:
            return attend_kernel(q, k, v, kernel, **options)
        return attend_documents(q, k, v, kernel, segments=segments, **options)

    def start(self, x, q, k, v, counts, capacity):
        k, v = (jnp.moveaxis(a, 2, 1) for a in (k, v))
        prompt = jnp.arange(x.shape[1]) < counts[:, None, None]
        return summed(self.kernel_of(q.shape[-1], own=True), k, v, jnp.broadcast_to(prompt, k.shape[:3]))

    def step(self, cache, index, x, q, k, v):
        kernel = self.kernel_of(q.shape[-1], own=True)
        cache = plus(cache, summed(kernel, k[:, :, None], v[:, :, None]))
        return cache, quotient(*cache.read(kernel.query(q[:, :, None]).astype(v.dtype)))[:, :, 0].astype(v.dtype)
