"""The parts of docs/results.md: `photos`, a ranking; `tables`, the tables of results/*.json, and which were not run.

The README has a part `table1`: one column of Table 1.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.harness import marked
from experiments.harness.table import (
    CODECS,
    UNITS,
    by_evaluation,
    by_examples,
    cells,
    lost_seeds,
    other_examples,
    rank_correlations,
    sessions,
    timed,
    timings,
    unique,
)


class Section(NamedTuple):
    """What the page says of a table, whether it has been run or not."""

    title: str
    setting: str
    arguments: str  # of `python -m experiments.tables.NAME`


SMALL = '--scale=small --seeds=3 --workdir=runs/small --data_dir=DIR'
SECTIONS = {
    'table1': Section(
        'Table 1: bits/dim of images',
        'CIFAR-10 in tiles of 16×16 pixels and ImageNet 64×64 in tiles of 32×32; 2 layers of width 64 for 6 of the '
        'paper, 4 for 12',
        SMALL,
    ),
    'table2': Section(
        'Table 2: a longer run',
        '8 layers of width 128 for the 128 of the paper; one learning rate, one seed; to compare with lossless WebP on '
        'the same images',
        '--scale=small --rows=cifar-10/combiner-axial --workdir=runs/small --data_dir=DIR',
    ),
    'table3': Section(
        'Table 3: perplexity on Wikipedia',
        '2 layers of width 64; 256 tokens of a vocabulary of 1,024 for 2k, 1,024 tokens for 8k',
        SMALL,
    ),
    'pg19': Section(
        'PG-19: perplexity per word of books', 'as Table 3, on books, which are longer than 1,024 tokens', SMALL
    ),
    'table4': Section(
        'Table 4: Long Range Arena',
        '2 layers of width 32 (ListOps: 64) for all models; expressions of 11 to 63 tokens, 500 bytes of reviews, '
        'Image at 16×16, an easy Pathfinder of 12×12',
        f"--rows='listops/*,text/*,image/*,pathfinder/*' {SMALL}",
    ),
    'table5': Section('Table 5: masked language models', 'as Table 3, but on the embedded prose in place of C4', SMALL),
    'recall': Section(
        'Associative recall',
        'accuracy with one layer, over the distance from a pair of key and value to the place where the key comes '
        'again: how far a mechanism reaches',
        '--seeds=3',
    ),
}


def command(name: str) -> str:
    """Returns the command that runs a table."""
    return f'python -m experiments.tables.{name} {SECTIONS[name].arguments}'


def rows_done(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a table that have a result."""
    return [row for row in table['rows'] if row['ours']]


def section(name: str, table: Mapping[str, Any]) -> str:
    """Returns the part of the page about a table that has results, as Markdown."""
    done = rows_done(table)
    columns = [column for column in unique(row['column'] for row in table['rows']) if any(_of(done, column))]
    setting = SECTIONS[name].setting
    parts = [f'### {SECTIONS[name].title}', f'{setting[0].upper()}{setting[1:]}.']
    parts += [_column(table['rows'], column, timed(table)) for column in columns]
    if several := by_evaluation(done):
        parts.append(several)
    if len(sessions(table)) > 1:
        parts.append(timings(table)[1])
    parts += lost_seeds(table['rows'])
    return '\n\n'.join([*parts, _provenance(table, done), f'```bash\n{command(name)}\n```'])


def not_run(names: Sequence[str]) -> str:
    """Returns the list of the tables that have no results, as Markdown."""
    rows = [[SECTIONS[name].title, SECTIONS[name].setting, f'`{command(name)}`'] for name in names]
    return f'**Not run yet:**\n\n{marked.table(["table", "setting", "command"], rows)}'


def _of(rows: Iterable[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [row for row in rows if row['column'] == column]


def _column(rows: Sequence[dict[str, Any]], column: str, costs: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Returns the rows of one column: published, ours, cost of a step; and the correlation of the two orders.

    Where the paper has no value at all, there is no column of published values.
    """
    own = _of(rows, column)
    first = 0 if any(row['published'] is not None for row in own) else 1
    body = []
    for row in own:
        values = cells(own, column, row['model'])[first:]
        cost = costs.get((column, row['model']))
        cost_cells = (f'{cost["seconds_per_step"]:.3g}', f'{cost["memory_mb"]:,.0f}') if cost else ('', '')
        body.append([row['model'], *values, str(row['ours']['seeds']) if row['ours'] else '', *cost_cells])
    head = [column, *_heads(own)[first:], 'seeds', 'seconds a step', 'memory, MB']
    data = unique(run['dataset'] for row in own for run in row['runs'] if 'dataset' in run)
    said = f'Ours on {"; ".join(data)}.' if data else ''
    if codecs := _codecs(own):
        said += f' Codecs on the same images: {", ".join(f"{CODECS[key]} {codecs[key]:.3f}" for key in CODECS)}.'
    said += ''.join(f' {line}' for line in other_examples(own))
    correlation, count = rank_correlations(own).get(column, (None, 0))
    if correlation is not None:
        said += f' Rank correlation of ours with the published order: {correlation:.2f} ({count} rows).'
    return f'{marked.table(head, body)}\n\n{said.strip()}'.strip()


def _heads(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    unit = UNITS.get(rows[0]['metric'], rows[0]['metric'])
    return f'published, {unit}', f'ours, {unit}'


def _codecs(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the bits/dim of image codecs by name, on the images of the most runs; empty for text."""
    most = next(iter(by_examples(rows)), [{}])
    return most[0].get('codecs_bits_per_dim', {})


def _provenance(table: Mapping[str, Any], done: Sequence[Mapping[str, Any]]) -> str:
    runs = [run for row in done for run in row['runs']]
    found = unique(run.get('commit') for run in runs)
    commits = ', '.join(f'`{commit}`' if commit else 'one that was not recorded' for commit in found)
    missing = len(table['rows']) - len(done)
    text = f'scale={table["scale"]}, runs: {len(runs)}, at commit {commits}.'
    return f'{text} Without a result: {missing} of {len(table["rows"])} rows.' if missing else text


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Returns the tables of a folder that have results, by name."""
    tables = {}
    for name in ('photos', *SECTIONS):
        path = results / f'{name}.json'
        table = json.loads(path.read_text(encoding='utf-8')) if path.exists() else None
        if table and rows_done(table):
            tables[name] = table
    return tables


def ranking(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns rows with a result, in bits/dim, and the codecs on the same images as Markdown, best first."""
    rows = list(rows)
    lines = []
    for row in rows:
        mean, minutes = row['ours']['mean'], row['ours']['train_minutes']
        lines.append((mean, [f'`{row["model"]}`', f'{mean:.3f}', '' if minutes is None else f'{minutes:.1f}']))
    lines += [(value, [f'*{CODECS[key]}*', f'*{value:.3f}*', '']) for key, value in _codecs(rows).items()]
    head = ['attention', UNITS['bits_per_dim'], 'minutes of training']
    return marked.table(head, [cells for _, cells in sorted(lines)])


def readme_parts(results: Path, column: str = 'CIFAR-10') -> dict[str, str]:
    """Returns the generated part of the README by name: published values and ours of one column of Table 1.

    Rows without a result of ours, or on other examples than most, are left out. The last row is lossless WebP on the
    same images.
    """
    rows = _of(rows_done(read(results).get('table1', {'rows': []})), column)
    if not rows:
        return {'table1': 'Not run yet.'}
    others = {run['model'] for runs in by_examples(rows)[1:] for run in runs}
    body = [[row['model'], *cells(rows, column, row['model'])] for row in rows if row['model'] not in others]
    if codecs := _codecs(rows):
        body.append([f'*{CODECS["webp_lossless"]}*', '', f'*{codecs["webp_lossless"]:.3f}*'])
    return {'table1': marked.table([column, *_heads(rows)], body)}


def parts(results: Path) -> dict[str, str]:
    """Returns the generated parts of the page by name, from the JSON files of a folder."""
    tables = read(results)
    photos = tables.pop('photos', None)
    written = [section(name, table) for name, table in tables.items()]
    if missing := [name for name in SECTIONS if name not in tables]:
        written.append(not_run(missing))
    return {'photos': ranking(rows_done(photos)) if photos else 'Not run yet.', 'tables': '\n\n'.join(written)}
