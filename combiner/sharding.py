"""Sharding of all arrays: one mesh, and one table from logical axes to mesh axes.

The model names the axes of its parameters ('embed', 'mlp', …) where it creates them; `RULES` maps these names to
the axes of the mesh. Batches are split over 'data' and 'fsdp', sequences over 'context'. 'fsdp' also splits parameters
along the model width, 'model' along heads, hidden units and vocabulary. A single device is the mesh 1×1×1×1.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

BATCH_AXES = ('data', 'fsdp')
HEAD_AXES = ('model',)
CONTEXT_AXIS = 'context'

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ('batch', BATCH_AXES),
    ('embed', 'fsdp'),
    ('heads', 'model'),
    ('mlp', 'model'),
    ('vocab', 'model'),
    ('layers', None),
    ('head_dim', None),
    ('features', None),
    ('positions', None),
    ('length', CONTEXT_AXIS),
    ('embed_act', None),
)


def make_mesh(
    data: int = -1, fsdp: int = 1, model: int = 1, context: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Arranges devices (default: those of all processes) as data × fsdp × context × model; -1 takes all that remain.

    Raises:
        ValueError: the sizes do not use every device, are not positive, or more than one of them is -1.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, context, model]
    given = f'mesh data={data}, fsdp={fsdp}, model={model}' + f', context={context}' * (context != 1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f'{given}: sizes are at least 1, at most one is -1')
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f'{given} does not fit {len(devices)} devices; '
            'the product must equal the number of devices (-1 takes all that remain)'
        )
    return Mesh(
        np.asarray(devices).reshape(sizes),
        ('data', 'fsdp', CONTEXT_AXIS, 'model'),
        # Under explicit axes (the default of jax.make_mesh) Linen's logical constraints raise.
        axis_types=(jax.sharding.AxisType.Auto,) * 4,
    )


def explicit_axes(array: Array) -> tuple[str, ...]:
    """Returns the axes of an array's mesh over which its type says how it is split; none where XLA decides it."""
    mesh = jax.typeof(array).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit)


def with_automatic_axes(compute: Callable[..., Array], like: Array) -> Callable[..., Array]:
    """Returns `compute`; if `like` has explicit axes, with XLA in charge of them, and a result that is split as `like`.

    Operations that merge axes have no answer to explicit ones.
    """
    explicit = explicit_axes(like)
    if not explicit:
        return compute
    automatic: Any = jax.sharding.auto_axes(compute, axes=explicit, out_sharding=jax.typeof(like).sharding)
    return automatic


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Applies `RULES` and `mesh` to the model's logical constraints within the block."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def place(boxed: Any, mesh: Mesh) -> Any:
    """Converts the shapes of boxed variables to unboxed ShapeDtypeStructs, each with its NamedSharding.

    Arrays without a box are replicated. A dimension that its mesh axes do not divide is not split, with a warning.
    """
    specs = nn.spmd.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)

    def attach(path: Any, leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        axes = list(sharding.spec)
        for i, (size, names) in enumerate(zip(leaf.shape, sharding.spec, strict=False)):
            parts = math.prod(mesh.shape[name] for name in ([names] if isinstance(names, str) else names or ()))
            if size % parts:
                axes[i] = None
                name = jax.tree_util.keystr(path)
                logging.warning('%s %s: %d is not split over %d devices (%s)', name, leaf.shape, size, parts, names)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    # Not nn.meta.unbox: under a mesh it constrains the value at once, which fails for a shape.
    unboxed = jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, nn.Partitioned) else leaf,
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )
    return jax.tree_util.tree_map_with_path(attach, unboxed, specs)


def batch_spec(ndim: int) -> PartitionSpec:
    """Returns how an array of a batch is split: its first axis, examples, and its last, positions, if it has any."""
    return PartitionSpec(BATCH_AXES, *(None,) * (ndim - 2), *(CONTEXT_AXIS,) * (ndim > 1))


def batch_sharding(mesh: Mesh, shape: Sequence[int] = (1,)) -> NamedSharding:
    """Returns the sharding of an array of a batch; over 'model' it is replicated.

    A length that 'context' does not divide is not split.
    """
    whole = shape[-1] % mesh.shape[CONTEXT_AXIS]
    return NamedSharding(mesh, batch_spec(1 if whole else len(shape)))


def batch_parts(mesh: Mesh) -> int:
    """Returns the number of parts into which a batch is split; it must divide the batch size."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts each process's share of a batch (see `share_of_process`) onto its devices and returns the global batch."""
    _, shares = share_of_process(mesh)

    def put(value: np.ndarray) -> jax.Array:
        shape = (shares * len(value), *value.shape[1:])  # so that of the other axes each device takes its own part
        return jax.make_array_from_process_local_data(batch_sharding(mesh, shape), value, shape)

    return {name: put(value) for name, value in batch.items()}


def share_of_process(mesh: Mesh) -> tuple[int, int]:
    """Returns which share of every batch this process reads, and into how many shares it is cut; see `find_share`."""
    processes = np.asarray([device.process_index for device in mesh.devices.flat])
    return find_share(processes.reshape(batch_parts(mesh), -1), jax.process_index())


def find_share(processes: np.ndarray, process: int) -> tuple[int, int]:
    """Returns which share of every batch a process reads, and the number of shares.

    Processes whose devices have the same examples, of other positions or with other weights, read the same share.

    Args:
        processes: of the devices; a row for each part of a batch (see `batch_parts`).
        process: the process.

    Raises:
        ValueError: the examples of two processes overlap, or are not consecutive.
    """
    parts = {each: tuple(np.flatnonzero((processes == each).any(axis=1))) for each in np.unique(processes)}
    shares = sorted(set(parts.values()))
    size = max(len(processes) // len(shares), 1)
    if shares != [tuple(range(start, start + size)) for start in range(0, len(processes), size)]:
        raise ValueError(
            'the mesh does not split the examples of a batch evenly over the processes: context x model must be a '
            'multiple or a divisor of the number of devices of a process'
        )
    return shares.index(parts[process]), len(shares)
