"""Times attention against `jax.nn.dot_product_attention`, all in one process and in turn, for ratios on a busy machine.

    python scripts/bench.py [--names combiner_fixed,full] [--lengths 4096] [--bidirectional] [--out bench.json]

For each mechanism and length: forward, and forward with backward (the gradients of q, k and v), in milliseconds
(median), how many times faster than dense, temporaries in MB (as XLA plans them), and seconds to compile. Random q, k,
v of one batch row, float32.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import combiner
from combiner.attention import registry

DENSE = 'dense'
PASSES = ('forward', 'forward_backward')


def attention(name: str, causal: bool) -> Callable[..., jax.Array]:
    """The function to time: a mechanism with its default hyper-parameters, or JAX's own dense attention."""
    if name == DENSE:
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    return lambda q, k, v: combiner.attend(q, k, v, name, causal=causal)


def compiled(attend: Callable[..., jax.Array], inputs: list[jax.Array]) -> dict[str, tuple[Any, float]]:
    """Both passes as compiled programs, with the seconds that compiling took."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> jax.Array:
        return (attend(q, k, v) * cotangent).sum()

    forward = jax.jit(lambda q, k, v, _: attend(q, k, v))
    programs = {}
    for name, function in zip(PASSES, (forward, jax.jit(jax.grad(loss, (0, 1, 2)))), strict=True):
        began = time.perf_counter()
        program = function.lower(*inputs).compile()
        programs[name] = program, time.perf_counter() - began
    return programs


def measure(names: list[str], length: int, heads: int, width: int, causal: bool, repeats: int) -> list[dict[str, Any]]:
    """One row for each mechanism; every round runs every program twice and times the second run.

    The first pays for what the program before it left behind: freeing gigabytes takes the system up to 0.1 s.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = [jax.random.normal(key, (1, length, heads, width)) for key in keys]
    programs = {name: compiled(attention(name, causal), inputs) for name in names}
    seconds: dict[tuple[str, str], list[float]] = {(name, each): [] for name in names for each in PASSES}
    for _ in range(repeats):
        for (name, each), taken in seconds.items():
            jax.block_until_ready(programs[name][each][0](*inputs))
            began = time.perf_counter()
            jax.block_until_ready(programs[name][each][0](*inputs))
            taken.append(time.perf_counter() - began)
    rows = []
    for name in names:
        row: dict[str, Any] = {'name': name, 'length': length}
        for each in PASSES:
            program, compile_seconds = programs[name][each]
            median = statistics.median(seconds[name, each])
            row[f'{each}_ms'] = round(1e3 * median, 2)
            row[f'{each}_times_faster'] = round(statistics.median(seconds[DENSE, each]) / median, 2)
            row[f'{each}_temporaries_mb'] = round(program.memory_analysis().temp_size_in_bytes / 1e6, 1)
            row[f'{each}_compile_s'] = round(compile_seconds, 2)
        rows.append(row)
    return rows


HEAD = (
    '| attention | length | forward | forward + backward | temporaries | compile |',
    '|---|---|---|---|---|---|',
)


def line(row: dict[str, Any]) -> str:
    """A row in Markdown; temporaries and seconds to compile are those of forward and backward together."""
    passes = (f'{row[f"{each}_ms"]:.0f} ms ({row[f"{each}_times_faster"]:.1f}×)' for each in PASSES)
    temporaries, seconds = row['forward_backward_temporaries_mb'], row['forward_backward_compile_s']
    return f'| `{row["name"]}` | {row["length"]:,} | {" | ".join(passes)} | {temporaries:,.0f} MB | {seconds:.1f} s |'


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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    alone = ','.join(name for name in combiner.names() if not registry.resolve(name).by_content)
    parser.add_argument('--names', default=alone, help='mechanisms, separated by commas')
    parser.add_argument('--lengths', default='4096', help='sequence lengths, separated by commas')
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--head_width', type=int, default=64)
    parser.add_argument('--bidirectional', action='store_true')
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--out', type=Path, help='write JSON there')
    options = parser.parse_args()
    names = [DENSE, *options.names.split(',')]
    for name in names[1:]:
        try:
            registry.resolve(name)
        except ValueError as error:
            parser.error(str(error))

    rows = []
    print(*HEAD, sep='\n')
    for length in map(int, options.lengths.split(',')):
        for row in measure(
            names, length, options.heads, options.head_width, not options.bidirectional, options.repeats
        ):
            rows.append(row)
            print(line(row), flush=True)
    if options.out:
        shape = {'batch': 1, 'heads': options.heads, 'head_width': options.head_width, 'dtype': 'float32'}
        settings = shape | {'causal': not options.bidirectional, 'repeats': options.repeats}
        options.out.write_text(json.dumps({**environment(), **settings, 'rows': rows}, indent=2) + '\n')


if __name__ == '__main__':
    main()
