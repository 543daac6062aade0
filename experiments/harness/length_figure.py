"""Draws a measurement over length, one line for each mechanism, both axes logarithmic.

Dense attention is black; mechanisms with full support have solid lines, all others dashed ones.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

import combiner
from experiments.harness.bench_tables import DENSE

LABEL_INCHES = 0.19  # the height of a label
MARKERS = 'os^Dv'


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Returns heights near the given ones, in the same order, at least `gap` apart and, if they fit, between 0 and 1.

    Neighbours that are too close are merged into a group around their mean, until none are.
    """
    groups: list[list[int]] = []

    def bottom(group: list[int]) -> float:
        room = gap * (len(group) - 1)
        return max(0.0, min(1 - room, float(np.mean([heights[i] for i in group])) - room / 2))

    for index in sorted(range(len(heights)), key=heights.__getitem__):
        groups.append([index])
        while len(groups) > 1 and bottom(groups[-1]) < bottom(groups[-2]) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    placed = {index: bottom(group) + gap * position for group in groups for position, index in enumerate(group)}
    return [placed[index] for index in range(len(heights))]


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the line style of each mechanism."""
    full_support = set(combiner.names(full_support=True))
    full = [name for name in names if name.partition('+')[0] in full_support]
    others = [name for name in names if name not in (DENSE, *full)]
    lines = {DENSE: {'color': 'black', 'linestyle': '-', 'linewidth': 2, 'marker': 'o'}}
    bright, dark = (matplotlib.color_sequences[name] for name in ('tab10', 'Dark2'))
    for group, palette, line in ((full, bright + dark, ('-', 2)), (others, dark + bright, ('--', 1.2))):
        for index, name in enumerate(group):
            color, marker = palette[index % len(palette)], MARKERS[index // len(palette) % len(MARKERS)]
            lines[name] = {'color': color, 'linestyle': line[0], 'linewidth': line[1], 'marker': marker}
    return lines


def draw(ax: Axes, rows: list[dict[str, Any]], key: str, gap: float, among: Sequence[str] = ()) -> None:
    """Draws one panel, every line labelled at its right end; labels are `gap` of the panel's height apart.

    Panels of one picture that lack some of its lines get all their names in `among`, so that styles agree.
    """
    ends = {}
    names = list(dict.fromkeys(row['name'] for row in rows))
    lines = styles(among or names)
    for name in names:
        points = sorted((row['length'], row[key]) for row in rows if row['name'] == name)
        ax.plot(*zip(*points, strict=True), markersize=3, clip_on=False, **lines[name])
        ends[name] = points[-1]
    ax.set_xscale('log', base=2)
    ax.set_yscale('log')
    lengths = sorted({row['length'] for row in rows})
    ax.set_xticks(lengths, [f'{length:,}' for length in lengths], rotation=45, fontsize=8)
    ax.minorticks_off()
    to_axes = ax.transData + ax.transAxes.inverted()
    points = {name: to_axes.transform(end) for name, end in ends.items()}
    heights = spread([y for _, y in points.values()], gap)
    for (name, (x, y)), height in zip(points.items(), heights, strict=True):
        color = lines[name]['color']
        ax.plot([x, 1.01, 1.03], [y, y, height], transform=ax.transAxes, color=color, linewidth=0.6, clip_on=False)
        ax.text(1.035, height, name, transform=ax.transAxes, va='center', fontsize=8, color=color)
    ax.grid(color='#e6e8ec', linewidth=0.8)
    ax.spines[['top', 'right']].set_visible(False)
    ax.set_xlabel('length (tokens)')


def measured_on(document: dict[str, Any]) -> str:
    """Returns the sizes, the direction and the machine of a measurement as text."""
    causal = 'causal' if document['causal'] else 'bidirectional'
    size = f'{document["heads"]} heads of {document["head_width"]}, {document["dtype"]}, {causal}'
    return f'{size}; {document["device"]} ({document["machine"]}, {document["cores"]} cores), JAX {document["jax"]}'
