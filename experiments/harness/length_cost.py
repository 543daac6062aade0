"""Time and memory of attention over length, measured within limits and drawn."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import combiner
from combiner import cli, messages, paths
from experiments.harness.bench_tables import DENSE
from experiments.harness.length_figure import LABEL_INCHES, draw, measured_on
from experiments.harness.timing import Program, Shape, compiled, environment, mechanism, medians, to_time

PANELS = {'ms': ('Run time', 'milliseconds'), 'mb': ('Memory', 'MB')}


def megabytes(program: Program) -> float:
    """Returns the MB of input, output and temporaries of a program."""
    memory = program.run.memory_analysis()
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes) / 1e6


def predicted_seconds(rows: list[dict[str, Any]], length: int) -> float:
    """Extrapolates the seconds at a length from the last two rows, linearly in log time over log length; 0 without."""
    if len(rows) < 2:
        return 0.0
    before, last = rows[-2:]
    exponent = math.log(last['ms'] / before['ms'], last['length'] / before['length'])
    return last['ms'] / 1e3 * (length / last['length']) ** exponent


def measure(name: str, shapes: list[Shape], what: str, limits: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the rows of one mechanism until it exceeds a limit; prints which."""
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        stop = f'{name} stops at {shape.length:,} tokens: '
        seconds = predicted_seconds(rows, shape.length)
        if seconds > limits.seconds:
            print(f'{stop}it would take about {seconds:,.0f} s', file=sys.stderr)
            return
        try:
            _, function, inputs = to_time(name, what, shape)
            program = compiled(function, inputs, ['forward'])['forward']
        except ValueError as error:
            print(f'{stop}{error}', file=sys.stderr)
            return
        taken = megabytes(program)
        if taken > 1e3 * limits.gigabytes:
            print(f'{stop}it would need {taken / 1e3:,.1f} GB', file=sys.stderr)
            return
        repeats = 1 if seconds > 1 else limits.repeats
        milliseconds = 1e3 * medians({name: program}, repeats)[name]
        rows.append({'name': name, 'length': shape.length, 'ms': round(milliseconds, 3), 'mb': round(taken, 3)})
        print(f'{name} {shape.length:,}: {milliseconds:,.1f} ms, {taken:,.0f} MB', flush=True)
        yield rows[-1]


def figure(document: dict[str, Any]) -> Figure:
    """Draws time on the left, memory on the right."""
    rows = document['rows']
    panel = max(4.0, LABEL_INCHES * len({row['name'] for row in rows}))  # inches
    fig = Figure(figsize=(13, panel + 1.3), layout='constrained')
    for ax, (key, (title, unit)) in zip(fig.subplots(1, 2), PANELS.items(), strict=True):
        draw(ax, rows, key, LABEL_INCHES / panel)
        ax.set_title(title, loc='left', fontsize=11)
        ax.set_ylabel(unit)
    fig.suptitle(f'Attention over length, forward: {measured_on(document)}', x=0.01, ha='left', fontsize=11)
    return fig


def parse(papers: Sequence[str], lengths: Sequence[int], description: str | None, out: str) -> argparse.Namespace:
    """Parses the command line; its defaults are `dense` and `papers`, `lengths` and `out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--names', default=','.join((DENSE, *papers)), help='mechanisms, separated by commas, or all')
    parser.add_argument('--lengths', default=','.join(map(str, lengths)), help='separated by commas')
    parser.add_argument('--seconds', type=float, default=30, help='longest run (default: 30)')
    parser.add_argument('--gigabytes', type=float, default=8, help='most memory (default: 8)')
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--head_width', type=int, default=64)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--core', action='store_true', help='attention alone, for mechanisms without parameters')
    parser.add_argument(
        '--causal', action='store_true', help='for mechanisms that have a causal form (BigBird has none)'
    )
    parser.add_argument('--out', type=paths.argument, default=Path(out))
    options = parser.parse_args()
    options.names = [DENSE, *combiner.names()] if options.names == 'all' else options.names.split(',')
    try:
        options.lengths = sorted(map(int, options.lengths.split(',')))
        for name in options.names:
            mechanism(name, causal=options.causal)
    except ValueError as error:
        parser.error(str(error))
    return options


@cli.guarded
def command(papers: Sequence[str], lengths: Sequence[int], description: str | None, out: str) -> None:
    """Runs the command line."""
    options = parse(papers, lengths, description, out)
    what = 'core' if options.core else 'layer'
    document = {**environment(), 'what': what, 'heads': options.heads, 'head_width': options.head_width}
    document |= {'dtype': 'float32', 'causal': options.causal, 'rows': []}
    messages.heading(device=measured_on(document), mechanisms=', '.join(options.names), lengths=options.lengths)
    shapes = [Shape(length, options.heads, options.head_width, options.causal) for length in options.lengths]
    for name in options.names:
        document['rows'] += measure(name, shapes, what, options)
    if not document['rows']:
        sys.exit('nothing could be measured; raise --seconds and --gigabytes, or give shorter --lengths')
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix('.json').write_text(json.dumps(document, indent=2) + '\n', encoding='utf-8')
    figure(document).savefig(options.out, dpi=150)
    print(f'wrote {options.out} and {options.out.with_suffix(".json")}')
    messages.next_steps(f'look at {options.out}')
