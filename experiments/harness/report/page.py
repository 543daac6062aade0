"""Reads a folder of tables and runs, and puts the page together."""

import argparse
import base64
import hashlib
import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from combiner import atomic, cli, messages, paths
from experiments.harness import table
from experiments.harness.report import curves, pictures, sections
from experiments.harness.report.elements import element, paragraph
from experiments.harness.report.sections import Document
from experiments.harness.run import slug

HERE = Path(__file__).parent
STYLE, SCRIPT = HERE / 'report.css', HERE / 'report.js'
NOTES = '<summary>Data, machines, versions</summary>'
COSTS = '_costs.json'  # of the files whose content the tables have
# What may be wrong with a file that was cut short, changed by hand or written by another version.
DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)


class Problems:
    """What could not be shown, to be said on the page.

    Attributes:
        found: a sentence for each.
    """

    def __init__(self, workdir: Path):
        self.found: list[str] = []
        self._workdir = workdir

    def attempt(self, path: Path, make: Callable[[], str]) -> str:
        """Returns what a function returns; '' if a file is damaged, which is noted with its name."""
        try:
            return make()
        except DAMAGES as error:
            self.found.append(f'{path.relative_to(self._workdir).as_posix()}: {_reason(error)}')
            return ''


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f'is no JSON file: {error}'
    if isinstance(error, KeyError):
        return f'has no {error}'
    return str(error) or type(error).__name__


def tables(workdir: Path, problems: Problems) -> list[tuple[Path, dict[str, Any]]]:
    """Reads the JSON files that the commands of tables wrote, sorted by name; other JSON files are no problem."""
    found = []

    def read(path: Path) -> str:
        content = json.loads(path.read_text(encoding='utf-8'))
        if isinstance(content, dict) and {'name', 'scale', 'rows'} <= content.keys():
            if not isinstance(content['rows'], list) or not all(isinstance(row, dict) for row in content['rows']):
                raise ValueError('its rows are no list of objects')
            found.append((path, content))
        return ''

    for path in sorted(workdir.glob('*.json')):
        if not path.name.endswith(COSTS):
            problems.attempt(path, lambda path=path: read(path))
    return found


def section(document: Document, problems: Problems) -> str:
    """Returns the section of one table; a part whose data are damaged is left out and noted."""
    parts = (sections.results, sections.judged, sections.learning, sections.evaluations, sections.costs)
    shown = ''.join(problems.attempt(document.path, lambda make=make: make(document)) for make in parts)
    notes = problems.attempt(document.path, lambda: ''.join(paragraph(note) for note in table.notes(document.rows)[1:]))
    lead = paragraph(f'scale={document.scale}: {document.finished()}.', class_='lead')
    return element('h2', html.escape(document.name)) + lead + shown + element('details', NOTES, notes, class_='notes')


def read(workdir: Path, problems: Problems) -> dict[str, Document]:
    """Returns the tables of a folder by the anchors of their sections."""
    found = tables(workdir, problems)
    rows = [row for _, content in found for row in content['rows']]
    known = curves.styles(curves.mechanism(str(row.get('argument', ''))) for row in rows)
    documents: dict[str, Document] = {}

    def add(path: Path, content: dict[str, Any]) -> str:
        document = Document(content, path, known)
        document.finished()  # fails here, not in the summary of all tables, if rows are damaged
        sections.correlations(document)
        documents[f'{slug(document.name)}-{len(documents)}'] = document
        return ''

    for path, content in found:
        problems.attempt(path, lambda path=path, content=content: add(path, content))
    return documents


def page(workdir: Path) -> str:
    """Returns the whole page.

    Raises:
        ValueError: there is nothing to show.
    """
    problems = Problems(workdir)
    documents = read(workdir, problems)
    shown = {anchor: section(document, problems) for anchor, document in documents.items()}
    titles = {anchor: document.name for anchor, document in documents.items()}
    for title, make in (('Samples', pictures.samples), ('Attention', pictures.attention)):
        if found := make(workdir, problems.attempt):
            anchor = title.lower()
            titles[anchor], shown[anchor] = title, element('h2', title) + found
    if not shown and not problems.found:
        raise ValueError(
            f'{workdir} has no table and no picture of a run; give the --workdir of a table, '
            'such as that of python -m experiments.tables.table1'
        )
    start = _summary(documents) if documents else ''
    if problems.found:
        items = (element('li', html.escape(problem)) for problem in problems.found)
        start += element('section', element('h2', 'Not shown'), element('ul', *items), class_='problems')
    links = (element('a', html.escape(title), href=f'#{anchor}') for anchor, title in titles.items())
    return _document(
        element('header', element('h1', 'Combiner: tables and runs'), element('nav', *links, aria_label='sections')),
        element('main', start, *(element('section', content, id=anchor) for anchor, content in shown.items())),
    )


def _summary(documents: dict[str, Document]) -> str:
    done = sum(len(document.done()) for document in documents.values())
    rows = sum(len(document.rows) for document in documents.values())
    count = len(documents)
    said = f'{count} table{"" if count == 1 else "s"}; {done} of {rows} rows have a result.'
    whole = sections.summary((document, anchor) for anchor, document in documents.items())
    return element('section', element('h2', 'All tables'), paragraph(said, class_='lead'), whole, id='all-tables')


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _document(*body: str) -> str:
    """Returns the page around a body, with a policy by which a browser loads nothing and runs no other script."""
    style, script = (path.read_text(encoding='utf-8') for path in (STYLE, SCRIPT))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><title>Combiner: tables and runs</title>'
        f'<style>{style}</style></head><body>{curves.SHAPES}{"".join(body)}<script>{script}</script></body></html>\n'
    )


@cli.guarded
def command(description: str | None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=paths.argument, default=Path('runs/tables'), help='default: runs/tables')
    parser.add_argument('--out', type=paths.argument, help='default: report.html in the workdir')
    options = parser.parse_args()
    messages.heading(workdir=options.workdir)
    out = options.out or options.workdir / 'report.html'
    try:
        text = page(options.workdir)
    except ValueError as error:
        parser.error(str(error))
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out, text)
    print(f'wrote {out}, {paths.size(out.stat().st_size)}')
    messages.next_steps(f'open {out} in a browser')
