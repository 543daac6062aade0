"""The paper's claims at equal architecture, data, steps and seeds, small enough for a CPU core: what the tables share.

    python -m experiments.claims.photographs
    python -m experiments.claims.listops --data_dir DIR

The data of `photographs` and `prose` are embedded; those of the others lie in DIR (docs/data.md says how
to get them there). All of the other options, and where runs lie, here by default below runs/claims, are those of the
paper's tables (see `experiments.harness.runner`).

Where a table has learning rates, every row is first trained with each of them, seed 0, at its full number of steps; the
rate of the best validation figure is then run with the other seeds, and these are judged on the test split. So every
row, Combiner or not, has the same grid and the same budget. Below a row's folder there is then one for each rate.

What is claimed of two rows is shown where the better mean is the better one, and clear where the two 95 % intervals
(Student's t over the seeds) do not meet. A table without claims about two rows claims of each that it does better than
the most frequent class of the test split.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from combiner import build, paths, run_config
from combiner.data.task import open_split
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
    """One table of claims.

    Attributes:
        name: of its module.
        rows: all of one column.
        rates: that every row is trained with; none where rows have the config's own.
        claims: about two rows each.
        seeds: how many runs of a row, if the command line does not say.
    """

    name: str
    rows: tuple[Row, ...]
    rates: tuple[float, ...] = ()
    claims: tuple[Claim, ...] = ()
    seeds: int = 3


def about_images(column: str) -> tuple[Claim, ...]:
    """What the paper's Table 1 says of the rows of `IMAGE_MODELS`."""
    return (
        Claim(column, 'Combiner-Logsparse', 'Logsparse', clearly=True),
        Claim(column, 'Combiner-Fixed', 'Fixed'),
        Claim(column, 'Combiner-Axial', 'Axial', clearly=True),
        Claim(column, 'Combiner-Mixture', 'Combiner-Axial'),
    )


def validated(run: Run) -> float | None:
    """The last validation figure of a run; None where it was not validated yet."""
    name = f'validation_{run.row.metric}'
    found = [line[name] for line in lines_of(run.workdir / 'metrics.jsonl') if name in line]
    return found[-1] if found else None


def with_rate(row: Row, rate: float, scale: str, seeds: int, folder: Path, data_dir: str | None) -> list[Run]:
    """The seeds of a row, trained with this learning rate."""
    there = dataclasses.replace(row, settings=(*row.settings, f'optimizer.learning_rate={rate}'))
    return runner.plan([there], scale, seeds, folder, data_dir, below=f'rate-{rate}')


def sweep(table: ClaimTable, row: Row, scale: str, folder: Path, data_dir: str | None) -> dict[float, Run]:
    """The first seed of a row with each rate."""
    return {rate: with_rate(row, rate, scale, 1, folder, data_dir)[0] for rate in table.rates}


def best(swept: dict[float, Run]) -> float | None:
    """The rate whose run has the lowest validation figure; None unless all are done."""
    if not all(run.evaluation for run in swept.values()):
        return None
    return min(swept, key=lambda rate: validated(swept[rate]) or math.inf)


def stages(
    table: ClaimTable, rows: Sequence[Row], scale: str, seeds: int, folder: Path, data_dir: str | None
) -> Iterator[list[Run]]:
    """The sweep, then all seeds at each row's best rate; a row whose sweep is not whole has to wait."""
    if not table.rates:
        yield runner.plan(rows, scale, seeds, folder, data_dir)
        return
    swept = {row: sweep(table, row, scale, folder, data_dir) for row in rows}
    yield [run for runs_of_row in swept.values() for run in runs_of_row.values()]
    chosen = {row: rate for row in rows if (rate := best(swept[row]))}
    yield [run for row, rate in chosen.items() for run in with_rate(row, rate, scale, seeds, folder, data_dir)]


def most_frequent(run: Run) -> float:
    """The share of the most frequent class of a classifier's test split."""
    config = paths.with_data_dir(run_config.load(run.workdir), run.data_dir)
    task = build.task(config)
    source = open_split(task, 'test', config.data.data_dir)
    counts = collections.Counter(int(task.transform(source[index])['targets']) for index in range(len(source)))
    return max(counts.values()) / len(source)


def write(table: ClaimTable, name: str, scale: str, planned: Sequence[Run], folder: Path) -> str:
    """The table, as `table.write_table`, with the sweep and what of the claims shows."""
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
    """The command line of a table of claims; as `runner.command`."""
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
