"""Drawings of lines whose values can be read, as SVG, and the line of every mechanism.

A drawing fills the width it gets: places are percentages, so that text keeps its size on a phone. The script of the
page shows the values where the reader points, hides lines and changes the scale; it draws nothing, so that without it,
and on paper, everything is there with the last values.
"""

import html
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from matplotlib import ticker

import combiner
from experiments.harness.report.elements import element
from experiments.harness.table import unique

COMBINER = 'combiner_'
HUES = 7  # colours of report.css besides the ink of `full`
MARKERS = 5  # shapes of SHAPES
LOG_FROM = 2.0  # ratio of largest and smallest value from which a logarithmic scale is offered
SHAPES = (
    '<svg class="shapes" width="0" height="0" aria-hidden="true"><defs>'
    '<circle id="m0" r="3"/><rect id="m1" x="-3" y="-3" width="6" height="6"/><path id="m2" d="M0-4 4 3-4 3z"/>'
    '<path id="m3" d="M0-4.5 4.5 0 0 4.5-4.5 0z"/><path id="m4" d="M-4-1.3h2.7V-4h2.6v2.7H4v2.6H1.3V4h-2.6V1.3H-4z"/>'
    '</defs></svg>'
)


class Style(NamedTuple):
    """How a line is drawn.

    Attributes:
        hue: number of a colour of report.css, 0 for the ink.
        dash: 'solid', 'dashed', 'dotdash' or 'dotted'.
        marker: number of a shape.
    """

    hue: int
    dash: str
    marker: int = 0

    def classes(self) -> str:
        """Returns the classes of report.css."""
        return f'h{self.hue} {self.dash}'


class Line(NamedTuple):
    """One line of a drawing: all values, such as those of the seeds, by position; positions ascend."""

    name: str
    style: Style
    points: Mapping[float, Sequence[float]]


def mechanism(argument: str) -> str:
    """Returns the name of the mechanism in the argument of a config; the argument itself if there is none."""
    found = re.search(r'(?:^|,)attention=([^,+]+)', argument)
    return found[1] if found else argument


def styles(others: Iterable[str] = ()) -> dict[str, Style]:
    """Returns the line of every registered mechanism, and of others, which come last.

    `full` has the colour of the text. A Combiner is solid; the sparse attention that it improves has the same colour
    and is dashed. All other mechanisms are dot-dashed, then dotted.
    """
    names = [*sorted(combiner.names()), *(name for name in unique(others) if name not in combiner.names())]
    combiners = [name for name in names if name.startswith(COMBINER)]
    families = unique(name.removeprefix(COMBINER).split('_')[0] for name in combiners)
    found: dict[str, Style] = {}
    rest = 0
    for name in names:
        family = name.removeprefix(COMBINER).split('_')[0]
        if name == 'full':
            found[name] = Style(0, 'solid')
        elif name in combiners or name in families:
            hue, dash = families.index(family) % HUES + 1, 'solid' if name in combiners else 'dashed'
            same = sum(style[:2] == (hue, dash) for style in found.values())
            found[name] = Style(hue, dash, same % MARKERS)
        else:
            dash = 'dotdash' if rest < HUES else 'dotted'
            found[name] = Style(rest % HUES + 1, dash, rest // (2 * HUES) % MARKERS)
            rest += 1
    return found


def of_rows(rows: Iterable[tuple[str, str]], known: Mapping[str, Style]) -> dict[str, Style]:
    """Returns the line of each model of a table: that of its mechanism, with another marker for each further model.

    Args:
        rows: models and the arguments of their configs.
        known: see `styles`.
    """
    found: dict[str, Style] = {}
    for model, argument in rows:
        if model not in found:
            style = known[mechanism(argument)]
            same = sum(other[:2] == style[:2] and other.marker >= style.marker for other in found.values())
            found[model] = style._replace(marker=(style.marker + same) % MARKERS)
    return found


def swatch(style: Style) -> str:
    """Returns a short piece of a line, to stand in front of its name."""
    return (
        f'<svg class="swatch {style.classes()}" width="36" height="10" aria-hidden="true">'
        f'<path class="stroke" d="M0 5H36"/><use href="#m{style.marker}" x="18" y="5"/></svg>'
    )


class Axis(NamedTuple):
    """A vertical axis: its ends in percent of the height for a value, and the ticks."""

    low: float
    high: float
    log: bool
    ticks: Sequence[float]

    def place(self, value: float) -> float:
        """Returns the place of a value, in percent from the top."""
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return 100 * (high - value) / (high - low)


def axis(values: Sequence[float], *, log: bool) -> Axis:
    """Returns the axis that shows all values with a small margin."""
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.04 if high > low else 1.1
        low, high = low / margin, high * margin
        ticks = [step * 10.0**power for power in range(-12, 13) for step in (1, 2, 5)]
        if sum(low <= tick <= high for tick in ticks) < 3:
            ticks = ticker.MaxNLocator(5).tick_values(low, high)
    else:
        margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - margin, high + margin
        ticks = ticker.MaxNLocator(6).tick_values(low, high)
    return Axis(low, high, log, [float(tick) for tick in ticks if low <= tick <= high])


def _text(values: Sequence[float], places: int) -> str:
    """Returns the median, and the range of several values."""
    middle = f'{statistics.median(values):,.{places}f}'
    return middle if len(values) == 1 else f'{middle} ({min(values):,.{places}f}–{max(values):,.{places}f})'


def _path(points: Iterable[tuple[float, float]]) -> str:
    return 'M' + ' '.join(f'{10 * x:.5g} {10 * y:.5g}' for x, y in points)


def _line(line: Line, index: int, across: Mapping[float, float], scale: Axis, few: bool) -> str:
    """Returns one line with the band of its range and its markers: at all points if they are few, else at the last."""
    middles = [(across[x], scale.place(statistics.median(values))) for x, values in line.points.items()]
    ends = [[(across[x], scale.place(end(values))) for x, values in line.points.items()] for end in (min, max)]
    shapes = f'<path class="stroke" d="{_path(middles)}"/>'
    if any(len(values) > 1 for values in line.points.values()):
        shapes = f'<path class="band" d="{_path([*ends[0], *reversed(ends[1])])}Z"/>{shapes}'
    inner = element('svg', shapes, viewBox='0 0 1000 1000', preserveAspectRatio='none', width='100%', height='100%')
    marked = middles if few else middles[-1:]
    uses = (f'<use href="#m{line.style.marker}" x="{x:.4g}%" y="{y:.4g}%"/>' for x, y in marked)
    heights = json.dumps([round(y, 2) for _, y in middles])
    return element('g', inner, *uses, class_=f'line {line.style.classes()}', data_line=str(index), data_y=heights)


def _plot(
    lines: Sequence[Line], across: Mapping[float, float], labels: Mapping[float, str], scale: Axis, title: str
) -> str:
    """Returns the drawing at one scale: the labels of both axes, the grid and the lines."""
    levels = [(scale.place(tick), f'{tick:,.6g}') for tick in scale.ticks]
    beside = (f'<text x="100%" y="{y:.4g}%" dy="0.32em">{text}</text>' for y, text in levels)
    below = (f'<text x="{across[x]:.4g}%" y="1.4em">{html.escape(text)}</text>' for x, text in labels.items())
    few = len(across) <= 12
    drawn = [f'<line class="grid" x2="100%" y1="{y:.4g}%" y2="{y:.4g}%"/>' for y, _ in levels]
    drawn += [_line(line, index, across, scale, few) for index, line in enumerate(lines)]
    return (
        element('svg', *beside, class_='beside', aria_hidden='true')
        + element('svg', *drawn, class_='drawing', role='img', aria_label=title)
        + element('svg', *below, class_='below', aria_hidden='true')
    )


def _legend(lines: Sequence[Line], places: int) -> str:
    items = []
    for index, line in enumerate(lines):
        x, values = list(line.points.items())[-1]
        texts = {str(float(at)): _text(found, places) for at, found in line.points.items()}
        button = element(
            'button',
            swatch(line.style),
            element('span', html.escape(line.name), class_='name'),
            element('span', html.escape(_text(values, places)), class_='value', data_at=str(float(x))),
            type='button',
            aria_pressed='true',
            data_line=str(index),
            data_points=json.dumps(texts, ensure_ascii=False),
        )
        items.append(element('li', button))
    return element('ul', *items, class_='legend')


def _ticks(labels: Mapping[float, str]) -> dict[float, str]:
    """Returns at most five labels of positions, among them the first and the last."""
    every = list(labels.items())
    chosen = {round(index * (len(every) - 1) / min(4, len(every) - 1 or 1)) for index in range(min(5, len(every)))}
    return {x: text for index, (x, text) in enumerate(every) if index in chosen}


def drawing(
    title: str, lines: Iterable[Line], *, unit: str, name: str, labels: Mapping[float, str], places: int, log: bool
) -> str:
    """Returns a figure of lines.

    Args:
        title: plain text above it.
        lines: to draw; values that are not finite are left out.
        unit: of the values.
        name: of the positions, such as 'step'.
        labels: text of every position.
        places: decimals of the values.
        log: whether the scale is logarithmic at first; the reader can change it if the values differ enough.
    """
    kept = []
    for line in lines:
        finite = {x: [value for value in values if math.isfinite(value)] for x, values in line.points.items()}
        if points := {x: values for x, values in finite.items() if values}:
            kept.append(line._replace(points=points))
    if not kept:
        return ''
    values = [value for line in kept for found in line.points.values() for value in found]
    offered = min(values) > 0 and max(values) / min(values) >= LOG_FROM
    chosen = 'log' if log and offered else 'linear'
    positions = sorted({x for line in kept for x in line.points})
    first, last = (0.0 if name == 'step' else positions[0]), positions[-1]
    across = {x: 100 * (x - first) / (last - first or 1) for x in positions}
    ticks = _ticks({x: labels[x] for x in positions})
    plots = [
        element(
            'div',
            _plot(kept, across, ticks, axis(values, log=scale == 'log'), title),
            class_='plot',
            data_scale=scale,
            **({} if scale == chosen else {'hidden': ''}),
        )
        for scale in (('linear', 'log') if offered else ('linear',))
    ]
    scales = (
        element('button', scale, type='button', data_scale=scale, aria_pressed=str(scale == chosen).lower())
        for scale in ('linear', 'log')
    )
    end = f'{name} {labels[last]}' if all(last in line.points for line in kept) else 'the last of each line'
    return element(
        'figure',
        element('figcaption', element('b', html.escape(title)), f' {html.escape(unit)}'),
        element('div', *scales, class_='scales', role='group', aria_label='scale') if offered else '',
        *plots,
        element('p', element('output', html.escape(end)), class_='at'),
        _legend(kept, places),
        class_='chart',
        data_name=name,
        data_x=json.dumps([[round(across[x], 3), str(float(x)), labels[x]] for x in positions], ensure_ascii=False),
    )
