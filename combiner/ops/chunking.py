"""Computation of a sequence in chunks, so that the data of a step stay in a CPU's cache.

A mechanism's logits are many times its input. If a CPU computes them for all positions at once, they are written to
main memory and read back, and the system has to find new pages for them. A step computes the logits of some blocks and
the weighted values. It keeps nothing for the backward pass, which computes them again: less memory, and nevertheless
less time. Accelerators are fastest with all the work at once: there, one step computes everything.

Where a position needs positions from the whole sequence (both axes of a grid), a step takes some heads instead of some
blocks. A step cuts them out of the input and writes its part of the result in place (see `slices`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Shaped

from combiner.ops.slices import Chunks, Cut, map_slices

CHUNK_LOGITS = 2**18  # 1 MiB of float32: with its exponentials and values it fits into a core's second-level cache


class Target(NamedTuple):
    """The devices for which a program is traced: 'cpu', 'gpu' or 'tpu', how many may share arrays, and their model."""

    platform: str
    devices: int
    kind: str = ''


def target() -> Target:
    """Returns the devices of the mesh in use (`jax.set_mesh`), or without a mesh JAX's default device.

    A mesh may have devices that are not present (`jax.experimental.topologies`), for which a program is compiled ahead
    of time. Without a mesh any device of the process may hold a part of an array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device is not None:
        return Target(mesh.abstract_device.platform, mesh.size, mesh.abstract_device.device_kind)
    default: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue] made when JAX starts
    default = jax.devices(default)[0] if isinstance(default, str) else default or jax.devices()[0]
    return Target(default.platform, default.client.device_count(), default.device_kind)


def plan_chunks(logits: int, blocks: int, *, at_once: bool = False) -> Chunks:
    """Plans the chunks of the blocks of a sequence: on a CPU of `CHUNK_LOGITS` each, elsewhere one.

    Steps of equal size are preferred, if a number of steps near the best one divides the number of blocks: the last of
    unequal steps is padded, which copies the input.

    Args:
        logits: the number of logits in all.
        blocks: the number of blocks of a sequence.
        at_once: whether to take all blocks in one step, with any number of logits.
    """
    wanted = 1 if at_once or target().platform != 'cpu' else max(1, min(logits // CHUNK_LOGITS, blocks))
    near = (*range(wanted, wanted // 2, -1), *range(wanted + 1, 2 * wanted))
    count = next((count for count in near if blocks % count == 0), wanted)
    return Chunks(blocks, -(-blocks // count))


def map_heads(
    attend: Callable[..., Array],
    q: Float[Array, 'b l h d'],
    k: Float[Array, 'b l h d'],
    v: Float[Array, 'b l h d'],
    *segment_ids: Shaped[Array, 'b l'] | None,
    keys: int,
    at_once: bool = False,
) -> Float[Array, 'b l h d']:
    """Computes `attend(q, k, v, *segment_ids)` for some heads of some sequences at a time.

    All at once with more than one device: heads and sequences may be sharded over them, and a loop over a sharded axis
    would gather it.

    Args:
        attend: computes every head of every sequence in the same way.
        q: queries.
        k: keys.
        v: values.
        *segment_ids: of positions, or masks, without derivative.
        keys: number of keys to which a query attends; with the size of `q`, the number of logits.
        at_once: whether to compute everything in one step, with any number of logits.
    """
    batch, length, heads, _ = q.shape
    row_logits, at_once = length * heads * keys, at_once or target().devices > 1
    by_heads = plan_chunks(batch * row_logits, heads, at_once=at_once)
    by_rows = plan_chunks(batch * row_logits // heads, batch, at_once=at_once or by_heads.count < heads)
    leaves, tree = jax.tree.flatten((q, k, v, *segment_ids))
    cuts = [(Cut(0), Cut(2) if x.ndim == 4 else None) for x in leaves]

    def of_slices(*slices: Array) -> list[Array]:
        return [attend(*jax.tree.unflatten(tree, slices))]

    return map_slices(of_slices, (by_rows, by_heads), leaves, cuts, (Cut(0), Cut(2)))[0]
