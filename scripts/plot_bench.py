"""Draws what scripts/bench.py measured: time over length, one line for each mechanism.

    python scripts/plot_bench.py results/bench.json [--what core] [--out docs/images/bench.png]

Forward on the left, forward with backward on the right, both axes logarithmic. Dense attention is black; mechanisms
that reach everything are drawn through, sparse and other ones dashed.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import combiner
from experiments.bench_tables import DENSE, PASSES

TITLES = dict(zip(PASSES, ('Forward', 'Forward and backward'), strict=True))
LABEL_INCHES = 0.19
MARKERS = 'os^Dv'


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights near the given ones, in the same order, at least `gap` apart and, where they fit, between 0 and 1.

    Neighbours that are too near become a group around their mean, as often as it takes.
    """
    groups: list[list[int]] = []

    def bottom(group: list[int]) -> float:
        room = gap * (len(group) - 1)
        return max(0.0, min(1 - room, float(np.mean([heights[i] for i in group])) - room / 2))

    for index in sorted(range(len(heights)), key=heights.__getitem__):
        groups.append([index])
        while len(groups) > 1 and bottom(groups[-1]) < bottom(groups[-2]) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = {index: bottom(group) + gap * turn for group in groups for turn, index in enumerate(group)}
    return [placed[index] for index in range(len(heights))]


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How the line of each mechanism looks."""
    everything = set(combiner.names(full_support=True))
    whole = [name for name in names if name.partition('+')[0] in everything]
    others = [name for name in names if name not in (DENSE, *whole)]
    looks = {DENSE: {'color': 'black', 'linestyle': '-', 'linewidth': 2, 'marker': 'o'}}
    for group, colors, line in ((whole, 'tab10', ('-', 2)), (others, 'Dark2', ('--', 1.2))):
        palette = matplotlib.colormaps[colors]
        for index, name in enumerate(group):
            color, marker = palette(index % palette.N), MARKERS[index // palette.N % len(MARKERS)]
            looks[name] = {'color': color, 'linestyle': line[0], 'linewidth': line[1], 'marker': marker}
    return looks


def draw(ax: Axes, rows: list[dict[str, Any]], key: str, gap: float) -> None:
    """One panel, every line named at its right end; labels are `gap` of the panel's height apart."""
    ends = {}
    names = list(dict.fromkeys(row['name'] for row in rows))
    looks = styles(names)
    for name in names:
        points = sorted((row['length'], row[key]) for row in rows if row['name'] == name)
        ax.plot(*zip(*points, strict=True), markersize=3, clip_on=False, **looks[name])
        ends[name] = points[-1]
    ax.set_xscale('log', base=2)
    ax.set_yscale('log')
    lengths = sorted({row['length'] for row in rows})
    ax.set_xticks(lengths, [f'{length:,}' for length in lengths], rotation=45, fontsize=8)
    ax.minorticks_off()
    to_axes = ax.transData + ax.transAxes.inverted()
    places = {name: to_axes.transform(end) for name, end in ends.items()}
    heights = spread([place[1] for place in places.values()], gap)
    for (name, (x, y)), height in zip(places.items(), heights, strict=True):
        color = looks[name]['color']
        ax.plot([x, 1.01, 1.03], [y, y, height], transform=ax.transAxes, color=color, linewidth=0.6, clip_on=False)
        ax.text(1.035, height, name, transform=ax.transAxes, va='center', fontsize=8, color=color)
    ax.grid(color='#e6e8ec', linewidth=0.8)
    ax.spines[['top', 'right']].set_visible(False)
    ax.set_xlabel('length (tokens)')


def figure(document: dict[str, Any], what: str) -> Figure:
    """Both panels.

    Raises:
        ValueError: nothing of that kind was measured.
    """
    rows = [row for row in document['rows'] if row['what'] == what]
    if not rows:
        raise ValueError(f'no rows of {what!r} were measured')
    panel = max(4.0, LABEL_INCHES * len({row['name'] for row in rows}))  # inches
    fig = Figure(figsize=(13, panel + 1.3), layout='constrained')
    for ax, each in zip(fig.subplots(1, 2), PASSES, strict=True):
        draw(ax, rows, f'{each}_ms', LABEL_INCHES / panel)
        ax.set_title(TITLES[each], loc='left', fontsize=11)
        ax.set_ylabel('milliseconds')
    causal = 'causal' if document['causal'] else 'bidirectional'
    size = f'{document["heads"]} heads of {document["head_width"]}, {document["dtype"]}, {causal}'
    machine = f'{document["device"]} ({document["machine"]}, {document["cores"]} cores), JAX {document["jax"]}'
    fig.suptitle(f'Time of attention ({what}): {size}; {machine}', x=0.01, ha='left', fontsize=11)
    return fig


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('measured', type=Path, help='what scripts/bench.py --out wrote')
    parser.add_argument('--what', default='core', help='core or layer (default: core)')
    parser.add_argument(
        '--out', type=Path, default=Path('docs/images/bench.png'), help='default: docs/images/bench.png'
    )
    options = parser.parse_args()
    try:
        drawn = figure(json.loads(options.measured.read_text(encoding='utf-8')), options.what)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(options.out, dpi=150)
    print(f'wrote {options.out}')


if __name__ == '__main__':
    main()
