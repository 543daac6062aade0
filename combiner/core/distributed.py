"""Attention over sequences that are cut over the devices of the mesh axis `context`.

Each device has one part of every sequence, of whole blocks, and attends from it. A mechanism exchanges what its parts
need of each other by `ops.parts`: summaries, not tokens. Sequences and heads are split over the other axes of the mesh.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float

from combiner.core import registry
from combiner.core.mechanism import Context, Mechanism
from combiner.kernels.shards import by_shard, keys_to_read
from combiner.ops import parts
from combiner.ops.softmax import Dropout
from combiner.sharding import CONTEXT_AXIS


def attend(
    mechanism: Mechanism,
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l g d'],
    v: Float[Array, 'b l g d'],
    context: Context,
) -> Float[Array, 'b l h d']:
    """Attends by `mechanism.attend`, on each device from its part of the sequences if the mesh in use cuts them.

    A length that parts of whole blocks do not fill is padded at its end. Dropout draws other numbers on each device.

    Raises:
        ValueError: the mesh cuts sequences, and the mechanism does not support it; or dropout is a function.
    """
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if CONTEXT_AXIS in mesh.manual_axes else dict(mesh.shape).get(CONTEXT_AXIS, 1)
    if count == 1:
        return mechanism.attend(q, k, v, context)
    _check(mechanism, context, count)
    k, v = keys_to_read(type(mechanism).__name__, q, k, v)
    batch, length, heads, _ = q.shape
    # Sizes follow from the whole length, not from that of a part.
    mechanism = dataclasses.replace(mechanism, max_length=mechanism.max_length or length)
    missing = -length % (count * mechanism.context_block(length, count))
    valid = context.valid
    if missing:
        _log_padding(type(mechanism).__name__, length, length + missing, count)
        if valid is None and not mechanism.causal:  # causal, no position attends to the end
            valid = jnp.ones((batch, length), bool)
    names, variables = tuple(context.variables or ()), tuple((context.variables or {}).values())
    key, rate = (None, None) if context.drop is None else (context.drop.key, jnp.asarray(context.drop.rate))
    numbers = jnp.arange(batch * heads).reshape(batch, heads)

    def padded(x: Array | None) -> Array | None:
        return None if x is None else jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))

    def attend_part(q, k, v, x, valid, segments, key, rate, numbers, *variables):
        own = None if key is None else jax.random.fold_in(key, numbers[0, 0] * count + parts.index())
        drop = None if own is None else Dropout(own, rate)
        found = dict(zip(names, variables, strict=True)) if context.variables is not None else None
        return mechanism.attend(q, k, v, Context(x, valid, segments, drop, variables=found))

    sequences = [padded(x) for x in (q, k, v, context.x, valid, context.segments)]
    letters = ['bphd', 'bphd', 'bphd', 'bpe', 'bp', 'bp', '', '', 'bh', *('h' + '-' * (x.ndim - 1) for x in variables)]
    return by_shard(attend_part, [*sequences, key, rate, numbers, *variables], letters, 'bphd')[:, :length]


def _check(mechanism: Mechanism, context: Context, count: int) -> None:
    if not mechanism.supports_context:
        able = ', '.join(name for name in registry.names() if registry.resolve(name).supports_context)
        which = ' with these hyper-parameters' if type(mechanism).supports_context else ''
        raise ValueError(
            f'{type(mechanism).__name__}{which} cannot attend across the {count} devices of the mesh axis context; '
            f'set mesh.context=1, or choose one of {able}'
        )
    if context.drop is not None and not isinstance(context.drop, Dropout):
        raise ValueError('across devices, weights are dropped by ops.softmax.Dropout, not by another function')


@functools.cache
def _log_padding(name: str, length: int, whole: int, count: int) -> None:
    message = '%s: sequences of %d positions are padded to %d, whole blocks on each of %d devices'
    logging.warning(message, name, length, whole, count)
