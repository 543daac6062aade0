"""Computation of a sequence in chunks, so that the data of a step stay in a CPU's cache.

A mechanism's logits are many times its input. If a CPU computes them for all positions at once, they are written to
main memory and read back, and the system has to find new pages for them. A step computes the logits of some blocks and
the weighted values. It keeps nothing for the backward pass, which computes them again: less memory, and nevertheless
less time. Accelerators are fastest with all the work at once: there, one step computes everything.

Where a position needs positions from the whole sequence (both axes of a grid), a step takes some heads instead of some
blocks. It cuts them out of the input and writes its part of the result in place: a map would copy every input and
output array.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Shaped

from combiner.ops.primitives import differentiate, wanted

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


class Chunks(NamedTuple):
    """The chunks into which the blocks of a sequence are grouped.

    Attributes:
        blocks: the number of blocks of a sequence.
        size: the number of blocks of a step; the last step may have fewer.
    """

    blocks: int
    size: int

    @property
    def count(self) -> int:
        """Returns the number of steps."""
        return -(-self.blocks // self.size)


Plan = tuple[Chunks, Chunks]  # of the heads, and of the sequences of a batch


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


def map_chunks(body: Callable[..., Any], steps: Chunks, batch: int, *arrays: Any) -> Any:
    """Computes `body(*arrays)` in steps; the arrays may be trees of arrays.

    The first axis of every array, and of every result of `body`, has one element for each position or block, sequence
    after sequence. A step gets the elements of `steps.size` blocks of every sequence. The last step is padded with
    zeros; their results are dropped.
    """
    if steps.count == 1:
        return body(*arrays)
    whole = steps.count * steps.size

    def cut(x: Array) -> Array:
        x = x.reshape(batch, steps.blocks, -1, *x.shape[1:])
        x = jnp.pad(x, ((0, 0), (0, whole - steps.blocks), *((0, 0),) * (x.ndim - 2)))
        pieces = jnp.moveaxis(x.reshape(batch, steps.count, -1, *x.shape[3:]), 1, 0)
        return pieces.reshape(steps.count, -1, *x.shape[4:])

    def join(x: Array) -> Array:
        pieces = jnp.moveaxis(x.reshape(steps.count, batch, -1, *x.shape[2:]), 0, 1)
        pieces = pieces.reshape(batch, whole, -1, *x.shape[2:])[:, : steps.blocks]
        return pieces.reshape(-1, *x.shape[2:])

    def step(pieces: Any) -> Any:
        pieces = jax.tree.map(lambda piece, x: piece.reshape(-1, *x.shape[1:]), pieces, arrays)
        return body(*pieces)

    # The first two axes are merged before the cut: if a step takes one block, XLA would copy all for an axis of one.
    return jax.tree.map(join, lax.map(jax.checkpoint(step, prevent_cse=False), jax.tree.map(cut, arrays)))


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
    would gather it. The backward pass computes every step again.

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
    row_logits = length * heads * keys
    by_heads = plan_chunks(batch * row_logits, heads, at_once=at_once or target().devices > 1)
    by_rows = plan_chunks(batch * row_logits // heads, batch, at_once=at_once or by_heads.count < heads)
    if by_heads.count * by_rows.count == 1:
        return attend(q, k, v, *segment_ids)
    given = [ids is not None for ids in segment_ids]

    def attend_some(q: Array, k: Array, v: Array, *present: Array) -> Array:
        remaining = iter(present)
        return attend(q, k, v, *(next(remaining) if there else None for there in given))

    present = [ids for ids in segment_ids if ids is not None]
    return _attend(attend_some, (by_heads, by_rows), q, k, v, *present)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(attend: Callable[..., Array], plan: Plan, q: Array, k: Array, v: Array, *segment_ids: Array) -> Array:
    """Attends for some heads of some sequences at a time, and writes each part in its place."""
    return _in_place(lambda *parts: [attend(*parts)], plan, [v], [q, k, v], segment_ids)[0]


@_attend.defjvp
def _attend_tangent(attend, plan, primals, tangents):
    changes = _tangent_p.bind(*primals, *tangents[:3], attend=attend, plan=plan)
    return _attend(attend, plan, *primals), changes


def _in_place(
    body: Callable[..., Sequence[Array]],
    plan: Plan,
    like: Sequence[Array],
    arrays: Sequence[Array],
    segment_ids: Sequence[Array],
) -> list[Array]:
    """Computes `body` for some heads of some sequences at a time; the results have the shapes of `like`."""
    by_heads, by_rows = plan

    def step(written: list[Array], at: Array) -> tuple[list[Array], None]:
        """Computes one part and writes it."""
        # Near the end a slice starts earlier, so that it fits: some heads are computed twice.
        start = (at // by_heads.count * by_rows.size, 0, at % by_heads.count * by_heads.size, 0)

        @partial(jax.checkpoint, prevent_cse=False)
        def part(*arrays: Array) -> list[Array]:
            size = (by_rows.size, arrays[0].shape[1], by_heads.size)
            parts = [lax.dynamic_slice(x, start, (*size, x.shape[3])) for x in arrays]
            own = [lax.dynamic_slice_in_dim(x, start[0], by_rows.size) for x in segment_ids]
            return list(body(*parts, *own))

        new = part(*arrays)
        return [lax.dynamic_update_slice(*each, start) for each in zip(written, new, strict=True)], None

    return lax.scan(step, list(map(jnp.zeros_like, like)), jnp.arange(by_rows.count * by_heads.count))[0]


# Reverse mode transposes a tangent. JAX would transpose the loop, and add a gradient of the size of all heads in every
# step; a primitive has a rule instead, which writes the gradient of each head in its place.
_tangent_p = Primitive('map_heads_tangent')


def _tangent(*arguments: Array, attend: Callable[..., Array], plan: Plan) -> Array:
    """Returns the change of `_attend`, linear in the last three arguments, the tangents of q, k and v."""
    *inputs, dq, dk, dv = arguments

    def change(q: Array, k: Array, v: Array, dq: Array, dk: Array, dv: Array, *own: Array) -> list[Array]:
        return [jax.jvp(lambda *qkv: attend(*qkv, *own), (q, k, v), (dq, dk, dv))[1]]

    return _in_place(change, plan, [dv], [*inputs[:3], dq, dk, dv], inputs[3:])[0]


def _transpose_tangent(cotangent, *arguments, attend, plan):
    *inputs, dq, dk, dv = arguments

    def gradients(q: Array, k: Array, v: Array, cotangent: Array, *own: Array) -> Sequence[Array]:
        return jax.vjp(lambda *qkv: attend(*qkv, *own), q, k, v)[1](cotangent)

    pulled = _in_place(gradients, plan, inputs[:3], [*inputs[:3], ad.instantiate_zeros(cotangent)], inputs[3:])
    return [None] * len(inputs) + wanted(pulled, (dq, dk, dv))


def _differentiate_tangent(primals, tangents, *, attend, plan):
    return differentiate(partial(_tangent, attend=attend, plan=plan), primals, tangents)


def _batch_tangent(arguments, axes, *, attend, plan):
    return jax.vmap(partial(_tangent, attend=attend, plan=plan), axes)(*arguments), 0


_tangent_p.def_impl(jax.jit(_tangent, static_argnames=('attend', 'plan')))
_tangent_p.def_abstract_eval(lambda *arguments, **_: arguments[-1])
mlir.register_lowering(_tangent_p, mlir.lower_fun(_tangent, multiple_results=False))
ad.primitive_transposes[_tangent_p] = _transpose_tangent
ad.primitive_jvps[_tangent_p] = _differentiate_tangent
batching.primitive_batchers[_tangent_p] = _batch_tangent
