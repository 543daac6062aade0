"""Draws the accuracy of associative recall over distance, from the table of `experiments.tables.recall`."""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import combiner
from combiner import cli, messages, paths
from experiments.harness.length_figure import LABEL_INCHES, spread, styles
from experiments.harness.table import evaluations, interval, percent

RANGE = 'distance '  # with this start the names of the evaluations of one range of distances


def by_distance(row: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the accuracies of all seeds of a row in percent, by the range of distances, the nearest first."""
    return {
        name.removeprefix(RANGE): [percent(row['metric']) * value for value in values]
        for name, values in evaluations(row).items()
        if name.startswith(RANGE)
    }


def figure(table: dict[str, Any]) -> Figure:
    """Draws two panels: mechanisms with full support left, all others right; bars are 95 % intervals, from 3 seeds on.

    Raises:
        ValueError: no run of the table is finished.
    """
    rows = [row for row in table['rows'] if row['runs']]
    if not rows:
        raise ValueError(f'no run of {table["name"]} is finished; run python -m experiments.tables.{table["name"]}')
    full = set(combiner.names(full_support=True))
    lines = styles([row['model'] for row in rows])
    panels = {
        'Every earlier position is in the support': [row for row in rows if row['model'] in full],
        'Some positions are out of reach': [row for row in rows if row['model'] not in full],
    }
    height = max(3.2, LABEL_INCHES * max(map(len, panels.values())))  # inches
    fig = Figure(figsize=(13, height + 1.2), layout='constrained')
    for ax, (title, shown) in zip(fig.subplots(1, 2, sharey=True), panels.items(), strict=True):
        _draw(ax, shown, lines, LABEL_INCHES / height)
        ax.set_title(title, loc='left', fontsize=11)
        ax.set_xlabel('distance of a key from its pair, tokens')
    fig.axes[0].set_ylabel('accuracy, %')
    seeds = max(len(row['runs']) for row in rows)
    fig.suptitle(
        f'{rows[0]["runs"][0]["dataset"]}: one layer, {seeds} seed{"s" * (seeds != 1)}', x=0.01, ha='left', fontsize=11
    )
    return fig


def _room(means: list[float]) -> tuple[list[float], list[float]]:
    """Returns the distances of accuracies in percent from 0 and from 100, where their bars end."""
    return means, [100 - mean for mean in means]


def _draw(ax: Axes, rows: list[dict[str, Any]], lines: dict[str, dict[str, Any]], gap: float) -> None:
    ends: dict[str, float] = {}
    for row in rows:
        found = by_distance(row)
        means = [statistics.fmean(values) for values in found.values()]
        # The interval of two seeds is ± 6.4 times their difference: it would hide the lines.
        widths = [(interval(values) or 0.0) if len(values) > 2 else 0.0 for values in found.values()]
        bars = [[min(width, end) for width, end in zip(widths, ends_at, strict=True)] for ends_at in _room(means)]
        ax.errorbar(list(found), means, bars, markersize=3, elinewidth=0.8, clip_on=False, **lines[row['model']])
        ends[row['model']] = means[-1] / 100
    ax.set_ylim(0, 100)
    ax.margins(x=0.02)
    ax.yaxis.set_major_locator(matplotlib.ticker.MultipleLocator(20))
    for (name, end), at in zip(ends.items(), spread(list(ends.values()), gap), strict=True):
        color = lines[name]['color']
        ax.plot([1, 1.01, 1.03], [end, end, at], transform=ax.transAxes, color=color, linewidth=0.6, clip_on=False)
        ax.text(1.035, at, name, transform=ax.transAxes, va='center', fontsize=8, color=color)
    ax.grid(color='#e6e8ec', linewidth=0.8)
    ax.spines[['top', 'right']].set_visible(False)


@cli.guarded
def command(description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Raises:
        SystemExit: the table is missing or has no run.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--table', type=paths.argument, default=Path('results/recall.json'))
    parser.add_argument('--out', type=paths.argument, default=Path('docs/images/recall.png'))
    options = parser.parse_args(arguments)
    try:
        drawn = figure(json.loads(options.table.read_text(encoding='utf-8')))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    messages.heading(data=options.table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(options.out, dpi=110)
    print(f'wrote {options.out}')
    messages.next_steps(f'look at {options.out}')
