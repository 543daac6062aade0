"""Times packed rows with and without the isolation of documents: `python scripts/bench.py packed`.

`combiner.attend` with segments isolates documents: it looks for numbers that are not finite, and replaces their
documents by zeros before it attends and by NaN after. `Mechanism.attend` with the same segments does not. Both run in
turn in one process.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

import combiner
from combiner import cli, messages, paths
from combiner.core import registry
from combiner.core.mechanism import Context, Mechanism
from experiments.harness.bench_tables import PASSES
from experiments.harness.timing import Program, compiled, environment, medians, write_json

NAMES = [name for name in combiner.names() if registry.resolve(name).supports_segments]
WAYS = ('plain', 'isolated')
HEAD = (
    '| attention | forward, ms | isolated | | forward + backward, ms | isolated | |',
    '|---|---|---|---|---|---|---|',
)


def documents(length: int, count: int) -> np.ndarray:
    """Returns the segments of one row with `count` documents of random lengths."""
    ends = np.random.default_rng(0).choice(np.arange(1, length), count - 1, replace=False)
    return np.searchsorted(np.sort(ends), np.arange(length), side='right')[None].astype(np.int32)


def without_isolation(mechanism: Mechanism, segments: jax.Array, q: Any, k: Any, v: Any) -> jax.Array:
    """Attends by the mechanism alone."""
    return mechanism.attend(q, k, v, Context(segments=segments))


def programs_of(name: str, segments: np.ndarray, inputs: tuple) -> dict[tuple[str, str, str], Program]:
    """Compiles both passes of a mechanism, without isolation and with it."""
    numbers = jax.numpy.asarray(segments)
    ways: dict[str, Callable[..., Any]] = {
        'plain': partial(without_isolation, registry.make_mechanism(name), numbers),
        'isolated': lambda q, k, v: combiner.attend(q, k, v, name, causal=True, segments=numbers),
    }
    return {
        (name, way, each): program
        for way, function in ways.items()
        for each, program in compiled(function, inputs).items()
    }


def measure(name: str, segments: np.ndarray, inputs: tuple, repeats: int) -> dict[str, Any]:
    """Returns one row: the milliseconds of each pass, without isolation and with it, and their ratio."""
    seconds = medians(programs_of(name, segments, inputs), repeats)
    row: dict[str, Any] = {'name': name, 'length': segments.shape[1]}
    for each in PASSES:
        plain, isolated = (seconds[name, way, each] for way in WAYS)
        row |= {f'{each}_ms': round(1e3 * plain, 2), f'{each}_isolated_ms': round(1e3 * isolated, 2)}
        row[f'{each}_times'] = round(isolated / plain, 2)
    return row


def line(row: dict[str, Any]) -> str:
    """Returns a row of the printed table."""
    cells = (f'{row[f"{each}_ms"]} | {row[f"{each}_isolated_ms"]} | {row[f"{each}_times"]}×' for each in PASSES)
    return f'| `{row["name"]}` | {" | ".join(cells)} |'


@cli.guarded
def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog='scripts/bench.py packed', description=__doc__)
    parser.add_argument('--names', default=','.join(NAMES), help='mechanisms, separated by commas')
    parser.add_argument('--length', type=int, default=4096)
    parser.add_argument('--documents', type=int, default=8, help='in the row')
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--out', type=paths.argument, help='write JSON there')
    options = parser.parse_args(arguments)
    names = options.names.split(',')
    if refused := sorted(set(names) - set(NAMES)):
        parser.error(f'no packed rows: {", ".join(refused)}; choose from {", ".join(NAMES)}')
    if not 1 <= options.documents < options.length:
        parser.error(f'--documents={options.documents} of {options.length} positions; choose from 1 on, and fewer')
    segments = documents(options.length, options.documents)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = tuple(jax.random.normal(key, (1, options.length, 8, 64)) for key in keys)
    messages.heading(device=environment()['device'], mechanisms=', '.join(names), length=options.length)
    print(*HEAD, sep='\n')
    rows = []
    for name in names:
        rows.append(measure(name, segments, inputs, options.repeats))
        print(line(rows[-1]), flush=True)
        if options.out:
            found = {**environment(), 'heads': 8, 'head_width': 64, 'documents': options.documents, 'rows': rows}
            write_json(options.out, found)
