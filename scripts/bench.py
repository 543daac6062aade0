"""Times attention against `jax.nn.dot_product_attention`, all in one process and in turn, for ratios on a busy machine.

    python scripts/bench.py [--names combiner_fixed,full] [--lengths 4096] [--what core,layer] [--out bench.json]

For each mechanism and length: forward, and forward with backward (the output and the gradients of all inputs), in
milliseconds (median), how many times faster than dense, temporaries in MB (as XLA plans them), and seconds to compile;
then, for each mechanism, the exponent with which time grows with length, the least power of two at which it is as fast
as dense, and the share of the machine's peak that it has at the longest length.

One batch row, random float32 inputs. `core` is attention on given q, k and v, `layer` the module around it, with its
projections, of width heads × head_width. Hyper-parameters are the defaults, or what the name says:
`combiner_axial_rowmajor+key=token`. What cannot run (parameters of its own without a layer, or causally) is left out,
with a line that says so.

The peak is the fastest of many large float32 matrix products, run between the others in the same process. The share of
it, at a mechanism's median time, counts only the arithmetic that the mechanism needs: for each term of a softmax and
each member of a span (`Mechanism.cost`) one product of head width with a key and one with a value, twice that again
going backward, and a layer's four projections. What a program multiplies and then masks is waste: dense causal
attention reaches half the peak at most. XLA's own count would credit that waste, and counts the body of a loop once.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import combiner
from combiner import costs, patterns
from combiner.attention import registry
from combiner.attention.base import Attention
from configs import common
from experiments import bench_tables
from experiments.bench_tables import DENSE, PASSES

QUADRATIC_MEMORY = (DENSE, 'full')
ARITHMETIC = {'forward': 1, 'forward_backward': 3}  # of a pass, that of the forward pass being 1
WHATS = ('core', 'layer')


class Dense(Attention):
    """JAX's own dense attention."""

    def cost(self, length: int) -> patterns.Cost:
        """As of `full`."""
        return costs.full(length, causal=self.causal)

    def attend(self, q: Any, k: Any, v: Any, *, valid: Any = None, drop: Any = None) -> jax.Array:
        """Without padding or dropout."""
        del valid, drop
        return jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)


class Shape(NamedTuple):
    """What is the same for all mechanisms."""

    length: int
    heads: int
    head_width: int
    causal: bool

    @property
    def width(self) -> int:
        """Width of the model around the heads."""
        return self.heads * self.head_width


class Program(NamedTuple):
    """A compiled pass over given arguments."""

    run: Any
    arguments: tuple
    compile_seconds: float


def mechanism(text: str, **frame: Any) -> Attention:
    """The module of `NAME` or `NAME+hyper=value`, or of JAX's dense attention.

    Raises:
        ValueError: the name, a hyper-parameter or its value is wrong.
    """
    name, hyper = common.mechanism(text)
    return Dense(**frame) if text == DENSE else registry.make(name, hyper, **frame)


def to_time(text: str, what: str, shape: Shape) -> tuple[Attention, Callable[..., Any], tuple]:
    """A mechanism's module, the function to time, and the function's inputs."""
    module = mechanism(text, causal=shape.causal, width=shape.width, heads=shape.heads, planned_length=shape.length)
    keys = jax.random.split(jax.random.key(0), 3)
    if what == 'core':
        size = (1, shape.length, shape.heads, shape.head_width)
        return module, module.attend, tuple(jax.random.normal(key, size) for key in keys)
    x, positions = jax.random.normal(keys[0], (1, shape.length, shape.width)), jnp.arange(shape.length)[None]
    state: Any = nn.meta.unbox(jax.jit(module.init)(keys[1], x, positions))
    params = state.pop('params')
    return module, lambda params, x: module.apply({**state, 'params': params}, x, positions), (params, x)


def compiled(function: Callable[..., Any], inputs: tuple) -> dict[str, Program]:
    """Both passes, compiled."""

    def both_ways(cotangent: jax.Array, *inputs: Any) -> Any:
        out, pull_back = jax.vjp(function, *inputs)
        return out, pull_back(cotangent)

    out = jax.eval_shape(function, *inputs)
    cotangent = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
    programs = {}
    for name, run, arguments in zip(PASSES, (function, both_ways), (inputs, (cotangent, *inputs)), strict=True):
        began = time.perf_counter()
        program = jax.jit(run).lower(*arguments).compile()
        programs[name] = Program(program, arguments, time.perf_counter() - began)
    return programs


def needed_flop(module: Attention, what: str, shape: Shape) -> float | None:
    """Multiplications and additions of a forward pass; None where no pattern says how many."""
    try:
        products = module.cost(shape.length).total
    except NotImplementedError:
        return None
    projections = 8 * shape.length * shape.width**2 if what == 'layer' else 0
    return 4 * products * shape.width + projections


class Peak:
    """The fastest product so far of two square float32 matrices with `size` rows."""

    def __init__(self, size: int) -> None:
        a, b = (jax.random.normal(key, (size, size)) for key in jax.random.split(jax.random.key(0)))
        self.product = Program(jax.jit(lambda a, b: a @ b).lower(a, b).compile(), (a, b), 0.0)
        self.flop, self.seconds = 2 * size**3, math.inf
        for _ in range(10):
            self.try_again()

    def try_again(self) -> None:
        """Runs the product once more."""
        self.seconds = min(self.seconds, timed(self.product))

    @property
    def gflops(self) -> float:
        """In 10⁹ floating-point operations a second."""
        return self.flop / self.seconds / 1e9


def timed(program: Program) -> float:
    """Seconds that a program takes."""
    began = time.perf_counter()
    jax.block_until_ready(program.run(*program.arguments))
    return time.perf_counter() - began


def measure(names: list[str], what: str, shape: Shape, repeats: int, peak: Peak) -> list[dict[str, Any]]:
    """One row for each mechanism; every round runs every program twice and times the second run.

    The first pays for what the program before it left behind: freeing gigabytes takes the system up to 0.1 s.
    """
    programs, flop = {}, {}
    for name in names:
        try:
            module, function, inputs = to_time(name, what, shape)
            programs[name], flop[name] = compiled(function, inputs), needed_flop(module, what, shape)
        except ValueError as error:
            print(f'{name} at length {shape.length:,} left out: {error}', file=sys.stderr)
    seconds = {(name, each): [] for name in programs for each in PASSES}
    for _ in range(repeats):
        peak.try_again()
        for (name, each), taken in seconds.items():
            timed(programs[name][each])
            taken.append(timed(programs[name][each]))
    rows = []
    for name in programs:
        row: dict[str, Any] = {'what': what, 'name': name, 'length': shape.length}
        for each in PASSES:
            program, median = programs[name][each], statistics.median(seconds[name, each])
            dense = statistics.median(seconds[DENSE, each]) if DENSE in programs else None
            row[f'{each}_ms'] = round(1e3 * median, 3)
            row[f'{each}_times_faster'] = dense and round(dense / median, 2)
            row[f'{each}_temporaries_mb'] = round(program.run.memory_analysis().temp_size_in_bytes / 1e6, 1)
            row[f'{each}_compile_s'] = round(program.compile_seconds, 2)
            row[f'{each}_needed_gflops'] = flop[name] and round(flop[name] * ARITHMETIC[each] / median / 1e9, 3)
        rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    packages = ('jax', 'jaxlib', 'flax', 'numpy')
    return {
        'device': jax.devices()[0].device_kind,
        'machine': platform.machine(),
        'cores': len(os.sched_getaffinity(0)),
        'python': platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def parse() -> argparse.Namespace:
    """The command line, with names, lengths and whats as lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    alone = ','.join(name for name in combiner.names() if not registry.resolve(name).owns)
    parser.add_argument('--names', default=alone, help='mechanisms, separated by commas')
    parser.add_argument('--lengths', default='4096', help='sequence lengths, separated by commas')
    parser.add_argument('--what', default='core', help='core, layer or both, separated by a comma (default: core)')
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--head_width', type=int, default=64)
    parser.add_argument('--bidirectional', action='store_true')
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--dense_up_to', type=int, default=8192, help='longest length of dense attention (memory)')
    parser.add_argument('--fit_from', type=int, default=1, help='shortest length that counts for the growth of time')
    parser.add_argument('--peak_size', type=int, help='rows of the matrices whose product is the peak')
    parser.add_argument('--out', type=Path, help='write JSON there')
    options = parser.parse_args()
    options.names, options.what = [DENSE, *options.names.split(',')], options.what.split(',')
    try:
        options.lengths = sorted(map(int, options.lengths.split(',')))
        if unknown := set(options.what) - set(WHATS):
            raise ValueError(f'unknown --what {", ".join(sorted(unknown))}; choose from {", ".join(WHATS)}')
        for name in options.names:
            mechanism(name, causal=not options.bidirectional)
    except ValueError as error:
        parser.error(str(error))
    return options


def main() -> None:
    """The command line."""
    options = parse()
    peak = Peak(options.peak_size or (2048 if jax.default_backend() == 'cpu' else 8192))
    settings = {**environment(), 'batch': 1, 'heads': options.heads, 'head_width': options.head_width}
    settings |= {'dtype': 'float32', 'causal': not options.bidirectional, 'repeats': options.repeats}
    rows, summary = [], []
    for what in options.what:
        print('', f'Attention {what}:', '', *bench_tables.HEAD, sep='\n')
        for length in options.lengths:
            shape = Shape(length, options.heads, options.head_width, not options.bidirectional)
            too_long = QUADRATIC_MEMORY if length > options.dense_up_to else ()
            names = [name for name in options.names if name.partition('+')[0] not in too_long]
            for row in measure(names, what, shape, options.repeats, peak):
                rows.append(row)
                print(bench_tables.line(row), flush=True)
            summary = list(bench_tables.summarise(rows, options.fit_from, peak.gflops))
            if options.out:  # after every length: a long one may not come to its end
                found = {'peak_gflops': round(peak.gflops, 1), 'rows': rows, 'summary': summary}
                options.out.write_text(json.dumps({**settings, **found}, indent=2) + '\n')
    for what in options.what:
        heading = f'Attention {what}, peak {peak.gflops:,.0f} GFLOP/s:'
        print('', heading, '', bench_tables.summary_table(summary, what), sep='\n')


if __name__ == '__main__':
    main()
