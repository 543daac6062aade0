"""A loop over slices of arrays, which writes each part of its results, and of its gradients, in place.

`lax.map` copies every input into an array of slices, and its results out of one. In reverse mode a loop that slices its
input in place adds, in every step, a gradient of the size of the whole input. Here the tangent of the loop is a
primitive with its own transpose: each step computes its part again, and writes the gradient of each slice in its place.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from combiner.ops.primitives import differentiate, wanted

Body = Callable[..., Sequence[Any]]  # from slices of arrays, and constants, to slices of the results


class Chunks(NamedTuple):
    """The chunks into which the blocks of a sequence, or other elements of an axis, are grouped.

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


class Cut(NamedTuple):
    """How a loop slices an array.

    Attributes:
        axis: the axis that it slices.
        block: the number of elements of that axis which are a block.
        length: the number of elements of that axis, if the last block of a result has fewer; None if it is whole.
    """

    axis: int
    block: int = 1
    length: int | None = None


Cuts = tuple[Cut | None, ...]  # for each loop; None if it takes the whole array


def map_slices(
    body: Body, loops: tuple[Chunks, ...], arrays: Sequence[Any], cuts: Sequence[Cuts], result_cuts: Cuts
) -> list[Array]:
    """Computes `body(*arrays)` from slices of the arrays, one after another, the last loop innermost.

    Zeros fill the last slice of an axis; results and gradients there are dropped. All derivatives of all arrays work,
    also of those that `body` closes over; every step takes these whole, and their gradient is the sum over the steps.
    Memory is that of one step, of the results and, backward, of the gradients; the backward pass runs the body again.

    Args:
        body: treats the elements of the sliced axes independently of each other.
        loops: the chunks of the sliced axes.
        arrays: the inputs.
        cuts: of each array.
        result_cuts: of every result.
    """
    if all(loop.count == 1 for loop in loops):
        results = body(*(_fit(x, _sliced_shape(x.shape, own, loops)) for x, own in zip(arrays, cuts, strict=True)))
        return [_fit(x, _whole(x, result_cuts, loops).shape) for x in results]

    def slice_of(x: Any, cuts: Cuts) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(_sliced_shape(x.shape, cuts, loops), x.dtype)

    # What the body closes over becomes an argument, so that it can have a gradient.
    traced = jax.make_jaxpr(body)(*map(slice_of, arrays, cuts))
    all_cuts = (*cuts, *[(None,) * len(loops)] * len(traced.consts))
    shapes = tuple(_whole(aval, result_cuts, loops) for aval in traced.out_avals)

    def with_constants(*slices: Any) -> Sequence[Array]:
        constants = slices[len(arrays) :]
        return jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, constants))(*slices[: len(arrays)])

    return _map(with_constants, _Plan(loops, all_cuts, shapes, result_cuts), *arrays, *traced.consts)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The loops, and how they slice the arrays and the results."""

    loops: tuple[Chunks, ...]
    cuts: tuple[Cuts, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    result_cuts: Cuts

    @property
    def smooth(self) -> list[bool]:
        """Returns which results have a derivative."""
        return [jnp.issubdtype(x.dtype, jnp.inexact) for x in self.results]

    @property
    def smooth_results(self) -> list[jax.ShapeDtypeStruct]:
        """Returns the results that have a derivative."""
        return [x for x, smooth in zip(self.results, self.smooth, strict=True) if smooth]


class _Step:
    """A step, by its number over all loops: it reads its slices, and writes them."""

    def __init__(self, loops: tuple[Chunks, ...], number: Array) -> None:
        self.loops = loops
        self.turns: list[Array] = []  # of each loop
        for loop in reversed(loops):
            self.turns.insert(0, number % loop.count)
            number = number // loop.count

    def read(self, x: Any, cuts: Cuts) -> Array:
        """Returns the slice of an array, with zeros beyond its end."""
        part = lax.dynamic_slice(x, self._starts(x, cuts), _sliced_shape(x.shape, cuts, self.loops))
        for axis, size, missing in self._uneven(x, cuts):
            part = _shift(part, axis, size, missing)
        return part

    def write(self, x: Array, part: Array, cuts: Cuts) -> Array:
        """Writes a slice in its place, as far as the array reaches; adds it, if other steps write there too."""
        if any(cut is None and loop.count > 1 for cut, loop in zip(cuts, self.loops, strict=True)):
            part = self.read(x, cuts) + part
        for axis, size, missing in self._uneven(x, cuts):
            # The slice that fits starts earlier: what stands before its new elements stays.
            old = lax.dynamic_slice(x, self._starts(x, cuts), part.shape)
            shifted = _shift(part, axis, size, -missing)
            here = jnp.arange(size).reshape(-1, *(1,) * (x.ndim - axis - 1)) >= missing
            part = jnp.where(here, shifted, old)
        return lax.dynamic_update_slice(x, part, self._starts(x, cuts))

    def _starts(self, x: Any, cuts: Cuts) -> list[Any]:
        """Returns where the slice of an array starts; the last one earlier than its turn, so that it fits."""
        starts: list[Any] = [0] * x.ndim
        for cut, loop, turn in zip(cuts, self.loops, self.turns, strict=True):
            if cut is not None:
                size = loop.size * cut.block
                starts[cut.axis] = jnp.minimum(turn * size, x.shape[cut.axis] - size)
        return starts

    def _uneven(self, x: Any, cuts: Cuts) -> list[tuple[int, int, Array]]:
        """Returns the axes whose last slice is not full, the size of a slice, and how many elements this one lacks."""
        found = []
        for cut, loop, turn in zip(cuts, self.loops, self.turns, strict=True):
            if cut is not None and x.shape[cut.axis] % (size := loop.size * cut.block):
                found.append((cut.axis, size, jnp.maximum((turn + 1) * size - x.shape[cut.axis], 0)))
        return found


def _fit(x: Array, shape: tuple[int, ...]) -> Array:
    """Fills an array up with zeros, or cuts its end off."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, new - old, 0) for old, new in zip(x.shape, shape, strict=True)])


def _shift(x: Array, axis: int, size: int, by: Array) -> Array:
    """Moves elements towards the start of an axis, or by a negative number towards its end; fills up with zeros."""
    room = [(0, 0)] * x.ndim
    room[axis] = (size, size)
    return lax.dynamic_slice_in_dim(jnp.pad(x, room), size + by, size, axis)


def _sliced_shape(shape: tuple[int, ...], cuts: Cuts, loops: tuple[Chunks, ...]) -> tuple[int, ...]:
    """Returns the shape of a slice of an array."""
    sizes = {cut.axis: loop.size * cut.block for cut, loop in zip(cuts, loops, strict=True) if cut is not None}
    return tuple(sizes.get(axis, size) for axis, size in enumerate(shape))


def _whole(part: Any, cuts: Cuts, loops: tuple[Chunks, ...]) -> jax.ShapeDtypeStruct:
    """Returns the shape of the array of which `part` is a slice."""
    shape = list(part.shape)
    for cut, loop in zip(cuts, loops, strict=True):
        if cut is not None:
            shape[cut.axis] = loop.blocks * cut.block if cut.length is None else cut.length
    return jax.ShapeDtypeStruct(tuple(shape), part.dtype)


def _loop(
    body: Body,
    loops: tuple[Chunks, ...],
    arrays: Sequence[Any],
    cuts: Sequence[Cuts],
    results: Sequence[Any],
    result_cuts: Sequence[Cuts],
) -> list[Array]:
    """Computes the body from slices, as `map_slices` does; the results have the shapes of `results`."""

    def compute(written: list[Array], number: Array) -> tuple[list[Array], None]:
        step = _Step(loops, number)

        @partial(jax.checkpoint, prevent_cse=False)
        def part(*arrays: Any) -> list[Array]:
            return list(body(*map(step.read, arrays, cuts)))

        return list(map(step.write, written, part(*arrays), result_cuts)), None

    steps = jnp.arange(math.prod(loop.count for loop in loops))
    return lax.scan(compute, [jnp.zeros(x.shape, x.dtype) for x in results], steps)[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _map(body: Body, plan: _Plan, *arrays: Any) -> list[Array]:
    """Computes the results."""
    cuts = [plan.result_cuts] * len(plan.results)
    return _loop(body, plan.loops, arrays, plan.cuts, plan.results, cuts)


def _map_tangent(body, plan, primals, tangents):
    results = _map(body, plan, *primals)
    moving = tuple(i for i, change in enumerate(tangents) if not isinstance(change, SymbolicZero))
    changes = iter(_tangent_p.bind(*primals, *(tangents[i] for i in moving), body=body, plan=plan, moving=moving))
    fixed = [np.zeros(x.shape, jax.dtypes.float0) for x in results]
    return results, [next(changes) if smooth else zero for smooth, zero in zip(plan.smooth, fixed, strict=True)]


_map.defjvp(_map_tangent, symbolic_zeros=True)

# Reverse mode transposes a tangent. JAX would transpose the loop; a primitive has a rule of its own instead.
_tangent_p = Primitive('map_slices_tangent')
_tangent_p.multiple_results = True


def _of_moving(body: Body, plan: _Plan, moving: tuple[int, ...], slices: Sequence[Any]) -> Callable[..., list[Array]]:
    """Returns the function from the slices of the arrays `moving` to the results that have a derivative."""

    def smooth_results(*values: Any) -> list[Array]:
        given = list(slices)
        for i, value in zip(moving, values, strict=True):
            given[i] = value
        return [x for x, smooth in zip(body(*given), plan.smooth, strict=True) if smooth]

    return smooth_results


def _tangent(*arguments: Any, body: Body, plan: _Plan, moving: tuple[int, ...]) -> list[Array]:
    """Returns the changes of the results, linear in the last arguments, the tangents of the arrays `moving`."""
    count = len(plan.cuts)

    def changes(*slices: Any) -> list[Array]:
        values = tuple(slices[i] for i in moving)
        return jax.jvp(_of_moving(body, plan, moving, slices[:count]), values, slices[count:])[1]

    cuts = (*plan.cuts, *(plan.cuts[i] for i in moving))
    results = plan.smooth_results
    return _loop(changes, plan.loops, arguments, cuts, results, [plan.result_cuts] * len(results))


def _transpose_tangent(cotangents, *arguments, body, plan, moving):
    count = len(plan.cuts)
    arrays, tangents = arguments[:count], arguments[count:]

    def gradients(*slices: Any) -> Sequence[Array]:
        values = (slices[i] for i in moving)
        return jax.vjp(_of_moving(body, plan, moving, slices[:count]), *values)[1](list(slices[count:]))

    given = [*arrays, *map(ad.instantiate_zeros, cotangents)]
    cuts = (*plan.cuts, *[plan.result_cuts] * len(cotangents))
    moved, moved_cuts = [arrays[i] for i in moving], [plan.cuts[i] for i in moving]
    return [None] * count + wanted(_loop(gradients, plan.loops, given, cuts, moved, moved_cuts), tangents)


def _differentiate_tangent(primals, tangents, **parameters):
    return differentiate(partial(_tangent, **parameters), primals, tangents)


def _batch_tangent(arguments, axes, *, body, plan, moving):
    """Puts the new axis before all others: the tangent of a loop over slices stays one, with its own transpose."""
    size = next(x.shape[axis] for x, axis in zip(arguments, axes, strict=True) if axis is not None)
    batched = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arguments, axes, strict=True)
    ]
    of_batch = dataclasses.replace(
        plan,
        cuts=tuple(map(_behind_a_new_axis, plan.cuts)),
        results=tuple(jax.ShapeDtypeStruct((size, *x.shape), x.dtype) for x in plan.results),
        result_cuts=_behind_a_new_axis(plan.result_cuts),
    )
    changes = _tangent_p.bind(*batched, body=jax.vmap(body), plan=of_batch, moving=moving)
    return changes, [0] * len(changes)


def _behind_a_new_axis(cuts: Cuts) -> Cuts:
    return tuple(cut and cut._replace(axis=cut.axis + 1) for cut in cuts)


def _shapes(*_: Any, plan: _Plan, **__: Any) -> list[Any]:
    return [ShapedArray(x.shape, x.dtype) for x in plan.smooth_results]


_tangent_p.def_impl(jax.jit(_tangent, static_argnames=('body', 'plan', 'moving')))
_tangent_p.def_abstract_eval(_shapes)
mlir.register_lowering(_tangent_p, mlir.lower_fun(_tangent, multiple_results=True))
ad.primitive_transposes[_tangent_p] = _transpose_tangent
ad.primitive_jvps[_tangent_p] = _differentiate_tangent
batching.primitive_batchers[_tangent_p] = _batch_tangent
