"""What full-size rows need, on the cards of their configs: hours of training, and the slice that holds a step.

The hours are computed with an assumed utilisation; slice and memory are those of `compile_report`.
"""

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from combiner import atomic, build, cli, messages
from combiner.aot.chips import CHIPS, GIB
from combiner.monitoring import flops
from experiments.harness import compile_report, runner
from experiments.harness.row import Row
from experiments.harness.run import ROOT, full_size

MFU = 0.3  # assumed: no row has run on an accelerator yet
ON = ('v5e', 'v5p', 'h100')
LINE = '    {:<44}  {:>7}' + '  {:>9}' * len(ON) + '  {:>8}  {:>5}'
HEAD = 'chip-hours, computed for {:.0%} MFU'


def head(mfu: float = MFU) -> str:
    """Returns the head of a table."""
    return LINE.format(HEAD.format(mfu), 'TFLOP', *ON, 'slice', 'GiB')


def line(row: Row, mfu: float = MFU) -> str:
    """Returns the TFLOP of a step, the hours of a training on one chip of each kind, slice and memory, for a card.

    `≥` marks a row whose attention has no formula: its dense layers alone are counted. The slice is the smallest of v5e
    that holds a step, the memory what a chip of it then holds; `–` if the step was not compiled.
    """
    config = full_size(row)
    step = flops.training_step(config, build.task(config))
    least = '≥' if step.attention is None else ''
    peaks = (CHIPS[name].flops_per_second for name in ON)
    hours = (flops.hours(step.total, config.steps, 1, peak, mfu) for peak in peaks)
    cells = (least + _rounded(each) for each in hours)
    name = runner.names_of(row)[0]
    return LINE.format(name, f'{least}{step.total / 1e12:,.3g}', *cells, *_memory(slices().get(name)))


@functools.cache
def slices() -> dict[str, dict[str, Any]]:
    """Returns the compiled step of each row on the smallest slice that holds it."""
    results = json.loads(compile_report.RESULTS.read_text(encoding='utf-8'))
    return compile_report.smallest_slices(results['steps'])


def _memory(step: dict[str, Any] | None) -> tuple[str, str]:
    if step is None:
        return '–', '–'
    if not step['fits']:
        return f'>{step["target"]}', f'>{step["temporaries_bytes"] / GIB:.1f}'
    return step['target'], f'{step["total_bytes"] / GIB:.1f}'


def _rounded(hours: float) -> str:
    return f'{hours:,.0f}' if hours >= 10 else f'{hours:.1f}' if hours >= 1 else f'{hours:.1g}'


def card(config: str, rows: Sequence[Row]) -> list[str]:
    """Returns the lines of the card of a config file."""
    return [head(), *(line(row) for row in rows if row.config == config)]


def write(config: str, lines: Sequence[str], root: Path = ROOT) -> None:
    """Replaces the lines of a card, from its head up to the next empty line.

    Raises:
        ValueError: the card has no such head.
    """
    path = root / config
    known = path.read_text(encoding='utf-8').split('\n')
    start = next((index for index, each in enumerate(known) if each.lstrip().startswith('chip-hours')), None)
    if start is None:
        raise ValueError(f'{config} has no line that starts with "chip-hours", where its table goes')
    end = start
    while known[end].strip() not in ('', '"""'):
        end += 1
    atomic.write_text(path, '\n'.join([*known[:start], *lines, *known[end:]]))


@cli.guarded
def command(rows: Sequence[Row], description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m experiments.tables.hours',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--rows', default='', help='patterns, separated by commas (default: all rows)')
    parser.add_argument('--mfu', type=float, default=MFU, help='assumed share of the peak (default: %(default)s)')
    parser.add_argument('--write', action='store_true', help='write the default table to the cards of all configs')
    options = parser.parse_args(arguments)
    if not 0 < options.mfu <= 1:
        parser.error(f'--mfu={options.mfu} must be above 0 and at most 1')
    if options.write and (options.rows or options.mfu != MFU):
        parser.error('--write writes all rows for the default --mfu; leave out --rows and --mfu')
    if options.write:
        for config in dict.fromkeys(row.config for row in rows):
            write(config, card(config, rows))
        messages.next_steps('git diff configs')
        return
    try:
        selected = runner.select(rows, options.rows)
    except ValueError as error:
        parser.error(str(error))
    messages.heading(device='published peaks; nothing is run', rows=len(selected))
    print(head(options.mfu))
    for row in selected:
        print(line(row, options.mfu), flush=True)
    messages.next_steps("python scripts/compile.py --report --rows 'PATTERN'  # the missing slices")
