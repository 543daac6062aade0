"""Writes a table: NAME.json from runs, and from that document alone NAME.md and, with learning curves, NAME.png."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from combiner import atomic
from experiments.harness import learning_curves, marked, verdicts
from experiments.harness.run import Run, diverged, measured
from experiments.harness.table import (
    COSTS,
    TIMING_COLUMNS,
    by_evaluation,
    by_rate,
    cells,
    costs,
    interval,
    notes,
    sessions,
    timings,
    unique,
)


def summarise(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def rows_of(planned: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the rows of a table's document, with the measurements of all finished runs and the seeds that diverged.

    Args:
        planned: runs of all rows, in the order of the table, row by row.
    """
    rows = []
    for row in dict.fromkeys(run.row for run in planned):
        own = [run for run in planned if run.row == row]
        found = [values for run in own if (values := measured(run))]
        finished = {values['seed'] for values in found}
        lost = [run.seed for run in own if run.seed not in finished and diverged(run)]
        of_row = {**vars(row), 'ours': summarise(found), 'runs': found}
        rows.append({**of_row, 'diverged': lost} if lost else of_row)
    return rows


def all_costs(path: Path) -> list[dict[str, Any]]:
    """Reads the sessions in which steps were timed, of all scales, as the table's command wrote them."""
    return sessions({'costs': json.loads(path.read_text(encoding='utf-8'))}) if path.exists() else []


def costs_of(path: Path, scale: str) -> list[dict[str, Any]]:
    """Reads the sessions in which steps of this scale were timed."""
    return [session for session in all_costs(path) if session.get('scale') == scale]


def check_scale(path: Path, scale: str) -> None:
    """Raises ValueError if PATH.json has results of another scale, which a table of this scale would replace."""
    document = path.with_name(f'{path.name}.json')
    try:
        found = json.loads(document.read_text(encoding='utf-8')) if document.exists() else {}
        other = found.get('scale', scale) if any(row['ours'] for row in found.get('rows', ())) else scale
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # a damaged file holds nothing to keep
    if other != scale:
        raise ValueError(
            f'{document} has results at scale={other}, which a table at scale={scale} would replace; give another '
            f'--workdir, such as {path.parent}_{scale}, or move {document} away first'
        )


def markdown(table: Mapping[str, Any]) -> str:
    """Returns the table as Markdown: rows grouped by model, columns side by side; costs, notes, verdicts, rates."""
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
    parts += notes(rows)
    if 'claims' in table:
        parts.append(verdicts.table(table['claims']))
    if table.get('sweep'):
        parts.append(by_rate(table['sweep']))
    return '\n\n'.join(parts) + '\n'


def write(table: Mapping[str, Any], path: Path) -> str:
    """Writes a table's document as PATH.json, PATH.md and, after a first validation, PATH.png; returns the Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(table)
    for ending, content in (('json', json.dumps(table, indent=2) + '\n'), ('md', text)):
        atomic.write_text(path.with_name(f'{path.name}.{ending}'), content)
    picture = path.with_name(f'{path.name}.png')
    drawn = learning_curves.figure(table)
    if drawn is not None:
        with atomic.replacing(picture) as temporary:
            drawn.savefig(temporary, dpi=150, format='png')
    elif 'curves' in table:  # a document of an earlier version has none, but its own picture
        picture.unlink(missing_ok=True)  # of another scale
    return text


def write_table(
    name: str, scale: str, planned: Sequence[Run], folder: Path, more: Mapping[str, Any] | None = None
) -> str:
    """Writes the table of runs into `folder`, as `write`; returns the Markdown.

    Args:
        name: of the table.
        scale: of its runs.
        planned: see `rows_of`.
        folder: to write into; it has the costs of steps if they were measured.
        more: further entries of the document: `claims` (see `verdicts.judge`), `sweep` (see `sweep.document`).
    """
    timed = costs_of(folder / f'{name}_costs.json', scale)
    table = {
        'name': name,
        'scale': scale,
        'rows': rows_of(planned),
        'curves': learning_curves.of_runs(planned),
        **({'costs': timed} if timed else {}),
        **(more or {}),
    }
    return write(table, folder / name)
