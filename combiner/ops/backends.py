"""Implementations of softmax attention, and the choice by platform.

| name        | where                                                        | memory            | dropout |
|-------------|--------------------------------------------------------------|-------------------|---------|
| `blockwise` | anywhere (see `flash`)                                       | O(l)              | no      |
| `dense`     | anywhere (`softmax.attend_full`)                                | O(l²)             | yes     |
| `cudnn`     | GPU, bfloat16 or float16, head width a multiple of 8 to 128  | O(l), masks O(l²) | no      |
| `splash`    | one TPU device                                               | O(l)              | no      |
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Bool, Float, Int

from combiner.ops.blocks import block_segment_ids
from combiner.ops.chunking import target

IMPLEMENTATIONS = ('blockwise', 'dense', 'cudnn', 'splash')
BEST_FIRST = ('cudnn', 'splash', 'blockwise', 'dense')
SPLASH_BLOCK = 128  # the shortest block of the kernel


def choose(implementation: str | None, q: Float[Array, 'b l h d'], *, dropping: bool = False) -> str:
    """Returns the implementation to use: `implementation`, or the best on the platform. Logs it once, with the reason.

    Args:
        implementation: one of `IMPLEMENTATIONS`; None for the best.
        q: queries, whose type and head width matter.
        dropping: whether weights are dropped, which only `dense` supports.

    Raises:
        ValueError: the implementation is unknown, or does not support this input on this platform.
    """
    cannot = {name: _reason(name, q, dropping=dropping) for name in IMPLEMENTATIONS}
    if implementation is None:
        implementation = next(name for name in BEST_FIRST if not cannot[name])
        better = BEST_FIRST[: BEST_FIRST.index(implementation)]
        why = '; '.join(f'{name} {cannot[name]}' for name in better) or 'the best there is'
    elif implementation not in cannot:
        raise ValueError(f'unknown implementation {implementation!r}; choose {", ".join(IMPLEMENTATIONS)}, or None')
    elif cannot[implementation]:
        raise ValueError(f'implementation={implementation!r} {cannot[implementation]}; choose another, or None')
    else:
        why = f'implementation={implementation!r}'
    _announce(implementation, target().platform, why)
    return implementation


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

    With padding or segments the kernel reads a mask `[b, 1, l, l]`, and needs an even length.

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
    kernel: Any = splash.make_splash_mha_single_device(mask, interpret=interpret)
    ids = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
    return jnp.moveaxis(jax.vmap(kernel)(q, k, v, ids), 1, 2)[:, :length]


def _segment_ids(q, size: int, causal: bool, valid, segments) -> Int[Array, 'b l'] | None:
    """Returns the segment ids of positions, padded to a multiple of `size`; None if all are equal."""
    segment_ids = block_segment_ids(q.shape[0], q.shape[1], size, causal=causal, valid=valid, segments=segments)
    return None if segment_ids is None else segment_ids.reshape(len(q), -1)


def _whole(x: Float[Array, 'b l h d'], size: int) -> Float[Array, 'b n h d']:
    """Pads to a length that `size` divides."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))


def _reason(name: str, q: Array, *, dropping: bool) -> str:
    """Returns the reason why an implementation cannot be used; empty if it can."""
    backend, devices = target()
    if dropping and name != 'dense':
        return 'has no dropout of weights'
    if name == 'cudnn' and backend != 'gpu':
        return f'needs a GPU, this is {backend}'
    if name == 'cudnn' and (q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128):
        return f'takes bfloat16 or float16 and a head width of 8, 16, … 128, not {q.dtype} and {q.shape[-1]}'
    if name == 'splash' and backend != 'tpu':
        return f'needs a TPU, this is {backend}'
    if name == 'splash' and devices > 1:
        return f'is not sharded here and runs on one device, not {devices}'
    return ''


@functools.cache
def _announce(name: str, backend: str, why: str) -> None:
    logging.info('Softmax attention: %s, on %s (%s)', name, backend, why)
