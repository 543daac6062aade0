"""Writes the tables of results/*.json into docs/results.md, between the markers of each table.

<!-- table1 -->
…
<!-- /table1 -->
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness import marked
from experiments.harness.ranking import CODECS
from experiments.harness.table import UNITS, by_evaluation, cells, grid, rank_correlations, unique

COMMANDS = {
    'table1': 'python -m experiments.tables.table1 --scale=small --seeds=3 --workdir=runs/small --data_dir=DIR',
    'table2': 'python -m experiments.tables.table2 --scale=small --rows=cifar-10/combiner-axial --workdir=runs/small '
    '--data_dir=DIR',
    'table3': 'python -m experiments.tables.table3 --scale=small --seeds=3 --workdir=runs/small --data_dir=DIR',
    'pg19': 'python -m experiments.tables.pg19 --scale=small --seeds=3 --workdir=runs/small --data_dir=DIR',
    'table4': "python -m experiments.tables.table4 --rows='listops/*,text/*,image/*,pathfinder/*' --scale=small "
    '--seeds=3 --workdir=runs/small --data_dir=DIR',
    'table5': 'python -m experiments.tables.table5 --scale=small --seeds=3 --workdir=runs/small --data_dir=DIR',
    'recall': 'python -m experiments.tables.recall --seeds=3',
}


def section(name: str, table: Mapping[str, Any] | None) -> str:
    """Returns the part of the page about a table, as Markdown; `table` is None without results."""
    done = [row for row in table['rows'] if row['ours']] if table else []
    command = f'```bash\n{COMMANDS[name]}\n```'
    if not table or not done:
        return f'Not run yet.\n\n{command}'
    of_rows = {(row['column'], row['model']): row for row in table.get('costs', {}).get('rows', ())}
    columns = [column for column in unique(row['column'] for row in table['rows']) if any(_of(done, column))]
    parts = [_column(table['rows'], column, of_rows) for column in columns]
    if several := by_evaluation(done):
        parts.append(several)
    return '\n\n'.join([*parts, _provenance(table, done), command])


def _of(rows: Iterable[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [row for row in rows if row['column'] == column]


def _column(rows: Sequence[dict[str, Any]], column: str, costs: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Returns the rows of one column: published, ours, cost of a step; and the correlation of the two orders."""
    own = _of(rows, column)
    body = []
    for row in own:
        published, ours = cells(list(rows), column, row['model'])
        cost = costs.get((column, row['model']))
        cost_cells = (f'{cost["seconds_per_step"]:.3g}', f'{cost["memory_mb"]:,.0f}') if cost else ('', '')
        body.append([row['model'], published, ours, str(row['ours']['seeds']) if row['ours'] else '', *cost_cells])
    unit = UNITS.get(own[0]['metric'], own[0]['metric'])
    head = [column, f'published, {unit}', f'ours, {unit}', 'seeds', 'seconds a step', 'memory, MB']
    data = unique(run['dataset'] for row in own for run in row['runs'] if 'dataset' in run)
    said = f'Ours on {"; ".join(data)}.' if data else ''
    codecs = next(
        (run['codecs_bits_per_dim'] for row in own for run in row['runs'] if 'codecs_bits_per_dim' in run), {}
    )
    if codecs:
        said += f' Codecs on the same images: {", ".join(f"{CODECS[key]} {codecs[key]:.3f}" for key in CODECS)}.'
    correlation, count = rank_correlations(own).get(column, (None, 0))
    if correlation is not None:
        said += f' Rank correlation of ours with the published order: {correlation:.2f} ({count} rows).'
    return f'{grid(head, body)}\n\n{said.strip()}'.strip()


def _provenance(table: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> str:
    runs = [run for row in done for run in row['runs']]
    commits = ', '.join(f'`{commit}`' for commit in unique(str(run.get('commit')) for run in runs))
    missing = len(table['rows']) - len(done)
    text = f'scale={table["scale"]}, {len(runs)} runs, at commit {commits}.'
    return f'{text} {missing} of {len(table["rows"])} rows have no result.' if missing else text


def sections(results: Path) -> dict[str, str]:
    """Returns the part of every table by name, from the JSON files of a folder."""
    found = {name: results / f'{name}.json' for name in COMMANDS}
    return {
        name: section(name, json.loads(path.read_text(encoding='utf-8')) if path.exists() else None)
        for name, path in found.items()
    }


def write(results: Path, page: Path) -> None:
    """Fills the page with the results of a folder."""
    marked.fill(page, sections(results))
