"""Training steps and attentions, compiled for devices that need not be present, and what the compiler says of them."""

import functools
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from combiner import build, functional, optim, sharding, steps
from combiner.aot.targets import Target
from combiner.core.module import make_attention
from combiner.data.task import Task
from combiner.layers import LANES

UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
OUT_OF_MEMORY = re.compile(  # what libtpu 0.0.52 says
    r'HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)'
)


def batch_shapes(task: Task, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch, with every array that a batch of this task may have."""
    tokens = jax.ShapeDtypeStruct((size, *task.input_shape), jnp.int32)
    targets = (size,) if task.classes else tokens.shape
    batch = {'tokens': tokens, 'targets': jax.ShapeDtypeStruct(targets, jnp.int32)}
    batch['weights'] = jax.ShapeDtypeStruct(targets, jnp.float32)
    if task.classes:
        batch['valid'] = jax.ShapeDtypeStruct(tokens.shape, bool)
    if task.packed:
        batch['segments'] = tokens
    return batch


def mesh(config: Any, target: Target) -> Mesh:
    """Returns the config's mesh, of all chips of a slice.

    Raises:
        ValueError: there is no such slice, its compiler is not installed, or the config's batch does not split over it.
    """
    found = sharding.make_mesh(**config.mesh, devices=target.devices())
    build.check_numbers(config, found)
    return found


def training_step(config: Any, mesh: Mesh) -> Any:
    """Lowers the training step, as `train.train` compiles it, for the mesh."""
    task = build.task(config)
    model, optimizer = build.model(config, task), optim.optimizer(config.optimizer, config.steps)
    with sharding.use(mesh):  # mechanisms are traced for its devices, not for this machine's
        tokens = jax.ShapeDtypeStruct((sharding.batch_parts(mesh), *task.input_shape), jnp.int32)
        initialize = functools.partial(steps.initial_state, model, optimizer, config)
        state = sharding.place(jax.eval_shape(initialize, tokens), mesh)
        step = steps.compile_step(steps.make_train_step(config, task, model, optimizer), state, mesh)
        batch = batch_shapes(task, config.data.batch_size)
        placed = {name: x.update(sharding=sharding.batch_sharding(mesh, x.shape)) for name, x in batch.items()}
        return step.lower(state, placed)


def attention(
    name: str,
    hyper: dict[str, Any],
    shape: tuple[int, int, int, int],
    *,
    causal: bool,
    backward: bool,
    devices: list[Any],
    dtype: Any = jnp.bfloat16,
    packed: bool = False,
) -> Any:
    """Traces an attention alone for the first of the devices; `.lower()` of the result lowers it.

    The compiler chooses the layouts of inputs and results, so that no copy between layouts counts that a model would
    not make. Narrow heads are given and returned as features `h·d`, as the module projects them.

    Args:
        name: of the mechanism, as for `combiner.attend`.
        hyper: its hyper-parameters.
        shape: of queries, keys and values, `[b, l, h, d]`.
        causal: whether positions attend to earlier ones only.
        backward: whether the gradients of q, k and v are computed too.
        devices: of a slice.
        dtype: of queries, keys and values.
        packed: whether there are documents, which do not attend to each other.
    """
    one = sharding.make_mesh(devices=devices[:1])
    narrow = shape[-1] < LANES
    array = jax.ShapeDtypeStruct((*shape[:2], shape[2] * shape[3]) if narrow else shape, dtype)
    # The compiler chooses the order of the axes in memory, as it does for what projections compute.
    free = Format(Layout.AUTO, NamedSharding(one, PartitionSpec()))

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        q, k, v = (x.reshape(shape) for x in (q, k, v))
        return functional.attend(q, k, v, name, causal=causal, segments=segments, **hyper).reshape(array.shape)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array, *segments: jax.Array) -> Any:
        out, pull_back = jax.vjp(lambda *qkv: forward(*qkv, *segments), q, k, v)
        return out, pull_back(cotangent)

    segments = (jax.ShapeDtypeStruct(shape[:2], jnp.int32),) * packed
    with sharding.use(one):
        jitted = jax.jit(both if backward else forward, in_shardings=free, out_shardings=free)
        return jitted.trace(*(array,) * (4 if backward else 3), *segments)


def module(
    name: str,
    hyper: dict[str, Any],
    shape: tuple[int, int, int, int],
    *,
    causal: bool,
    rotary: bool,
    devices: list[Any],
) -> Any:
    """Lowers the module around an attention, in bfloat16, with the gradients of its parameters and its input.

    Args:
        name: of the mechanism.
        hyper: its hyper-parameters.
        shape: of queries, keys and values, `[b, l, h, d]`; the model width is `h·d`.
        causal: whether positions attend to earlier ones only.
        rotary: whether queries and keys are rotated by their positions.
        devices: of a slice.
    """
    batch, length, heads, width = shape
    sizes: dict[str, Any] = {'width': heads * width, 'heads': heads, 'dtype': jnp.bfloat16}
    made = make_attention(name, hyper, causal=causal, rotary=rotary, **sizes)
    x = jax.ShapeDtypeStruct((batch, length, heads * width), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(variables: Any, x: jax.Array, cotangent: jax.Array, positions: jax.Array) -> Any:
        out, pull_back = jax.vjp(lambda *inputs: made.apply(*inputs, positions), variables, x)
        return out, *pull_back(cotangent)

    with sharding.use(sharding.make_mesh(devices=devices[:1])):
        variables = jax.eval_shape(lambda *inputs: nn.unbox(made.init(jax.random.key(0), *inputs)), x, positions)
        return jax.jit(run).lower(variables, x, x, positions)


def least_bytes(shape: tuple[int, int, int, int], *, backward: bool, itemsize: int = 2) -> int:
    """Returns the bytes that attention cannot avoid: q, k, v (and do) read, o (and dq, dk, dv) written, once."""
    batch, length, heads, width = shape
    return (8 if backward else 4) * batch * length * heads * width * itemsize


class Program(NamedTuple):
    """A compiled program.

    Attributes:
        executable: as JAX returns it.
        text: of the optimized program, for `cost.count`.
    """

    executable: Any
    text: str


def compiled(lowered: Any, platform: str) -> Program:
    """Compiles a lowered program and keeps its text.

    For TPUs the compiler writes the text to a file: `as_text` fails for chips whose asynchronous operations are newer
    than the XLA of jaxlib (v5p and v6e with libtpu 0.0.52 and jaxlib 0.10.2).

    Args:
        lowered: what `jax.jit(f).lower(…)` returns.
        platform: 'tpu', or another.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses it.
    """
    if platform != 'tpu':
        executable = lowered.compile()
        return Program(executable, executable.as_text())
    with tempfile.TemporaryDirectory() as folder:
        executable = lowered.compile(compiler_options={'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
        texts = sorted(Path(folder).glob('*.after_codegen.txt'), key=lambda path: path.stat().st_size)
        return Program(executable, texts[-1].read_text(encoding='utf-8') if texts else executable.as_text())


def memory(program: Any) -> dict[str, int]:
    """Returns the memory of a compiled step on each device, as XLA plans it: arguments, temporaries and total."""
    found = program.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes  # the new state takes the old one's place
    sizes = {'arguments_bytes': found.argument_size_in_bytes, 'temporaries_bytes': found.temp_size_in_bytes}
    return sizes | {'total_bytes': sum(sizes.values()) + outputs}


def refusal(message: str) -> dict[str, int]:
    """Parses the size of the temporaries and of a chip from a refusal of the compiler; {} for other messages."""
    found = OUT_OF_MEMORY.search(message)
    if found is None:
        return {}
    used, of_used, has, of_has = found.groups()
    return {'temporaries_bytes': int(float(used) * UNITS[of_used]), 'chip_bytes': int(float(has) * UNITS[of_has])}
