"""Runs a function on the shard of every device: sequences and heads are independent, so no device needs another's.

XLA cannot split a fused kernel. `by_shard` splits its arrays by the axes of `sharding.make_mesh`. Query heads are split
with the key head that they share.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from combiner.ops.chunking import target
from combiner.ops.softmax import repeat_heads
from combiner.sharding import BATCH_AXES, CONTEXT_AXIS, HEAD_AXES

# The mesh axes that split a letter; all other letters are whole on every device. `p`: positions, cut into parts.
AXES = {'b': BATCH_AXES, 'h': HEAD_AXES, 'p': (CONTEXT_AXIS,)}


def by_shard(body: Callable[..., Array], arrays: Sequence[Array | None], letters: Sequence[str], out: str) -> Array:
    """Computes `body(*arrays)` on the shards of all devices of the mesh in use; without a mesh, at once.

    A mesh axis that does not divide its array axis does not split it: its devices compute the same. Axes of one letter
    may have several sizes, such as of query heads and key heads; the least, which divides the others, decides.

    Args:
        body: independent along the letters `b` and `h`; along `p`, it exchanges by `ops.parts` what the parts need.
        arrays: its arguments; None for a missing one.
        letters: the axes of each argument, one letter each, such as 'blhd'.
        out: the axes of the result.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return body(*arrays)
    sizes: dict[str, int] = {}
    for array, axes in zip(arrays, letters, strict=True):
        for letter, size in zip(axes, () if array is None else array.shape, strict=array is not None):
            sizes[letter] = min(size, sizes.get(letter, size))
    split = {letter: _dividing(AXES[letter], size, mesh) for letter, size in sizes.items() if letter in AXES}
    # An axis of one device splits nothing, but gradients would be summed over it if no array named it.
    named = {name for names in split.values() for name in names}
    split['b'] += tuple(name for name in _automatic(mesh) if mesh.shape[name] == 1 and name not in named)

    def spec(axes: str) -> PartitionSpec:
        return PartitionSpec(*(split.get(letter) or None for letter in axes))

    in_specs = tuple(spec(axes) for axes in letters)
    return jax.shard_map(body, in_specs=in_specs, out_specs=spec(out), check_vma=False)(*arrays)


def keys_to_read(
    name: str, q: Float[Array, 'b l h d'], k: Float[Array, 'b l g d'], v: Float[Array, 'b l g d'], reason: str = ''
) -> tuple[Array, Array]:
    """Returns keys and values as they are, or repeated for all query heads, for a `reason` or as the mesh needs it.

    Logs it once if they are repeated, with the `name` of the mechanism.
    """
    heads, key_heads = q.shape[2], k.shape[2]
    if parts('h', key_heads) != parts('h', heads):
        reason = f'the mesh splits query heads into {parts("h", heads)} parts, key heads into {parts("h", key_heads)}'
    if not reason:
        return k, v
    log_repeated(name, key_heads, heads, reason)
    return repeat_heads(k, heads), repeat_heads(v, heads)


@functools.cache
def log_repeated(name: str, key_heads: int, heads: int, reason: str) -> None:
    """Says once that keys and values are repeated."""
    logging.warning('%s: %d key heads are repeated for %d query heads: %s', name, key_heads, heads, reason)


def parts(letter: str, size: int) -> int:
    """Returns into how many parts `by_shard` splits an axis of this letter and size."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return 1
    return math.prod(mesh.shape[name] for name in _dividing(AXES[letter], size, mesh))


def refuse_to_shard() -> str:
    """Returns the reason why `by_shard` cannot split a kernel over the devices; empty if it can."""
    mesh, devices = jax.sharding.get_abstract_mesh(), target().devices
    if devices == 1:
        return ''
    if mesh.empty:
        return f'needs a mesh, as {devices} devices may share its arrays: jax.set_mesh(combiner.sharding.make_mesh())'
    if not set(mesh.axis_names) & {name for axes in AXES.values() for name in axes}:
        return f'needs a mesh with the axes of combiner.sharding.make_mesh, not {", ".join(map(str, mesh.axis_names))}'
    return ''


def _dividing(names: Sequence[str], size: int, mesh: Any) -> tuple[str, ...]:
    """Returns the automatic axes of the mesh whose number of devices together divides `size`, as many as come first."""
    chosen: tuple[str, ...] = ()
    for name in _automatic(mesh):
        more = (*chosen, name)
        if name in names and size % math.prod(mesh.shape[one] for one in more) == 0:
            chosen = more
    return chosen


def _automatic(mesh: Any) -> list[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind != AxisType.Manual]
