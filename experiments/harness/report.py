"""One HTML page of the tables, learning curves, samples and attention maps in a folder."""

import argparse
import base64
import html
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from combiner import atomic, cli, paths
from experiments.harness import table
from experiments.harness.run import slug

PICTURES = {'Samples': 'samples.png', 'Attention': 'attention_map_*.png'}
SKIPPED = {'checkpoints', 'corrupt', 'jobs', 'tensorboard'}
STYLE = Path(__file__).with_name('report.css')


def tables(workdir: Path) -> list[dict[str, Any]]:
    """Reads the JSON files that the commands of tables wrote, sorted by name; skips other JSON files."""
    found = []
    for path in sorted(workdir.glob('*.json')):
        try:
            document = json.loads(path.read_text(encoding='utf-8'))
        except ValueError:
            continue
        if isinstance(document, dict) and {'name', 'scale', 'rows'} <= document.keys():
            found.append(document)
    return found


def pictures(workdir: Path, pattern: str) -> Iterator[Path]:
    """Yields the files in the folder and below whose name matches, in the order of their paths."""
    for folder, below, names in os.walk(workdir):
        below[:] = sorted(set(below) - SKIPPED)
        yield from (Path(folder) / name for name in sorted(names) if fnmatch(name, pattern))


def element(name: str, *content: str, **attributes: str) -> str:
    """Returns an HTML element; its content is HTML already, its attributes are escaped."""
    shown = ''.join(f' {key}="{html.escape(value)}"' for key, value in attributes.items())
    return f'<{name}{shown}>{"".join(content)}</{name}>'


def image(path: Path, caption: str) -> str:
    """Returns an embedded picture with a caption."""
    data = base64.b64encode(path.read_bytes()).decode()
    shown = f'<img src="data:image/png;base64,{data}" alt="{html.escape(caption)}" loading="lazy">'
    return element('figure', shown, element('figcaption', html.escape(caption)))


def grid(head: Iterable[str], body: Iterable[Sequence[str]]) -> str:
    """Returns a table from header rows in HTML and a body in plain text, whose first cells are headings."""
    rows = (
        element('tr', element('th', html.escape(first), scope='row'), *(element('td', html.escape(c)) for c in rest))
        for first, *rest in body
    )
    body = element('table', element('thead', *head), element('tbody', *rows))
    return f'<div class="wide" tabindex="0">{body}</div>'


def results(rows: list[dict[str, Any]]) -> str:
    """Returns a table of published values and ours, grouped by model, columns side by side."""
    columns = table.unique(row['column'] for row in rows)
    models = table.unique(row['model'] for row in rows)
    over = ''.join(f'<th colspan="2" scope="colgroup">{html.escape(column)}</th>' for column in columns)
    under = '<th scope="col">published</th><th scope="col">ours</th>' * len(columns)
    head = [element('tr', '<th rowspan="2" scope="col" class="first">model</th>', over), element('tr', under)]
    return grid(
        head,
        [[model, *(text for column in columns for text in table.cells(rows, column, model))] for model in models],
    )


def costs(rows: list[dict[str, Any]]) -> str:
    """Returns a table of the costs of the runs; '' without runs."""
    body = [[f'{row["model"]}, {row["column"]}', *table.costs(row)] for row in rows if row['ours']]
    head = '<th scope="col" class="first">row</th>' + ''.join(element('th', name, scope='col') for name in table.COSTS)
    return grid([element('tr', head)], body) if body else ''


def section(document: dict[str, Any], workdir: Path) -> str:
    """Returns the section of one table: results, curves, costs, notes."""
    name, rows = document['name'], document['rows']
    done, seeds = sum(bool(row['ours']) for row in rows), sum(len(row['runs']) for row in rows)
    summary = f'scale={document["scale"]}: {done} of {len(rows)} rows have a result, from {seeds} runs.'
    parts = [element('h2', html.escape(name)), element('p', html.escape(summary), **{'class': 'lead'}), results(rows)]
    curves = workdir / f'{name}.png'
    if curves.exists():
        parts.append(
            image(curves, f'Learning curves of {name} on validation data: the median over seeds, and their range')
        )
    if taken := costs(rows):
        parts += [element('h3', 'Cost of the runs'), taken]
    timed, how = table.timings(document)
    if timed:
        head = (element('th', name, scope='col') for name in table.TIMING_COLUMNS)
        parts += [
            element('h3', 'Steps, timed in turn'),
            grid([element('tr', *head)], timed),
            element('p', html.escape(how)),
        ]
    notes = (element('p', html.escape(note)) for note in table.notes(rows))
    return element('section', *parts, element('div', *notes, **{'class': 'notes'}), id=slug(name))


def gallery(title: str, found: list[Path], workdir: Path) -> str:
    """Returns a section of pictures of runs, each with its folder and name as caption."""
    shown = (image(path, path.relative_to(workdir).with_suffix('').as_posix()) for path in found)
    return element('section', element('h2', title), element('div', *shown, **{'class': 'gallery'}), id=slug(title))


def page(workdir: Path) -> str:
    """Returns the whole page.

    Raises:
        ValueError: there is nothing to show.
    """
    sections = {document['name']: section(document, workdir) for document in tables(workdir)}
    for title, pattern in PICTURES.items():
        if found := list(pictures(workdir, pattern)):
            sections[title] = gallery(title, found, workdir)
    if not sections:
        raise ValueError(
            f'{workdir} has no table and no picture of a run; give the --workdir of a table, '
            'such as that of python -m experiments.tables.table1'
        )
    links = (f'<a href="#{slug(name)}">{html.escape(name)}</a>' for name in sections)
    body = [element('header', element('h1', 'Combiner'), element('nav', *links)), element('main', *sections.values())]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>Combiner: tables</title>'
        f'<style>{STYLE.read_text(encoding="utf-8")}</style></head><body>{"".join(body)}</body></html>\n'
    )


@cli.guarded
def command(description: str | None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=paths.argument, default=Path('runs/tables'), help='default: runs/tables')
    parser.add_argument('--out', type=paths.argument, help='default: report.html in the workdir')
    options = parser.parse_args()
    out = options.out or options.workdir / 'report.html'
    try:
        text = page(options.workdir)
    except ValueError as error:
        parser.error(str(error))
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out, text)
    print(f'wrote {out}, {out.stat().st_size / 1e6:.1f} MB')
