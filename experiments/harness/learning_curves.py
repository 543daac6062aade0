"""The learning curves of a table: the validation metric by step and seed, in its document, and drawn from that."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.harness.run import Run, lines_of
from experiments.harness.table import UNITS, percent, unique

LINES = ('-', '--', ':', '-.')

Points = dict[int, dict[int, float]]  # step -> seed -> validation metric


def of_runs(planned: Iterable[Run]) -> list[dict[str, Any]]:
    """Returns the curve of each row that was validated, as `as_json`, including unfinished runs."""
    found: dict[tuple[str, str], Points] = {}
    for run in planned:
        name = f'validation_{run.row.metric}'
        for line in lines_of(run.workdir / 'metrics.jsonl'):
            if name in line:
                points = found.setdefault((run.row.column, run.row.model), {})
                points.setdefault(line['step'], {})[run.seed] = line[name]
    return [as_json(column, model, points) for (column, model), points in found.items()]


def as_json(column: str, model: str, points: Points) -> dict[str, Any]:
    """Returns one curve as a table's document has it: sorted steps, and for each the values and their seeds."""
    steps = sorted(points)
    return {
        'column': column,
        'model': model,
        'steps': steps,
        'validation': [list(points[step].values()) for step in steps],
        'seeds': [list(points[step]) for step in steps],
    }


def points_of(curve: Mapping[str, Any]) -> Points:
    """Returns the points of a curve of a document, which `as_json` made."""
    return {
        step: dict(zip(seeds, values, strict=True))
        for step, seeds, values in zip(curve['steps'], curve['seeds'], curve['validation'], strict=True)
    }


def figure(table: Mapping[str, Any]) -> Any:
    """Draws the curves of a table's document, one panel per column: median over seeds, and range; None without any."""
    found = {
        (curve['column'], curve['model']): dict(zip(curve['steps'], curve['validation'], strict=True))
        for curve in table.get('curves', ())
    }
    columns = unique(row['column'] for row in table['rows'] if any(column == row['column'] for column, _ in found))
    if not columns:
        return None
    models = unique(row['model'] for row in table['rows'] if any(model == row['model'] for _, model in found))
    import matplotlib  # slow to import: only where it is used
    from matplotlib.figure import Figure

    palette = matplotlib.colormaps['tab10']
    styles = {
        model: {'color': palette(index % palette.N), 'linestyle': LINES[index // palette.N % len(LINES)]}
        for index, model in enumerate(models)
    }
    fig = Figure(figsize=(1.2 + 4.4 * len(columns), 4.6 + 0.25 * -(-len(models) // 3)), layout='constrained')
    lines = {}
    for ax, column in zip(fig.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        metric = next(row['metric'] for row in table['rows'] if row['column'] == column)
        for model in models:
            if points := found.get((column, model)):
                shown = {step: [percent(metric) * value for value in values] for step, values in points.items()}
                lines[model] = _draw(ax, shown, styles[model])
        ax.set_title(column, loc='left', fontsize=11)
        ax.set_xlabel('step')
        ax.set_ylabel(f'{UNITS.get(metric, metric)}, validation')
        ax.set_xlim(left=0)
        if 'perplexity' in metric:
            ax.set_yscale('log')
        ax.grid(axis='y', which='both', color='#e6e8ec', linewidth=0.8)
        ax.spines[['top', 'right']].set_visible(False)
    handles = [lines[model] for model in models]
    fig.legend(handles, models, loc='outside lower left', ncols=min(3, len(columns) + 1), frameon=False, fontsize=9)
    return fig


def _draw(ax: Any, points: dict[int, list[float]], style: dict[str, Any]) -> Any:
    steps = list(points)
    marker = 'o' if len(steps) == 1 else ''
    (line,) = ax.plot(steps, [statistics.median(points[step]) for step in steps], linewidth=1.8, marker=marker, **style)
    if any(len(points[step]) > 1 for step in steps):
        low, high = ([end(points[step]) for step in steps] for end in (min, max))
        ax.fill_between(steps, low, high, color=style['color'], alpha=0.15, linewidth=0)
        if len(steps) == 1:
            ax.vlines(steps, low, high, color=style['color'])
    return line
