"""The module around mechanisms whose weights are products of features (see `ops.linear`)."""

import jax.numpy as jnp

from combiner.core.module import Attention
from combiner.ops.linear import Kernel, add_sums, attend_documents, attend_kernel, safe_quotient, sum_features
from combiner.ops.softmax import wide_dtype


class KernelAttention(Attention):
    """A mechanism whose weights are products of features; subclasses supply `kernel_of`.

    There are no weights one by one, and so no dropout of them.

    Attributes:
        chunk: how many positions are computed at once.
    """

    chunk: int = 64

    full_support = True
    has_pattern = False
    supports_segments = True
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

    def init_cache(self, x, q, k, v, counts, capacity):
        k, v = (jnp.moveaxis(a, 2, 1) for a in (k, v))
        prompt = jnp.arange(x.shape[1]) < counts[:, None, None]
        return sum_features(self.kernel_of(q.shape[-1], own=True), k, v, jnp.broadcast_to(prompt, k.shape[:3]))

    def decode_step(self, cache, index, x, q, k, v):
        kernel = self.kernel_of(q.shape[-1], own=True)
        cache = add_sums(cache, sum_features(kernel, k[:, :, None], v[:, :, None]))
        return cache, safe_quotient(*cache.read(kernel.query(q[:, :, None]).astype(wide_dtype(v.dtype))))[
            :, :, 0
        ].astype(v.dtype)
