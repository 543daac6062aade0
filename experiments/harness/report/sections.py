"""The parts of the section of one table: results, verdicts, evaluations, curves, costs."""

import html
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.harness import table, verdicts
from experiments.harness.recall_figure import by_distance
from experiments.harness.report import curves
from experiments.harness.report.curves import Style
from experiments.harness.report.elements import Cell, element, figure, head, image, paragraph
from experiments.harness.report.elements import table as html_table

TIMED = ('timed: seconds a step', 'timed: memory, MB', 'compiling, s')


class Document:
    """One table as its command wrote it, and the line of each of its models.

    Attributes:
        name: of the table.
        scale: of its runs.
        rows: see `table_files.rows_of`.
        content: all of the JSON file.
        path: of the JSON file.
        lines: by model.
    """

    def __init__(self, content: dict[str, Any], path: Path, known: Mapping[str, Style]):
        self.content, self.path = content, path
        self.name, self.scale, self.rows = str(content['name']), str(content['scale']), content['rows']
        self.lines = curves.of_rows(((row['model'], row['argument']) for row in self.rows), known)

    def columns(self) -> list[str]:
        """Returns the columns of the table, in its order."""
        return table.unique(row['column'] for row in self.rows)

    def of_column(self, column: str) -> list[dict[str, Any]]:
        """Returns the rows of a column."""
        return [row for row in self.rows if row['column'] == column]

    def place(self, row: dict[str, Any]) -> list[Cell]:
        """Returns the cells of a row's model and column, below `place_names`."""
        return [self.model(row['model']), *([Cell(row['column'])] if len(self.columns()) > 1 else [])]

    def place_names(self) -> list[str]:
        """Returns the headings of `place`; a table of one column does not repeat it in every row."""
        return ['model', *(['column'] if len(self.columns()) > 1 else [])]

    def model(self, name: str) -> Cell:
        """Returns the cell of a model, with its line in front."""
        return Cell(name, before=curves.swatch(self.lines[name]) if name in self.lines else '')

    def done(self) -> list[dict[str, Any]]:
        """Returns the rows with a result."""
        return [row for row in self.rows if row['ours']]

    def runs(self) -> list[dict[str, Any]]:
        """Returns all finished runs."""
        return [run for row in self.rows for run in row['runs']]

    def finished(self) -> str:
        """Returns how many rows have a result, in words."""
        runs = len(self.runs())
        return f'{len(self.done())} of {len(self.rows)} rows have a result, from {runs} run{"" if runs == 1 else "s"}'


def commits(runs: Iterable[dict[str, Any]]) -> str:
    """Returns the commits of runs, separated by commas."""
    return ', '.join(table.unique(str(run['commit'] or 'unknown') for run in runs if 'commit' in run))


def correlations(document: Document) -> str:
    """Returns the rank correlations with the published values, as text; '' without published values."""
    found = table.rank_correlations(document.rows)
    shown = [
        f'{column}: {"too few rows" if value is None else f"{value:.2f} over {count} rows"}'
        for column, (value, count) in found.items()
    ]
    return '; '.join(shown)


def summary(documents: Iterable[tuple[Document, str]]) -> str:
    """Returns the table of all tables, each with the anchor of its section."""
    body = []
    for document, anchor in documents:
        done, count = len(document.done()), len(document.rows)
        link = element('a', html.escape(document.name), href=f'#{anchor}')
        bar = element('progress', value=str(done), max=str(count or 1), aria_hidden='true')
        body.append(
            [
                Cell('', before=link),
                Cell(document.scale),
                Cell(f'{done} of {count}', done / (count or 1), bar),
                Cell(str(len(document.runs())), len(document.runs())),
                Cell(correlations(document) or 'nothing published'),
                Cell(commits(document.runs())),
            ]
        )
    names = ('table', 'scale', 'rows with a result', 'runs', 'rank correlation with the published values', 'commit')
    return html_table([head(*names)], body, 'All tables')


def results(document: Document) -> str:
    """Returns published values and ours, grouped by model, columns side by side; no published values where none are."""
    rows = {(row['column'], row['model']): row for row in document.rows}
    published = {
        column for column, _ in rows if any(row['published'] is not None for row in document.of_column(column))
    }
    over, under = [], []
    for column in document.columns():
        kinds = ('published', 'ours') if column in published else ('ours',)
        over.append(element('th', html.escape(column), colspan=str(len(kinds)), scope='colgroup'))
        under += [element('th', kind, scope='col', data_sort='') for kind in kinds]
    body = []
    for model in table.unique(model for _, model in rows):
        cells = [document.model(model)]
        for column in document.columns():
            row = rows.get((column, model), {'metric': '', 'published': None, 'ours': {}})
            theirs, ours = table.cells(document.rows, column, model)
            factor, mean = table.percent(row['metric']), row['ours'].get('mean')
            if column in published:
                cells.append(Cell(theirs, None if row['published'] is None else factor * row['published']))
            cells.append(Cell(ours, None if mean is None else factor * mean))
        body.append(cells)
    first = element('th', 'model', rowspan='2', scope='col', data_sort='')
    head_rows = [element('tr', first, *over), element('tr', *under)]
    shown = html_table(head_rows, body, f'{document.name}: results')
    units = table.notes(document.rows)[0]
    order = correlations(document)
    return shown + paragraph(f'{units} Rank correlation: {order}.' if order else units, class_='lead')


def judged(document: Document) -> str:
    """Returns the verdicts on the claims; '' if the table has none."""
    found = document.content.get('claims')
    if not found:
        return ''
    rows = [element('tr', *(element('th', html.escape(name), scope='col') for name in verdicts.HEAD))]
    body = []
    for verdict in found:
        column, better, first, worse, second, shown = verdicts.cells(verdict)
        body.append(
            [Cell(column), document.model(better), Cell(first), document.model(worse), Cell(second), Cell(shown)]
        )
    return element('h3', 'Claims') + html_table(rows, body, f'{document.name}: claims')


def evaluations(document: Document) -> str:
    """Returns the metric in each of several evaluations; '' if no row has several."""
    rows = table.with_evaluations(document.rows)
    if not rows:
        return ''
    names = table.unique(name for row in rows for name in table.evaluations(row))
    body = []
    for row in rows:
        factor, places = table.percent(row['metric']), table.decimals(document.of_column(row['column']))
        cells = document.place(row)
        for name in names:
            values = table.evaluations(row).get(name)
            if values:
                mean = {'mean': statistics.fmean(values), 'interval': table.interval(values)}
                cells.append(Cell(table.plus_minus(mean, factor, places), factor * mean['mean']))
            else:
                cells.append(Cell(''))
        body.append(cells)
    shown = html_table([head(*document.place_names(), *names)], body, f'{document.name}: evaluations')
    return element('h3', 'By evaluation') + distances(document, rows) + shown


def distances(document: Document, rows: Iterable[dict[str, Any]]) -> str:
    """Returns a drawing of the metric over distance, of rows that were evaluated by distance; '' without such rows."""
    found = {(row['column'], row['model']): by_distance(row) for row in rows}
    shown = ''
    for column in table.unique(column for (column, _), each in found.items() if each):
        of_column = {model: each for (name, model), each in found.items() if name == column}
        labels = table.unique(label for each in of_column.values() for label in each)
        lines = [
            curves.Line(model, document.lines[model], {float(labels.index(label)): each[label] for label in each})
            for model, each in of_column.items()
        ]
        metric = document.of_column(column)[0]['metric']
        shown += curves.drawing(
            f'{column}, over the distance of a key from its pair',
            lines,
            unit=f'{table.UNITS.get(metric, metric)}, test; the median over seeds, and their range',
            name='distance',
            labels=dict(enumerate(labels)),
            places=1,
            log=False,
        )
    return shown


def learning(document: Document) -> str:
    """Returns the learning curves, one drawing for each column; '' before the first validation.

    A file of an earlier version has no curves; then it is the picture next to it.
    """
    if 'curves' not in document.content:
        caption = 'A picture of an earlier version: the median over seeds, and their range, on validation data'
        picture = document.path.with_suffix('.png')
        return element('h3', 'Learning curves') + figure(image(picture, caption), caption) if picture.exists() else ''
    shown = []
    for column in document.columns():
        found = [curve for curve in document.content['curves'] if curve['column'] == column]
        metric = document.of_column(column)[0]['metric']
        lines = [
            curves.Line(
                curve['model'],
                document.lines[curve['model']],
                {
                    float(step): [table.percent(metric) * value for value in values]
                    for step, values in zip(curve['steps'], curve['validation'], strict=True)
                },
            )
            for curve in found
        ]
        shown.append(
            curves.drawing(
                column,
                lines,
                unit=f'{table.UNITS.get(metric, metric)}, validation; the median over seeds, and their range',
                name='step',
                labels={x: f'{x:,.0f}' for line in lines for x in line.points},
                places=table.decimals(document.of_column(column)),
                log='perplexity' in metric,
            )
        )
    drawn = ''.join(shown)
    return element('h3', 'Learning curves') + element('div', drawn, class_='charts') if drawn else ''


def costs(document: Document) -> str:
    """Returns what the runs and the steps cost, and how the steps were timed; '' without runs."""
    rows = document.done()
    if not rows:
        return ''
    timed = table.timed(document.content)
    names = ('seeds', 'steps', 'tokens', 'train_minutes', 'seconds_per_step', 'train_peak_memory_mb')
    body = []
    for row in rows:
        cells = document.place(row)
        cells += [Cell(text, row['ours'][name]) for text, name in zip(table.costs(row), names, strict=True)]
        if timed:
            step = timed.get((row['column'], row['model']))
            cells += (
                [
                    Cell(f'{step["seconds_per_step"]:.4g}', step['seconds_per_step']),
                    Cell(f'{step["memory_mb"]:,.0f}', step['memory_mb']),
                    Cell(f'{step["compile_seconds"]:.1f}', step['compile_seconds']),
                ]
                if step
                else [Cell('')] * len(TIMED)
            )
        body.append([*cells, Cell(commits(row['runs']))])
    names = (*document.place_names(), *table.COSTS, *(TIMED if timed else ()), 'commit')
    shown = element('h3', 'Cost') + html_table([head(*names)], body, f'{document.name}: cost')
    return shown + (paragraph(f'Timed: {table.timings(document.content)[1]}', class_='lead') if timed else '')
