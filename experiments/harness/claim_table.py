"""Tables that test claims of the paper at equal architecture, data, steps and seeds, small enough for a CPU core.

    python -m experiments.claims.photographs
    python -m experiments.claims.listops --data_dir DIR

The data of `photographs` and `prose` are embedded; for the other tables, docs/data.md explains how to put them into
DIR. Runs lie below runs/claims by default. All other options are those of the paper's tables: see
`experiments.harness.runner`.

If a table has learning rates, each row's is chosen by validation (`experiments.harness.sweep`): every row, Combiner or
baseline, has the same grid and the same budget.

A claim that one row is better than another is `shown` if its mean is better, and `clear` if the two 95 % intervals
(Student's t over the seeds) do not overlap. A table without such claims compares each row with the most frequent class
of the test split.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from combiner import build, paths
from combiner.data.task import open_split
from combiner.run import saved_config
from experiments.harness import runner, sweep, verdicts
from experiments.harness.row import Row
from experiments.harness.run import Run
from experiments.harness.table_files import rows_of, write_table
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
    """Returns what the paper's Table 1 claims of the rows of `IMAGE_MODELS` on both of its data sets."""
    return (
        Claim(column, 'Combiner-Logsparse', 'Logsparse', clearly=True),
        Claim(column, 'Combiner-Fixed', 'Fixed'),
        Claim(column, 'Combiner-Axial', 'Axial', clearly=True),
    )


def rates(table: ClaimTable, row: Row, scale: str) -> tuple[float, ...]:
    """Returns the learning rates of a table, which are the same for all rows and scales."""
    del row, scale
    return table.rates


def most_frequent(run: Run) -> float:
    """Returns the share of the most frequent class in the test split of a classifier."""
    config = paths.with_data_dir(saved_config.load(run.workdir), run.data_dir)
    task = build.task(config)
    source = open_split(task, 'test', config.data.data_dir)
    counts = collections.Counter(int(task.transform(source[index])['targets']) for index in range(len(source)))
    return max(counts.values()) / len(source)


def judged(table: ClaimTable, rows: Sequence[dict[str, Any]], chance: float | None) -> list[dict[str, Any]]:
    """Returns the verdicts on the table's claims; without claims, those that compare its rows with chance.

    Args:
        table: the table.
        rows: see `table_files.rows_of`.
        chance: share of the most frequent class; None if it is not known.
    """
    if table.claims:
        return verdicts.judge(table.claims, rows)
    return [] if chance is None else verdicts.above_chance(rows, chance)


def write(table: ClaimTable, name: str, scale: str, planned: Sequence[Run], folder: Path) -> str:
    """Writes the table as `table_files.write_table` does, with the sweep and the verdicts; returns the Markdown."""
    runs, swept = sweep.written(functools.partial(rates, table), table.rows, scale, folder / name, planned)
    done = next((run for run in runs if run.evaluation), None)
    chance = most_frequent(done) if done and not table.claims else None
    return write_table(name, scale, runs, folder, {'claims': judged(table, rows_of(runs), chance), **swept})


def command(table: ClaimTable, arguments: Sequence[str] | None = None) -> None:
    """Runs the command line of a table of claims; see `runner.command`."""
    runner.command(
        table.rows,
        table.name,
        arguments,
        module=f'experiments.claims.{table.name.removeprefix("claims_")}',
        stages=functools.partial(sweep.stages, functools.partial(rates, table)),
        write=functools.partial(write, table),
        scale='cpu',
        seeds=table.seeds,
        workdir=Path('runs/claims'),
    )
