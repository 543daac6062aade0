"""Mechanisms whose weights are products of features (see `ops.linear`)."""

import jax.numpy as jnp

from combiner.core.mechanism import Context, Mechanism
from combiner.ops.linear import Kernel, add_sums, attend_documents, attend_kernel, safe_quotient, sum_features
from combiner.ops.softmax import wide_dtype


class Kernelized(Mechanism):
    """A mechanism whose weights are products of features; subclasses supply `kernel_of`.

    It computes no single weights, and so supports no dropout of them.

    Attributes:
        chunk: number of positions computed at once.
    """

    chunk: int = 64

    full_support = True
    supports_segments = True
    supports_dropout = False

    def kernel_of(self, width: int, context: Context) -> Kernel:
        """Returns the feature maps for heads of this width."""
        raise NotImplementedError

    def attend(self, q, k, v, context):
        if context.drop is not None:
            raise ValueError(f'{type(self).__name__} has no weights to drop: set the dropout of attention to 0')
        kernel = self.kernel_of(q.shape[-1], context)
        chunk, causal, valid, segments = self.chunk, self.causal, context.valid, context.segments
        if segments is None:
            return attend_kernel(q, k, v, kernel, chunk=chunk, causal=causal, valid=valid)
        return attend_documents(q, k, v, kernel, chunk=chunk, causal=causal, valid=valid, segments=segments)

    def init_cache(self, q, k, v, context, counts, capacity):
        prompt = jnp.arange(q.shape[1]) < counts[:, None, None]
        kernel = self.kernel_of(q.shape[-1], context)
        k, v = (jnp.moveaxis(a, 2, 1) for a in (k, v))
        return sum_features(kernel, k, v, jnp.broadcast_to(prompt, k.shape[:3]))

    def decode_step(self, cache, index, q, k, v, context):
        kernel = self.kernel_of(q.shape[-1], context)
        cache = add_sums(cache, sum_features(kernel, k[:, :, None], v[:, :, None]))
        query = kernel.query(q[:, :, None]).astype(wide_dtype(v.dtype))
        return cache, safe_quotient(*cache.read(query))[:, :, 0].astype(v.dtype)
