"""Attention over sequences that are cut over the devices of the mesh axis `context`.

Each device has one part of every sequence, of whole blocks, and attends from it. A mechanism exchanges what its parts
need of each other by `ops.parts`: summaries, not tokens. Batch and heads stay with XLA, which splits them over the
other axes of the mesh.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from combiner.core.mechanism import Context, Mechanism
from combiner.ops import parts
from combiner.ops.softmax import Dropout
from combiner.sharding import CONTEXT_AXIS

OF_SEQUENCE, WHOLE = PartitionSpec(None, CONTEXT_AXIS), PartitionSpec()


def attend(
    mechanism: Mechanism,
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    context: Context,
) -> Float[Array, 'b l h d']:
    """Attends by `mechanism.attend`, on each device from its part of the sequences if the mesh in use cuts them.

    A length that parts of whole blocks do not fill is padded at its end. Dropout draws other numbers in each part.

    Raises:
        ValueError: the mesh cuts sequences, and the mechanism does not support it; or dropout is a function.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if CONTEXT_AXIS in mesh.manual_axes else dict(mesh.shape).get(CONTEXT_AXIS, 1)
    if count == 1:
        return mechanism.attend(q, k, v, context)
    _check(mechanism, context, count)
    batch, length = q.shape[:2]
    # Sizes follow from the whole length, not from that of a part.
    mechanism = dataclasses.replace(mechanism, max_length=mechanism.max_length or length)
    missing = -length % (count * mechanism.context_block(length, count))
    valid = context.valid
    if missing:
        _log_padding(type(mechanism).__name__, length, length + missing, count)
        if valid is None and not mechanism.causal:
            valid = jnp.ones((batch, length), bool)

    def padded(x: Array | None) -> Array | None:
        return None if x is None else jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))

    drop = None if context.drop is None else (context.drop.key, jnp.asarray(context.drop.rate))

    def attend_part(sequences: tuple[Any, ...], variables: Any, drop: tuple[Array, Array] | None) -> Array:
        q, k, v, x, valid, segments = sequences
        own_drop = None if drop is None else Dropout(jax.random.fold_in(drop[0], parts.index()), drop[1])
        return mechanism.attend(q, k, v, Context(x, valid, segments, own_drop, variables=variables))

    sequences = tuple(map(padded, (q, k, v, context.x, valid, context.segments)))
    on_parts = jax.shard_map(
        attend_part,
        in_specs=(OF_SEQUENCE, WHOLE, WHOLE),
        out_specs=OF_SEQUENCE,
        axis_names={CONTEXT_AXIS},
        check_vma=False,  # the loops of `ops.slices` and `ops.flash` are primitives of this project
    )
    return jax.jit(on_parts)(sequences, context.variables, drop)[:, :length]


def _check(mechanism: Mechanism, context: Context, count: int) -> None:
    if not mechanism.supports_context:
        from combiner.core import registry  # which imports this module

        able = ', '.join(name for name in registry.names() if registry.resolve(name).supports_context)
        raise ValueError(
            f'{type(mechanism).__name__} cannot attend across the {count} devices of the mesh axis context; '
            f'set mesh.context=1, or choose one of {able}'
        )
    if context.drop is not None and not isinstance(context.drop, Dropout):
        raise ValueError('across devices, weights are dropped by ops.softmax.Dropout, not by another function')


_padded = set()


def _log_padding(name: str, length: int, whole: int, count: int) -> None:
    """Logs once for each shape that sequences are padded."""
    if (name, length, whole) not in _padded:
        _padded.add((name, length, whole))
        logging.warning(
            '%s: sequences of %d positions are padded to %d, whole blocks on each of %d devices', name, length, whole, count
        )
