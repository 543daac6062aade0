"""Tables that test claims of the paper at equal architecture, data, steps and seeds, small enough for a CPU core.

    python -m experiments.claims.photographs
    python -m experiments.claims.listops --data_dir DIR

The data of `photographs` and `prose` are embedded; for the other tables, docs/data.md explains how to put them into
DIR. Runs lie below runs/claims by default. All other options are those of the paper's tables: see
`experiments.harness.runner`.

If a table has learning rates, every row is first trained with each of them, with seed 0 and the full number of steps.
The rate with the best validation metric is then run with the other seeds, and all seeds are evaluated on the test
split. So every row, Combiner or baseline, has the same grid and the same budget. Below a row's folder there is then a
folder for each rate.

A claim that one row is better than another is `shown` if its mean is better, and `clear` if the two 95 % intervals
(Student's t over the seeds) do not overlap. A table without such claims compares each row with the most frequent class
of the test split.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from combiner import build, paths
from combiner.data.task import open_split
from combiner.run import saved_config
from experiments.harness import runner, verdicts
from experiments.harness.row import Row
from experiments.harness.run import Run, lines_of
from experiments.harness.table import document, grid, write_table
from experiments.harness.verdicts import Claim

IMAGE_MODELS = {
    'Logsparse': 'logsparse',
    'Combiner-Logsparse': 'combiner_logsparse',
    'Fixed': 'fixed',
    'Combiner-Fixed': 'combiner_fixed',
    'Axial': 'axial',
    'Combiner-Axial': 'combiner_axial_rowmajor',
    'Combiner-Mixture': 'combiner_mixture',
}
COMBINERS = {
    'Combiner-Fixed': 'combiner_fixed',
    'Combiner-Logsparse': 'combiner_logsparse',
    'Combiner-Tree': 'combiner_tree',
    'Combiner-Axial': 'combiner_axial_rowmajor',
    'Combiner-Axial-Vertical': 'combiner_axial_vertical',
    'Combiner-Axial-Horizontal': 'combiner_axial_horizontal',
    'Combiner-Mixture': 'combiner_mixture',
    'Combiner-Routing': 'combiner_routing',
}


@dataclasses.dataclass(frozen=True)
class ClaimTable:
    """A table of claims.

    Attributes:
        name: of the table, in the names of its folder and files.
        rows: all of one column.
        rates: learning rates that every row is trained with; () to use the config's.
        claims: each compares two rows.
        seeds: default number of runs per row.
    """

    name: str
    rows: tuple[Row, ...]
    rates: tuple[float, ...] = ()
    claims: tuple[Claim, ...] = ()
    seeds: int = 3


def about_images(column: str) -> tuple[Claim, ...]:
    """Returns what the paper's Table 1 claims of the rows of `IMAGE_MODELS`."""
    return (
        Claim(column, 'Combiner-Logsparse', 'Logsparse', clearly=True),
        Claim(column, 'Combiner-Fixed', 'Fixed'),
        Claim(column, 'Combiner-Axial', 'Axial', clearly=True),
        Claim(column, 'Combiner-Mixture', 'Combiner-Axial'),
    )


def validated(run: Run) -> float | None:
    """Returns the last validation metric of a run; None before the first validation."""
    name = f'validation_{run.row.metric}'
    found = [line[name] for line in lines_of(run.workdir / 'metrics.jsonl') if name in line]
    return found[-1] if found else None


def with_rate(row: Row, rate: float, scale: str, seeds: int, folder: Path, data_dir: str | None) -> list[Run]:
    """Returns the runs of a row with one learning rate."""
    changed = dataclasses.replace(row, settings=(*row.settings, f'optimizer.learning_rate={rate}'))
    return runner.plan([changed], scale, seeds, folder, data_dir, below=f'rate-{rate}')


def sweep(table: ClaimTable, row: Row, scale: str, folder: Path, data_dir: str | None) -> dict[float, Run]:
    """Returns the run with seed 0 for each learning rate."""
    return {rate: with_rate(row, rate, scale, 1, folder, data_dir)[0] for rate in table.rates}


def best(swept: dict[float, Run]) -> float | None:
    """Returns the rate with the lowest validation metric; None unless all runs are finished."""
    if not all(run.evaluation for run in swept.values()):
        return None
    return min(swept, key=lambda rate: validated(swept[rate]) or math.inf)


def stages(
    table: ClaimTable, rows: Sequence[Row], scale: str, seeds: int, folder: Path, data_dir: str | None
) -> Iterator[list[Run]]:
    """Yields the runs of the sweep, then all seeds at the best rate of each row whose sweep is finished."""
    if not table.rates:
        yield runner.plan(rows, scale, seeds, folder, data_dir)
        return
    swept = {row: sweep(table, row, scale, folder, data_dir) for row in rows}
    yield [run for runs_of_row in swept.values() for run in runs_of_row.values()]
    chosen = {row: rate for row in rows if (rate := best(swept[row]))}
    yield [run for row, rate in chosen.items() for run in with_rate(row, rate, scale, seeds, folder, data_dir)]


def most_frequent(run: Run) -> float:
    """Returns the share of the most frequent class in the test split of a classifier."""
    config = paths.with_data_dir(saved_config.load(run.workdir), run.data_dir)
    task = build.task(config)
    source = open_split(task, 'test', config.data.data_dir)
    counts = collections.Counter(int(task.transform(source[index])['targets']) for index in range(len(source)))
    return max(counts.values()) / len(source)


def write(table: ClaimTable, name: str, scale: str, planned: Sequence[Run], folder: Path) -> str:
    """Writes the table as `table.write_table` does, with the sweep and the verdicts; returns the Markdown."""
    data_dir = next((run.data_dir for run in planned), None)
    rows = document(name, scale, planned)['rows']
    done = next((run for run in planned if run.evaluation), None)
    if table.claims:
        judged = verdicts.judge(table.claims, rows)
    else:
        judged = verdicts.above_chance(rows, most_frequent(done)) if done else []
    swept = {row: sweep(table, row, scale, folder / name, data_dir) for row in table.rows} if table.rates else {}
    rates = [
        {
            'column': row.column,
            'model': row.model,
            'validation': {str(rate): validated(run) for rate, run in runs_of_row.items()},
            'rate': best(runs_of_row),
        }
        for row, runs_of_row in swept.items()
        if any(run.evaluation for run in runs_of_row.values())
    ]
    more = {'claims': judged, 'sweep': rates}
    sections = [verdicts.table(judged), *([_rates(rates)] if rates else [])]
    return write_table(name, scale, planned, folder, more, sections)


def _rates(rates: list[dict[str, Any]]) -> str:
    body = [
        (
            row['column'],
            row['model'],
            ', '.join(f'{value:.4g} at {rate}' for rate, value in row['validation'].items() if value is not None),
            '' if row['rate'] is None else str(row['rate']),
        )
        for row in rates
    ]
    return grid(['column', 'model', 'validation by learning rate', 'chosen'], body)


def command(table: ClaimTable, arguments: Sequence[str] | None = None) -> None:
    """Runs the command line of a table of claims; see `runner.command`."""
    runner.command(
        table.rows,
        table.name,
        arguments,
        module=f'experiments.claims.{table.name.removeprefix("claims_")}',
        stages=functools.partial(stages, table),
        write=functools.partial(write, table),
        scale='cpu',
        seeds=table.seeds,
        workdir=Path('runs/claims'),
    )
