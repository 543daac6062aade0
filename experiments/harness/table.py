"""Reads the document of a table, as `table_files` makes it: statistics, and the parts of its Markdown."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.harness import marked

UNITS = {
    'accuracy': 'accuracy in %',
    'bits_per_dim': 'bits/dim',
    'perplexity': 'perplexity',
    'word_perplexity': 'perplexity per word',
    'bits_per_byte': 'bits/byte',
}
CODECS = {'png': 'PNG', 'webp_lossless': 'WebP, lossless', 'order0_entropy': 'order-0 entropy'}
DECIMALS = {'accuracy': 1, 'perplexity': 1, 'word_perplexity': 0}  # of a column without published values; others 3
VERSIONS = ('python', 'jax', 'jaxlib', 'flax', 'numpy')
COSTS = ('seeds', 'steps', 'tokens', 'minutes of training', 'seconds a step', 'peak memory, MB')
ROWS_TO_CORRELATE = 3  # with fewer, a correlation says nothing
TIMING_COLUMNS = ('model', 'column', 'seconds a step', 'memory, MB', 'compiling, s')


def interval(values: Sequence[float]) -> float | None:
    """Returns half the width of the 95 % interval of the mean (Student's t); None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy import stats  # slow to import: only where it is used

    return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


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


def unique(values: Iterable[Any]) -> list[Any]:
    """Returns each value once, in the order of appearance."""
    return list(dict.fromkeys(values))


def percent(metric: str) -> int:
    """Returns the factor for values of a metric in tables: 100 for accuracy, which is shown in %."""
    return 100 if metric == 'accuracy' else 1


def decimals(rows: Iterable[dict[str, Any]]) -> int:
    """Returns the number of decimals of the published values of a column, or a default if it has none."""
    rows = list(rows)
    default = max((default_decimals(row['metric']) for row in rows), default=0)
    shown = [f'{percent(row["metric"]) * row["published"]:.8g}' for row in rows if row['published'] is not None]
    return max((len(text.partition('.')[2]) for text in shown), default=default)


def default_decimals(metric: str) -> int:
    """Returns the number of decimals of a metric where no published value gives it."""
    return DECIMALS.get(metric, 3)


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


def sessions(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the sessions in which steps were timed, each with its rows, machine, commit and rounds."""
    return table.get('costs') or []


def distinct(sessions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the sessions with each row in one of them only; a session of which nothing is left is dropped.

    A row stays in the first session that timed it. If no session could time it, it stays in the first that tried.
    """
    sessions = list(sessions)
    seen: set[tuple[str, str]] = set()

    def unseen(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        new = [entry for entry in entries if (entry['column'], entry['model']) not in seen]
        seen.update((entry['column'], entry['model']) for entry in new)
        return new

    rows = [unseen(session['rows']) for session in sessions]
    untimed = [unseen(session.get('not_measured', ())) for session in sessions]
    parts = zip(sessions, rows, untimed, strict=True)
    return [{**session, 'rows': timed, 'not_measured': failed} for session, timed, failed in parts if timed or failed]


def largest_first(sessions: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sorts sessions by the number of rows that they timed."""
    return sorted(sessions, key=lambda session: len(session['rows']), reverse=True)


def timed(table: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the cost of a step by column and model, in the order of the table."""
    found = {(row['column'], row['model']): row for session in sessions(table) for row in session['rows']}
    order = [(row['column'], row['model']) for row in table['rows']]
    return {key: found[key] for key in unique([*order, *found]) if key in found}


def timings(table: Mapping[str, Any]) -> tuple[list[list[str]], str]:
    """Returns the costs of steps as rows below `TIMING_COLUMNS`, and how they were measured; empty without costs."""
    body = [
        [
            row['model'],
            row['column'],
            f'{row["seconds_per_step"]:.4g}',
            f'{row["memory_mb"]:,.0f}',
            f'{row["compile_seconds"]:.1f}',
        ]
        for row in timed(table).values()
    ]
    if not body:
        return [], ''
    first, *others = (session for session in sessions(table) if session['rows'])
    said = [
        f'These steps were taken in turn in one process, without data or validation: medians of '
        f'{first["rounds"]} rounds. Memory is what XLA plans for state, batch and temporaries. '
        f'Measured on {machine(first)}.'
    ]
    for session in others:
        named = '; '.join(f'{row["column"]}, {row["model"]}' for row in session['rows'])
        said.append(f'{named}: in another process, {_told_apart(session, first)}.')
    if others:
        said.append('Only seconds of one process can be compared.')
    return body, ' '.join(said)


def _told_apart(session: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """Returns how a session was timed: its commit alone, if all else is as in the first session."""
    own = {'commit', 'rows', 'not_measured'}
    if {name: session[name] for name in session.keys() - own} == {name: first[name] for name in first.keys() - own}:
        return f'at commit {session["commit"] or "unknown"}'
    return f'medians of {session["rounds"]} rounds, on {machine(session)}'


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


def by_examples(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Returns the runs of rows, those that were evaluated on the same examples together, the most runs first.

    Images are told apart by what codecs need for them: runs of earlier versions say nothing else. A run that says
    nothing is left out.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        for run in row['runs']:
            if examples := run.get('codecs_bits_per_dim') or run.get('evaluated_on'):
                groups.setdefault(json.dumps(examples), []).append({**run, 'model': row['model']})
    return sorted(groups.values(), key=len, reverse=True)


def other_examples(rows: list[dict[str, Any]]) -> list[str]:
    """Returns a sentence for each column whose rows were not all evaluated on the same examples."""
    lines = []
    for column in unique(row['column'] for row in rows):
        own, others = [row for row in rows if row['column'] == column], []
        for context in unique(run.get('context') for row in own for run in row['runs']):  # windows of text by length
            alike = [{**row, 'runs': [run for run in row['runs'] if run.get('context') == context]} for row in own]
            others += [run['model'] for runs in by_examples(alike)[1:] for run in runs]
        if others:
            lines.append(f'{column}, evaluated on other examples than most rows: {"; ".join(unique(others))}.')
    return lines


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
    lines += lost_seeds(rows)
    done = [(row, run) for row in rows for run in row['runs']]
    if not done:
        return [*lines, 'No run is finished yet.']
    lines += unique(
        f'{row["column"]}: {run["dataset"]}, {run["examples"]:,} examples, each target given {run["context"]}.'
        for row, run in done
        if {'dataset', 'examples', 'context'} <= run.keys()
    )
    lines += other_examples(rows)
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
    if any(row.get('pretrain') for row, _ in done):
        lines.append(
            'Rows that were pretrained: steps, tokens, minutes and peak memory are those of the training that follows, '
            'without the pretraining.'
        )
    machines: dict[str, list[str]] = {}
    for row, run in done:
        machines.setdefault(machine(run), []).append(f'{row["column"]}, {row["model"]}, seed {run["seed"]}')
    most = max(machines, key=lambda text: len(machines[text]))
    lines.append(f'Run on {most}.')
    lines += [f'{"; ".join(named)}: on {text}.' for text, named in machines.items() if text != most]
    return lines


def lost_seeds(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each row of which a seed diverged, as the mean is then that of the others."""
    return [
        f'{row["column"]}, {row["model"]}: training with seed {", ".join(map(str, row["diverged"]))} diverged and has '
        'no result; the mean leaves it out.'
        for row in rows
        if row.get('diverged')
    ]


def machine(run: Mapping[str, Any]) -> str:
    """Returns device, versions and commit of a run as text."""
    if 'device' not in run:
        return 'a machine that was not recorded'
    versions = ', '.join(f'{name} {run[name]}' for name in VERSIONS if name in run)
    return f'{run["device"]} ({run["machine"]}, {run["cores"]} cores), {versions}, commit {run["commit"] or "unknown"}'


def by_rate(swept: Iterable[Mapping[str, Any]]) -> str:
    """Returns the validation metric at each learning rate of a sweep as Markdown; see `sweep.document`."""
    body = [
        (
            row['column'],
            row['model'],
            ', '.join(f'{value:.4g} at {rate}' for rate, value in row['validation'].items() if value is not None),
            '' if row['rate'] is None else str(row['rate']),
        )
        for row in swept
    ]
    return marked.table(['column', 'model', 'validation by learning rate', 'chosen'], body)
