"""Writes a table: NAME.json, NAME.md, and NAME.png with the learning curves."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from combiner import atomic
from experiments.harness import marked
from experiments.harness.run import Run, lines_of, measured

UNITS = {
    'accuracy': 'accuracy in %',
    'bits_per_dim': 'bits/dim',
    'perplexity': 'perplexity',
    'word_perplexity': 'perplexity per word',
    'bits_per_byte': 'bits/byte',
}
DECIMALS = 3  # of a column without published values
VERSIONS = ('python', 'jax', 'jaxlib', 'flax', 'numpy')
LINES = ('-', '--', ':', '-.')
COSTS = ('seeds', 'steps', 'tokens', 'minutes of training', 'seconds a step', 'peak memory, MB')
ROWS_TO_CORRELATE = 3  # with fewer, a correlation says nothing
TIMING_COLUMNS = ('model', 'column', 'seconds a step', 'memory, MB', 'compiling, s')


def interval(values: Sequence[float]) -> float | None:
    """Returns half the width of the 95 % interval of the mean (Student's t); None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy import stats  # slow to import: only where it is used

    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns seeds, mean with interval, steps, tokens, and means of the measurements; {} without runs."""
    if not found:
        return {}
    values = [run['value'] for run in found]
    result: dict[str, Any] = {'seeds': len(found), 'mean': statistics.fmean(values), 'interval': interval(values)}
    for name, over in (
        ('steps', max),
        ('tokens', max),
        ('train_minutes', statistics.fmean),
        ('seconds_per_step', statistics.fmean),
        ('train_peak_memory_mb', max),
    ):
        known = [run[name] for run in found if name in run]
        result[name] = over(known) if known else None
    return result


def rank_correlations(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[float | None, int]]:
    """Returns how far our means order the models of each column as the published values do.

    Returns:
        For each column with published values: Spearman's rank correlation, which is 1 for the same order and -1 for the
        reverse, and the number of rows with both values. It is None for fewer than three rows, and if all values of one
        kind are equal.
    """
    both: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row['published'] is not None:
            found = both.setdefault(row['column'], [])
            if row['ours']:
                found.append((row['published'], row['ours']['mean']))
    return {column: (_spearman(found), len(found)) for column, found in both.items()}


def _spearman(values: Sequence[tuple[float, float]]) -> float | None:
    if len(values) < ROWS_TO_CORRELATE or any(len(set(kind)) == 1 for kind in zip(*values, strict=True)):
        return None
    from scipy import stats  # slow to import: only where it is used

    published, ours = ([float(rank) for rank in stats.rankdata(kind)] for kind in zip(*values, strict=True))
    return statistics.correlation(published, ours)


def document(name: str, scale: str, planned: Sequence[Run]) -> dict[str, Any]:
    """Returns the table, with the measurements of all finished runs.

    Args:
        name: of the table.
        scale: of its runs.
        planned: runs of all rows, in the order of the table, row by row.
    """
    rows = []
    for row in dict.fromkeys(run.row for run in planned):
        found = [values for run in planned if run.row == row and (values := measured(run))]
        rows.append({**vars(row), 'ours': summarise(found), 'runs': found})
    return {'name': name, 'scale': scale, 'rows': rows}


def unique(values: Iterable[Any]) -> list[Any]:
    """Returns each value once, in the order of appearance."""
    return list(dict.fromkeys(values))


def percent(metric: str) -> int:
    """Returns the factor for values of a metric in tables: 100 for accuracy, which is shown in %."""
    return 100 if metric == 'accuracy' else 1


def decimals(rows: Iterable[dict[str, Any]]) -> int:
    """Returns the number of decimals of the published values of a column."""
    shown = [f'{percent(row["metric"]) * row["published"]:.8g}' for row in rows if row['published'] is not None]
    return max((len(text.partition('.')[2]) for text in shown), default=DECIMALS)


def plus_minus(summary: Mapping[str, Any], factor: int, places: int) -> str:
    """Returns the mean, and half the interval if there is one, as text; both times `factor`."""
    text = f'{factor * summary["mean"]:.{places}f}'
    return text if summary['interval'] is None else f'{text} ± {factor * summary["interval"]:.{places}f}'


def cells(rows: list[dict[str, Any]], column: str, model: str) -> tuple[str, str]:
    """Returns the published value and ours of a row as text; '' for a value that is missing."""
    of_column = [row for row in rows if row['column'] == column]
    row = next((row for row in of_column if row['model'] == model), None)
    if row is None:
        return '', ''
    places, factor = decimals(of_column), percent(row['metric'])
    ours = plus_minus(row['ours'], factor, places) if row['ours'] else ''
    return '' if row['published'] is None else f'{factor * row["published"]:.{places}f}', ours


def costs(row: dict[str, Any]) -> list[str]:
    """Returns the cells below `COSTS` of a row that was run."""
    ours = row['ours']
    formats = {
        'seeds': '{:,}',
        'steps': '{:,}',
        'tokens': '{:,}',
        'train_minutes': '{:,.1f}' if (ours['train_minutes'] or 0) >= 10 else '{:.2g}',
        'seconds_per_step': '{:.4g}',
        'train_peak_memory_mb': '{:,.0f}',
    }
    return ['' if ours[name] is None else text.format(ours[name]) for name, text in formats.items()]


def timings(table: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Returns the costs of steps as rows below `TIMING_COLUMNS`, and how they were measured; empty without costs."""
    found = table.get('costs')
    if not found:
        return [], ''
    body = [
        [
            row['model'],
            row['column'],
            f'{row["seconds_per_step"]:.4g}',
            f'{row["memory_mb"]:,.0f}',
            f'{row["compile_seconds"]:.1f}',
        ]
        for row in found['rows']
    ]
    return body, (
        f'These steps were taken in turn in one process, without data or validation: medians of {found["rounds"]} '
        f'rounds. Memory is what XLA plans for state, batch and temporaries. Measured on {machine(found)}.'
    )


def with_evaluations(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows whose runs all have several evaluations.

    For text the evaluations are `stream` and `documents` (see `combiner.data.text_tasks.text_task`).
    """
    return [row for row in rows if row['runs'] and all('evaluations' in run for run in row['runs'])]


def evaluations(row: dict[str, Any]) -> dict[str, list[float]]:
    """Returns the metric of all seeds of a row in each of its evaluations."""
    names = unique(name for run in row['runs'] for name in run['evaluations'])
    return {name: [run['evaluations'][name] for run in row['runs'] if name in run['evaluations']] for name in names}


def by_evaluation(rows: list[dict[str, Any]]) -> str:
    """Returns the metrics of `with_evaluations` as Markdown, one column each; '' if there are no such rows."""
    done = with_evaluations(rows)
    names = unique(name for row in done for name in evaluations(row))
    body = []
    for row in done:
        factor, places = percent(row['metric']), decimals([each for each in rows if each['column'] == row['column']])
        found = evaluations(row)
        means = [
            {'mean': statistics.fmean(found[name]), 'interval': interval(found[name])} if name in found else None
            for name in names
        ]
        shown = ['' if mean is None else plus_minus(mean, factor, places) for mean in means]
        body.append([row['model'], row['column'], *shown])
    return marked.table(['model', 'column', *(f'evaluation={name}' for name in names)], body) if body else ''


def notes(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the sentences below the table: units, data, how to read it, machine."""
    units = {}
    for row in rows:
        units.setdefault(UNITS.get(row['metric'], row['metric']), []).append(row['column'])
    lines = ['; '.join(f'{unit}: {", ".join(unique(columns))}' for unit, columns in units.items()) + '.']
    lines.append(
        'Ours: test split, latest parameters, the mean over seeds ± half of its 95 % interval (Student’s t); '
        'one seed has no interval.'
    )
    done = [(row, run) for row in rows for run in row['runs']]
    if not done:
        return [*lines, 'Nothing was run yet.']
    lines += unique(
        f'{row["column"]}: {run["dataset"]}, {run["examples"]:,} examples, each target given {run["context"]}.'
        for row, run in done
        if {'dataset', 'examples', 'context'} <= run.keys()
    )
    lines += [
        f'{column}: Spearman’s rank correlation of our means with the published values is {correlation:.2f}, '
        f'over {count} rows.'
        for column, (correlation, count) in rank_correlations(rows).items()
        if correlation is not None
    ]
    lines.append(
        'Minutes of training are those of the steps alone, seconds a step the median: without compiling and '
        'validation. Peak memory is what the training process had resident on the host.'
    )
    machines: dict[str, list[str]] = {}
    for row, run in done:
        machines.setdefault(machine(run), []).append(f'{row["column"]}, {row["model"]}, seed {run["seed"]}')
    most = max(machines, key=lambda text: len(machines[text]))
    lines.append(f'Run on {most}.')
    lines += [f'{"; ".join(named)}: on {text}.' for text, named in machines.items() if text != most]
    return lines


def machine(run: dict[str, Any]) -> str:
    """Returns device, versions and commit of a run as text."""
    if 'device' not in run:
        return 'a machine that was not recorded'
    versions = ', '.join(f'{name} {run[name]}' for name in VERSIONS if name in run)
    return f'{run["device"]} ({run["machine"]}, {run["cores"]} cores), {versions}, commit {run["commit"] or "unknown"}'


def markdown(table: dict[str, Any]) -> str:
    """Returns the table as Markdown: rows grouped by model, columns side by side; then costs and notes."""
    rows = table['rows']
    columns, models = unique(row['column'] for row in rows), unique(row['model'] for row in rows)
    head = ['model', *(f'{column}, {what}' for column in columns for what in ('published', 'ours'))]
    body = [[model, *(text for column in columns for text in cells(rows, column, model))] for model in models]
    parts = [f'# {table["name"]}, scale={table["scale"]}', marked.table(head, body)]
    costly = [[row['model'], row['column'], *costs(row)] for row in rows if row['ours']]
    if costly:
        parts.append(marked.table(['model', 'column', *COSTS], costly))
    if several := by_evaluation(rows):
        parts.append(several)
    timed, how = timings(table)
    if timed:
        parts += [marked.table(TIMING_COLUMNS, timed), how]
    return '\n\n'.join([*parts, *notes(rows)]) + '\n'


def curves(planned: Iterable[Run]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """Returns (column, model) -> step -> the validation metric of each seed, including unfinished runs.

    The steps of a curve are sorted.
    """
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for run in planned:
        name = f'validation_{run.row.metric}'
        for line in lines_of(run.workdir / 'metrics.jsonl'):
            if name in line:
                points = found.setdefault((run.row.column, run.row.model), {})
                points.setdefault(line['step'], []).append(line[name])
    return {key: dict(sorted(points.items())) for key, points in found.items()}


def _curves_as_json(planned: Iterable[Run]) -> list[dict[str, Any]]:
    return [
        {'column': column, 'model': model, 'steps': list(points), 'validation': list(points.values())}
        for (column, model), points in curves(planned).items()
    ]


def figure(planned: Sequence[Run]) -> Any:
    """Draws learning curves, one panel per column: median over seeds, and range; None without validations."""
    found = curves(planned)
    columns = unique(run.row.column for run in planned if any(column == run.row.column for column, _ in found))
    if not columns:
        return None
    models = unique(run.row.model for run in planned if any(model == run.row.model for _, model in found))
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
        metric = next(run.row.metric for run in planned if run.row.column == column)
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


def costs_of(path: Path, scale: str) -> dict[str, Any]:
    """Reads the costs of steps of this scale, as the table's command wrote them; {} if it did not."""
    found = json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}
    return found if found.get('scale') == scale else {}


def write_table(
    name: str,
    scale: str,
    planned: Sequence[Run],
    folder: Path,
    more: Mapping[str, Any] | None = None,
    sections: Iterable[str] = (),
) -> str:
    """Writes NAME.json, NAME.md and, after a first validation, NAME.png into `folder`; returns the Markdown.

    Args:
        name: see `document`.
        scale: see `document`.
        planned: see `document`.
        folder: to write into.
        more: further entries of the JSON.
        sections: further sections of the Markdown, after the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    costs = costs_of(folder / f'{name}_costs.json', scale)
    table = {
        **document(name, scale, planned),
        'curves': _curves_as_json(planned),
        **({'costs': costs} if costs else {}),
        **(more or {}),
    }
    text = '\n'.join([markdown(table), *(f'{section}\n' for section in sections)])
    for ending, content in (('json', json.dumps(table, indent=2) + '\n'), ('md', text)):
        atomic.write_text(folder / f'{name}.{ending}', content)
    drawn = figure(planned)
    if drawn is None:
        (folder / f'{name}.png').unlink(missing_ok=True)  # of another scale
    else:
        with atomic.replacing(folder / f'{name}.png') as path:
            drawn.savefig(path, dpi=150, format='png')
    return text
