"""Packed documents: their numbers, and the isolation of documents that hold a NaN or an infinity.

Both act before any mechanism receives a document (`functional`, `core.module`), so that all mechanisms have them.

A mask alone does not isolate: the weight of a masked value is zero, and zero times NaN is NaN. So documents that hold
a NaN or an infinity are zeros while a mechanism runs, and their outputs are NaN after it.

Inside a mechanism padding and packed documents are one concept: a position has a segment id, which is the number of
its document, or `PADDING_ID` for padding.

Letters: `b` batch, `l` length, `m` blocks, `c` position in a block.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

PADDING_ID = int(np.iinfo(np.int32).min)


def without_padding(x: Float[Array, 'b l *rest'], valid: Bool[Array, 'b l'] | None) -> Float[Array, 'b l *rest']:
    """Replaces padding by zeros."""
    return x if valid is None else jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, 0)


def checked_valid(valid: ArrayLike, shape: tuple[int, ...]) -> Bool[Array, 'b l']:
    """Returns `valid` as an array.

    Raises:
        ValueError: it is not bool, or not of this shape.
    """
    found = jnp.asarray(valid)
    if found.shape != shape or found.dtype != bool:
        raise ValueError(f'valid must be bool{list(shape)}, got {found.dtype}{list(found.shape)}')
    return found


def number_documents(segments: ArrayLike, shape: tuple[int, ...]) -> Int[Array, 'b l']:
    """Numbers the documents of every row 1, 2, 3, … in their order; each run of equal numbers is one document.

    Equal numbers in separate runs are two documents. In a NumPy array, integers of any width are distinct: they are
    compared before JAX cuts them to 32 bits. An array that is in JAX already has lost the higher bits. 0 is never a
    number, so that the padding of a block is in no document.

    Args:
        segments: the given numbers, any integers.
        shape: the batch and the length.

    Raises:
        ValueError: the shape differs, or the numbers are no integers.
    """
    given = segments if isinstance(segments, jax.Array) else np.asarray(segments)
    if given.shape != shape or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ValueError(
            f'segments must be int{list(shape)}, got {given.dtype}{list(given.shape)}: '
            'one integer of at most 64 bits for each position'
        )
    xp = jnp if isinstance(given, jax.Array) else np
    begins = xp.pad(given[:, 1:] != given[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jnp.asarray(xp.cumsum(begins, axis=1, dtype=np.int32))


def finite_documents(
    segments: Int[Array, 'b l'], valid: Bool[Array, 'b l'] | None, *factors: tuple[Array, ...]
) -> Bool[Array, 'b l']:
    """Marks the positions of documents that hold finite numbers only, O(l).

    The product of the largest magnitudes in a document of each group of arrays `[b, l, …, d]`, times the count of terms
    in a sum over them, must be finite too: a document with finite queries and keys but infinite products is broken too.
    Its weights would be NaN, and so would the gradient of other documents' values.

    Args:
        segments: from `number_documents`.
        valid: positions that are no padding; padding may hold any numbers.
        *factors: groups of arrays.
    """

    def peak(x: Array) -> Float[Array, 'b l']:
        top = jnp.abs(lax.stop_gradient(x)).max(axis=tuple(range(2, x.ndim)))
        top = top.astype(jnp.promote_types(x.dtype, jnp.float32))
        return without_padding(jnp.where(jnp.isfinite(top), top, jnp.inf), valid)

    def of_documents(top: Float[Array, 'l x'], number: Int[Array, ' l']) -> Float[Array, 'l x']:
        return jax.ops.segment_max(top, number, num_segments=len(number) + 1, indices_are_sorted=True)[number]

    tops = jnp.stack([peak(x) for group in factors for x in group], axis=-1)
    tops = iter(jnp.moveaxis(jax.vmap(of_documents)(tops, segments), -1, 0))
    sound = jnp.ones(segments.shape, bool)
    for group in factors:
        terms = group[0].shape[1] * group[0].shape[-1] if len(group) > 1 else 1
        sound &= jnp.isfinite(functools.reduce(operator.mul, [next(tops) for _ in group]) * terms)
    return sound


def finite_inputs(
    segments: Int[Array, 'b l'],
    valid: Bool[Array, 'b l'] | None,
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l g d'],
    v: Float[Array, 'b l g d'],
) -> Bool[Array, 'b l']:
    """Applies `finite_documents` to queries, keys and values, for all products in a mechanism, squares of norms too."""
    return finite_documents(segments, valid, (q, k, v), (q, q), (k, k))


def mark_broken(
    out: Float[Array, 'b l *rest'], sound: Bool[Array, 'b l'] | None, valid: Bool[Array, 'b l'] | None
) -> Float[Array, 'b l *rest']:
    """Replaces the outputs of broken documents by NaN; padding stays zero."""
    if sound is None:
        return out
    kept = sound if valid is None else sound | ~valid
    return jnp.where(kept.reshape(kept.shape + (1,) * (out.ndim - 2)), out, jnp.nan)


def edge_id(segment_ids: Int[Array, '*m c'], *, last: bool) -> Int[Array, '*m']:
    """Returns the last (or first) segment id that is not `PADDING_ID`; `PADDING_ID` if all are."""
    if last:
        segment_ids = segment_ids[..., ::-1]
    at = (segment_ids != PADDING_ID).argmax(axis=-1, keepdims=True)
    return jnp.take_along_axis(segment_ids, at, axis=-1)[..., 0]


def same_segment(
    segment_ids: Int[Array, '*m c'] | None,
    others: Int[Array, '*m n'] | None,
    mask: Bool[Array, '...'] | None = None,
) -> Bool[Array, '...'] | None:
    """Returns the mask from `c` to `n`, where segment ids are equal; ids None are equal, a mask None is all."""
    if segment_ids is None or others is None:
        return mask
    same = segment_ids[..., :, None] == others[..., None, :]
    return same if mask is None else mask & same
