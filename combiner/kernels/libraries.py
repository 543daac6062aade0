"""Softmax attention by libraries: cuDNN and JAX's splash attention, on the shard of every device.

Each has a condition, `refuse_…`, for `choice.choose`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from combiner.kernels.choice import refuse_for_tpu, refuse_old_gpu
from combiner.kernels.shards import by_shard
from combiner.ops.blocks import block_segment_ids
from combiner.ops.chunking import target
from combiner.ops.softmax import Drop

SPLASH_BLOCKS = (512, 256, 128)  # of splash attention, the best first: a step of its default, 128, has little work
SPLASH_BLOCK = SPLASH_BLOCKS[-1]  # the shortest
DEFAULT_PRECISION = ('default', 'bfloat16', 'BF16_BF16_F32')  # other names ask for more of bfloat16
MASK_BYTES = 2**30  # most memory of a device for a mask and its gradient, which are O(l²)


def on_shards(attend: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a function that attends on the shard of every device; it takes `drop`, which must be None."""

    def attend_shards(q, k, v, *, causal, valid=None, segments=None, drop=None):
        del drop

        def body(q, k, v, valid, segments):
            return attend(q, k, v, causal=causal, valid=valid, segments=segments)

        return by_shard(body, (q, k, v, valid, segments), ('blhd', 'blhd', 'blhd', 'bl', 'bl'), 'blhd')

    return attend_shards


def refuse_splash(q: Float[Array, 'b l h d'], *, drop: Drop | None, **options: Any) -> str:
    """Returns the reason why splash attention cannot be used; empty if it can."""
    precision: Any = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue] made at start
    if q.dtype == jnp.bfloat16 and precision not in (None, *DEFAULT_PRECISION):
        return f'multiplies bfloat16 in one precision alone, and jax_default_matmul_precision is {precision}'
    return refuse_for_tpu(q) or refuse_dropout(q, drop=drop, **options)


def refuse_dropout(q: Float[Array, 'b l h d'], *, drop: Drop | None, **options: Any) -> str:
    """Returns the reason why a form without dropout cannot be used; empty if it can."""
    del q, options
    return '' if drop is None else 'has no dropout of weights'


def refuse_cudnn(q: Float[Array, 'b l h d'], *, drop: Drop | None, **options: Any) -> str:
    """Returns the reason why cuDNN cannot be used; empty if it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        return f'takes bfloat16 or float16 and a head width of 8, 16, … 128, not {q.dtype} and {q.shape[-1]}'
    return refuse_old_gpu() or _refuse_mask(q, **options) or refuse_dropout(q, drop=drop)


def _refuse_mask(q: Float[Array, 'b l h d'], valid: Any = None, segments: Any = None, **options: Any) -> str:
    """Returns the reason why the mask of padding or documents is too large: cuDNN reads it, and writes its gradient."""
    del options
    if valid is None and segments is None:
        return ''
    sequences = -(-q.shape[0] // target().devices)
    size = 2 * q.dtype.itemsize * sequences * q.shape[1] ** 2
    return f'would need {size / 2**30:.0f} GiB for a mask of padding or documents' if size > MASK_BYTES else ''


def attend_by_library(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    implementation: str = 'cudnn',
) -> Float[Array, 'b l h d']:
    """Computes `softmax(q·k/√d) v` by `jax.nn.dot_product_attention`, on a GPU cuDNN's flash attention.

    With padding or segments the kernel reads a mask `[b, 1, l, l]`, and needs an even length; `refuse_cudnn` bounds
    its memory.

    Args:
        q: queries, not scaled.
        k: keys.
        v: values.
        causal: whether a position attends to itself and earlier positions only.
        valid: positions that are no padding; padding must hold finite numbers.
        segments: packed documents, which do not attend to each other.
        implementation: of `jax.nn.dot_product_attention`.
    """
    length = q.shape[1]
    segment_ids = _segment_ids(q, 2, causal, valid, segments)
    mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    q, k, v = (_whole(x, 2) for x in (q, k, v))
    options = {'mask': mask, 'is_causal': causal, 'implementation': implementation}
    return jax.nn.dot_product_attention(q, k, v, **options)[:, :length]


def attend_splash(
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *,
    causal: bool,
    valid: Bool[Array, 'b l'] | None = None,
    segments: Int[Array, 'b l'] | None = None,
    interpret: bool = False,
) -> Float[Array, 'b l h d']:
    """Computes `softmax(q·k/√d) v` by JAX's splash attention for TPUs; arguments as above.

    `interpret` runs the kernel as plain operations, where there is no TPU.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # only this function needs Pallas

    length, heads = q.shape[1:3]
    segment_ids = _segment_ids(q, SPLASH_BLOCK, causal, valid, segments)
    q, k, v = (jnp.moveaxis(_whole(x, SPLASH_BLOCK), 2, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
    shape = (q.shape[2], q.shape[2])
    mask = splash.MultiHeadMask([splash.CausalMask(shape) if causal else splash.FullMask(shape)] * heads)
    block = next(size for size in SPLASH_BLOCKS if shape[0] % size == 0)
    sides = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
    sizes = splash.BlockSizes(**{f'block_{side}': block for side in sides})  # pyright: ignore[reportArgumentType]
    kernel: Any = splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
    ids = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
    return jnp.moveaxis(jax.vmap(kernel)(q, k, v, ids), 1, 2)[:, :length]


def _segment_ids(q, size: int, causal: bool, valid, segments) -> Int[Array, 'b l'] | None:
    """Returns the segment ids of positions, padded to a multiple of `size`; None if all are equal."""
    segment_ids = block_segment_ids(q.shape[0], q.shape[1], size, causal=causal, valid=valid, segments=segments)
    return None if segment_ids is None else segment_ids.reshape(len(q), -1)


def _whole(x: Float[Array, 'b l h d'], size: int) -> Float[Array, 'b n h d']:
    """Pads to a length that `size` divides."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
