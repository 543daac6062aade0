"""Joins the documents of one table that several machines or sessions wrote; see `experiments.tables.merge`.

Nothing is chosen silently among results: two files that disagree about a row, a seed or a learning rate raise a
ValueError with both values.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from combiner import cli, messages, paths
from experiments.harness import claim_table, declarations, learning_curves, table, table_files
from experiments.harness.row import Row

Key = tuple[str, str]  # column and model of a row
Sources = Mapping[str, Mapping[str, Any]]  # documents by file

# The same for all seeds of a row.
OF_DATA = ('dataset', 'examples', 'evaluated_on', 'context', 'codecs_bits_per_dim', 'steps', 'tokens')
OF_RESULT = ('value', 'evaluations')
NEEDED = {'column', 'model', 'config', 'argument', 'metric', 'runs'}  # in a row
KNOWN = {'name', 'scale', 'rows', 'curves', 'costs', 'claims', 'sweep'}


class Agreed:
    """What files say, each with the first file that says it; raises when another file contradicts it."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[Any, str]] = {}

    def put(self, what: str, value: Any, path: str) -> None:
        """Notes what a file says.

        Raises:
            ValueError: another file has another value.
        """
        first, where = self._said.setdefault(what, (value, path))
        if where != path and json.dumps(first) != json.dumps(value):  # as text, in which NaN equals NaN
            raise ValueError(
                f'{what} is {first!r} in {where}, and {value!r} in {path}; leave out one of these files, or delete '
                "one of the runs and write its table again with the table's command"
            )


def key_of(entry: Mapping[str, Any]) -> Key:
    """Returns column and model of a row, or of what a document has for each row."""
    return entry['column'], entry['model']


def read(path: Path) -> dict[str, Any]:
    """Reads the document of a table.

    Raises:
        ValueError: it is no table, or has parts that cannot be joined.
    """
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no JSON file ({error}); give NAME.json of a table') from None
    rows = found.get('rows') if isinstance(found, dict) and {'name', 'scale'} <= found.keys() else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= NEEDED for row in rows):
        raise ValueError(
            f'{path} is not the document of a table; give NAME.json, as experiments.harness.runner wrote it'
        )
    if unknown := sorted(found.keys() - KNOWN):
        raise ValueError(f'{path} has {", ".join(unknown)}, which cannot be joined; known: {", ".join(sorted(KNOWN))}')
    return found


def check_same(sources: Sources) -> None:
    """Raises ValueError unless all documents are of one table and one scale."""
    found = {path: f'{each["name"]} at scale={each["scale"]}' for path, each in sources.items()}
    if len(set(found.values())) > 1:
        said = '; '.join(f'{path} is {what}' for path, what in found.items())
        raise ValueError(f'the files are of different tables: {said}; give those of one table and one scale')


def in_order(name: str, keys: Iterable[Key]) -> list[Key]:
    """Returns rows in the order in which the table declares them, then all others as they come."""
    tables = declarations.table_rows() | declarations.pretrained_rows()
    tables |= {each.name: each.rows for each in declarations.claim_tables().values()}
    place = {(row.column, row.model): index for index, row in enumerate(tables.get(name, ()))}
    return sorted(keys, key=lambda key: place.get(key, len(place)))


def joined_rows(sources: Sources, agreed: Agreed) -> dict[Key, dict[str, Any]]:
    """Returns each row once, with the runs of all files by seed; the first file's, where several have a seed.

    A row without runs and curves has no settings that count: its learning rate may not be chosen yet.
    """
    fields: dict[Key, dict[str, Any]] = {}
    runs: dict[Key, dict[int, dict[str, Any]]] = {}
    diverged: dict[Key, set[int]] = {}
    for path, document in sources.items():
        begun = {key_of(curve) for curve in document.get('curves', ())}
        for row in document['rows']:
            key = key_of(row)
            of_row = {field.name: row.get(field.name, field.default) for field in dataclasses.fields(Row)}
            own = runs.setdefault(key, {})
            diverged.setdefault(key, set()).update(row.get('diverged', ()))
            if row['runs'] or key in begun:
                for field, value in of_row.items():
                    agreed.put(f'{field} of {", ".join(key)}', value, path)
                fields[key] = of_row
            fields.setdefault(key, of_row)
            for run in row['runs']:
                for part in (part for part in OF_DATA if part in run):
                    agreed.put(f'{part} of {", ".join(key)}', run[part], path)
                for part in (part for part in OF_RESULT if part in run):
                    agreed.put(f'{part} of {", ".join(key)}, seed {run["seed"]}', run[part], path)
                own.setdefault(run['seed'], run)
    rows = {}
    for key, of_row in fields.items():
        found = [run for _, run in sorted(runs[key].items())]
        rows[key] = {**of_row, 'ours': table_files.summarise(found), 'runs': found}
        if lost := sorted(diverged[key] - runs[key].keys()):
            rows[key]['diverged'] = lost
    return rows


def by_row(sources: Sources, part: str) -> dict[Key, dict[str, dict[str, Any]]]:
    """Returns, for each row of a part of the documents such as `curves`, what each file has of it."""
    found: dict[Key, dict[str, dict[str, Any]]] = {}
    for path, document in sources.items():
        for entry in document.get(part, ()):
            found.setdefault(key_of(entry), {})[path] = entry
    return found


def joined_curves(sources: Sources, agreed: Agreed) -> dict[Key, dict[str, Any]]:
    """Returns the curve of each row, with the points of all seeds of all files.

    Raises:
        ValueError: files contradict each other.
    """
    curves = {}
    for key, found in by_row(sources, 'curves').items():
        if len(found) == 1:
            (curves[key],) = found.values()
            continue
        points: learning_curves.Points = {}
        for path, curve in found.items():
            for step, values in learning_curves.points_of(curve).items():
                for seed, value in values.items():
                    agreed.put(f'validation of {", ".join(key)}, seed {seed}, at step {step}', value, path)
                    points.setdefault(step, {})[seed] = value
        in_turn = {step: dict(sorted(values.items())) for step, values in points.items()}
        curves[key] = learning_curves.as_json(*key, in_turn)
    return curves


def joined_sweep(sources: Sources, agreed: Agreed) -> dict[Key, dict[str, Any]]:
    """Returns the sweep of each row; one without a chosen rate, whose values may change, only where no file has one."""
    swept = {}
    for key, found in by_row(sources, 'sweep').items():
        chosen = {path: entry for path, entry in found.items() if entry['rate'] is not None}
        validation: dict[str, float | None] = {}
        for path, entry in (chosen or found).items():
            if chosen:
                agreed.put(f'the chosen learning rate of {", ".join(key)}', entry['rate'], path)
            for rate, value in entry['validation'].items():
                if chosen and value is not None:
                    agreed.put(f'validation of {", ".join(key)} at learning rate {rate}', value, path)
                validation[rate] = value if validation.get(rate) is None else validation[rate]
        rate = next((entry['rate'] for entry in chosen.values()), None)
        swept[key] = {'column': key[0], 'model': key[1], 'validation': validation, 'rate': rate}
    return swept


def joined_costs(sources: Sources) -> list[dict[str, Any]]:
    """Returns the sessions in which steps were timed, the one with the most rows first.

    Seconds can be compared within a session only. So a row that was timed in several sessions stays in the one with
    the most rows. A row that no session could time stays in the first that tried.
    """
    sessions = [session for document in sources.values() for session in table.sessions(document)]
    return table.distinct(table.largest_first(sessions))


def judged(name: str, rows: Sequence[dict[str, Any]], sources: Sources, agreed: Agreed) -> list[dict[str, Any]]:
    """Returns the verdicts on a table's claims, judged by the joined rows.

    Raises:
        ValueError: no such table is declared.
    """
    declared = {each.name: each for each in declarations.claim_tables().values()}
    if name not in declared:
        raise ValueError(f'{name} has claims, which are not declared here; known: {", ".join(declared)}')
    chance = None
    if not declared[name].claims:
        for path, document in sources.items():
            for claim in document.get('claims', ()):
                chance = claim['worse']['mean']
                agreed.put('the share of the most frequent class', chance, path)
    return claim_table.judged(declared[name], rows, chance)


def join(sources: Sources) -> dict[str, Any]:
    """Returns one document of all.

    Raises:
        ValueError: the documents are of different tables or scales, or contradict each other.
    """
    check_same(sources)
    agreed = Agreed()
    first = next(iter(sources.values()))
    rows = joined_rows(sources, agreed)
    order = in_order(first['name'], rows)
    document = {'name': first['name'], 'scale': first['scale'], 'rows': [rows[key] for key in order]}
    given = {part for each in sources.values() for part in each}
    if 'curves' in given:
        curves = joined_curves(sources, agreed)
        document['curves'] = [curves[key] for key in order if key in curves]
    if costs := joined_costs(sources):
        document['costs'] = costs
    if 'claims' in given:
        document['claims'] = judged(document['name'], document['rows'], sources, agreed)
    if 'sweep' in given:
        swept = joined_sweep(sources, agreed)
        document['sweep'] = [swept[key] for key in in_order(first['name'], swept)]
    return document


@cli.guarded
def command(description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m experiments.tables.merge',
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('files', type=paths.argument, nargs='+', help='JSON files of one table and scale')
    parser.add_argument('--out', type=paths.argument, required=True, help='the files to write, without .json')
    options = parser.parse_args(arguments)
    out = options.out.with_suffix('') if options.out.suffix == '.json' else options.out
    messages.heading(files=', '.join(map(str, options.files)), out=f'{out}.json, .md, .png')
    try:
        sources = {str(path): read(path) for path in options.files}
        document = join(sources)
    except ValueError as error:
        parser.error(str(error))
    except KeyError as missing:
        parser.error(f"a part of a file has no {missing}; write the files again with the table's command")
    for path, each in sources.items():
        if 'curves' not in each:
            print(f'{path} is of an earlier version and has no learning curves')
    table_files.write(document, out)
    done = [row for row in document['rows'] if row['ours']]
    runs = sum(len(row['runs']) for row in done)
    print(f'{len(done)} of {len(document["rows"])} rows have a result, from {runs} runs; the table: {out}.md')
    messages.next_steps(f'read {out}.md', messages.module_command('experiments.report', '--workdir', out.parent))
