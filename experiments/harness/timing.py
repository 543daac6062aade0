"""Times attention, and any programs in turn in one process; names the machine.

All programs of a length are compiled, then run in turn, each twice. Only the second run is timed: the first one frees
the memory of the program before, which for gigabytes takes the system up to 0.1 s. Medians are reported.
"""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from combiner import atomic, patterns
from combiner import config as common
from combiner.attention import full
from combiner.core import registry
from combiner.core.mechanism import Context, Mechanism
from combiner.core.module import Attention
from combiner.monitoring import flops
from combiner.run import provenance
from experiments.harness.bench_tables import DENSE, PASSES

ARITHMETIC = {'forward': 1, 'forward_backward': flops.TRAINING}  # of a pass, that of the forward pass being 1


class Dense(Mechanism):
    """JAX's own dense attention.

    Attributes:
        implementation: of `jax.nn.dot_product_attention`: 'xla', 'cudnn', or None for JAX's choice.
    """

    implementation: Literal['xla', 'cudnn'] | None = None

    def cost(self, length: int) -> patterns.Cost:
        """Returns the cost of `full`."""
        return full.cost(length, causal=self.causal)

    def attend(self, q: Any, k: Any, v: Any, context: Context) -> jax.Array:
        """Attends without padding or dropout."""
        del context
        return jax.nn.dot_product_attention(q, k, v, is_causal=self.causal, implementation=self.implementation)


class Shape(NamedTuple):
    """The size of a measurement, the same for all mechanisms."""

    length: int
    heads: int
    head_width: int
    causal: bool
    dtype: str = 'float32'

    @property
    def width(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_width


class Program(NamedTuple):
    """A compiled pass over given arguments."""

    run: Any
    arguments: tuple
    compile_seconds: float

    @property
    def temporaries_mb(self) -> float:
        """MB that the program needs besides its input and output, as XLA plans them."""
        return self.run.memory_analysis().temp_size_in_bytes / 1e6

    def __call__(self) -> float:
        """Runs the program; returns its seconds."""
        began = time.perf_counter()
        jax.block_until_ready(self.run(*self.arguments))
        return time.perf_counter() - began


def mechanism(text: str, *, causal: bool, max_length: int | None = None) -> Mechanism:
    """Returns the mechanism of `NAME` or `NAME+hyper=value`; `dense` names JAX's dense attention.

    Raises:
        ValueError: the name, a hyper-parameter or its value is wrong.
    """
    name, hyper = common.mechanism(text)
    name = f'{__name__}:{Dense.__name__}' if name == DENSE else name
    return registry.make_mechanism(name, hyper, causal=causal, max_length=max_length)


def to_time(text: str, what: str, shape: Shape) -> tuple[Mechanism, Callable[..., Any], tuple]:
    """Returns a mechanism, the function to time, and its inputs; `what` is `core` or `layer`."""
    timed = mechanism(text, causal=shape.causal, max_length=shape.length)
    keys = jax.random.split(jax.random.key(0), 3)
    if what == 'core':
        size = (1, shape.length, shape.heads, shape.head_width)
        inputs = tuple(jax.random.normal(key, size, shape.dtype) for key in keys)
        return timed, lambda q, k, v: timed.attend(q, k, v, Context()), inputs
    module = Attention(timed, width=shape.width, heads=shape.heads, dtype=jnp.dtype(shape.dtype))
    x = jax.random.normal(keys[0], (1, shape.length, shape.width), shape.dtype)
    positions = jnp.arange(shape.length)[None]
    state: Any = nn.meta.unbox(jax.jit(module.init)(keys[1], x, positions))
    params = state.pop('params')
    return timed, lambda params, x: module.apply({**state, 'params': params}, x, positions), (params, x)


def compiled(function: Callable[..., Any], inputs: tuple, passes: Sequence[str] = PASSES) -> dict[str, Program]:
    """Compiles the passes."""

    def both_ways(cotangent: jax.Array, *inputs: Any) -> Any:
        out, pull_back = jax.vjp(function, *inputs)
        return out, pull_back(cotangent)

    out = jax.eval_shape(function, *inputs)
    cotangent = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    runs = {'forward': (function, inputs), 'forward_backward': (both_ways, (cotangent, *inputs))}
    programs = {}
    for name in passes:
        run, arguments = runs[name]
        began = time.perf_counter()
        program = jax.jit(run).lower(*arguments).compile()
        programs[name] = Program(program, arguments, time.perf_counter() - began)
    return programs


def needed_flop(mechanism: Mechanism, what: str, shape: Shape) -> float | None:
    """Returns the multiplications and additions of a forward pass; None for a mechanism without a pattern."""
    needed = flops.attention(mechanism, shape.length, shape.width)
    if needed is None:
        return None
    return needed + (8 * shape.length * shape.width**2 if what == 'layer' else 0)


class Peak:
    """The fastest product so far of two square matrices with `size` rows."""

    def __init__(self, size: int, dtype: str = 'float32') -> None:
        a, b = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
        self.product = Program(jax.jit(lambda a, b: a @ b).lower(a, b).compile(), (a, b), 0.0)
        self.flop, self.seconds = 2 * size**3, math.inf
        for _ in range(10):
            self.try_again()

    def try_again(self) -> None:
        """Runs the product once and keeps the shortest time."""
        self.seconds = min(self.seconds, self.product())

    @property
    def gflops(self) -> float:
        """Speed of the product, in 10⁹ floating-point operations per second."""
        return self.flop / self.seconds / 1e9


def medians(
    programs: Mapping[Any, Callable[[], float]], repeats: int, each_round: Callable[[], None] = lambda: None
) -> dict[Any, float]:
    """Returns the median seconds of each program over rounds in which all run in turn.

    Args:
        programs: functions that run a program and return its seconds, such as a `Program`, by name.
        repeats: number of rounds.
        each_round: called at the beginning of each round.
    """
    seconds = {name: [] for name in programs}
    for _ in range(repeats):
        each_round()
        for name, program in programs.items():
            program()
            seconds[name].append(program())
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def write_json(path: Path, document: Any) -> None:
    """Writes measurements as JSON, into a folder that is made if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(document, indent=2) + '\n')


def environment() -> dict[str, Any]:
    """Returns the device, the machine, the versions and the commit of this process."""
    packages = ('jax', 'jaxlib', 'flax', 'numpy')
    return {
        'device': jax.devices()[0].device_kind,
        'machine': platform.machine(),
        'cores': len(os.sched_getaffinity(0)),
        'python': platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        'commit': provenance.commit(),
    }
