"""Chooses the learning rate of every row by validation, from the same grid and with the same budget for each.

Every row is first trained with each rate of the grid, with seed 0 and the full number of steps. The rate with the best
validation metric is then run with the other seeds, and all seeds are evaluated on the test split. A rate at which the
training diverges is not chosen. Below a row's folder there is then a folder for each rate.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.harness import runner
from experiments.harness.row import Row
from experiments.harness.run import Run, diverged, lines_of

Rates = Callable[[Row, str], Sequence[float]]  # of a row and a scale; () for the config's own rate


def validated(run: Run) -> float | None:
    """Returns the last validation metric of a run; None before the first validation."""
    name = f'validation_{run.row.metric}'
    found = [line[name] for line in lines_of(run.workdir / 'metrics.jsonl') if name in line]
    return found[-1] if found else None


def with_rate(row: Row, rate: float, scale: str, seeds: int, folder: Path, data_dir: str | None) -> list[Run]:
    """Returns the runs of a row with one learning rate."""
    changed = dataclasses.replace(row, settings=(*row.settings, f'optimizer.learning_rate={rate}'))
    return runner.plan([changed], scale, seeds, folder, data_dir, below=f'rate-{rate}')


def first_runs(
    rates: Rates, rows: Sequence[Row], scale: str, folder: Path, data_dir: str | None
) -> dict[Row, dict[float, Run]]:
    """Returns the run with seed 0 for each learning rate of each row that has rates."""
    swept = {
        row: {rate: with_rate(row, rate, scale, 1, folder, data_dir)[0] for rate in rates(row, scale)} for row in rows
    }
    return {row: by_rate for row, by_rate in swept.items() if by_rate}


def best(swept: Mapping[float, Run]) -> float | None:
    """Returns the rate with the best validation metric among the finished runs.

    None if no run is finished, or one is neither finished nor has diverged.
    """
    finished = {rate: run for rate, run in swept.items() if run.evaluation}
    if not finished or not all(rate in finished or diverged(run) for rate, run in swept.items()):
        return None

    def loss(rate: float) -> float:
        value = validated(swept[rate])
        if value is None:
            return math.inf
        return -value if swept[rate].row.metric == 'accuracy' else value

    return min(finished, key=loss)


def stages(
    rates: Rates, rows: Sequence[Row], scale: str, seeds: int, folder: Path, data_dir: str | None
) -> Iterator[list[Run]]:
    """Yields the runs of the sweep, then all seeds at the best rate of each row whose sweep is finished.

    Runs that diverged are not tried again, unless no other rate of their row has been chosen. Without rates, it yields
    the runs of all rows and seeds.
    """
    swept = first_runs(rates, rows, scale, folder, data_dir)
    if not swept:
        yield runner.plan(rows, scale, seeds, folder, data_dir)
        return
    undecided = [by_rate for by_rate in swept.values() if best(by_rate) is None]
    yield [run for by_rate in swept.values() for run in by_rate.values() if run.evaluation or by_rate in undecided]
    chosen = {row: rate for row, by_rate in swept.items() if (rate := best(by_rate))}
    yield [run for row, rate in chosen.items() for run in with_rate(row, rate, scale, seeds, folder, data_dir)]


def written(
    rates: Rates, rows: Sequence[Row], scale: str, folder: Path, planned: Sequence[Run]
) -> tuple[Sequence[Run], dict[str, Any]]:
    """Returns the runs that a table consists of, and what its document has about the sweep; without rates, `planned`.

    Args:
        rates: see `Rates`.
        rows: of the table.
        scale: of its runs.
        folder: of its runs.
        planned: the runs of the last stage that was begun, which may be one of the sweep.
    """
    data_dir = next((run.data_dir for run in planned), None)
    if not any(rates(row, scale) for row in rows):
        return planned, {}
    swept = document(rates, rows, scale, folder, data_dir)
    return reported(rates, rows, scale, folder, data_dir), {'sweep': swept}


def reported(rates: Rates, rows: Sequence[Row], scale: str, folder: Path, data_dir: str | None) -> list[Run]:
    """Returns the runs that the table consists of: all seeds at the chosen rate; no finished run of other rows."""
    planned = []
    for row, by_rate in first_runs(rates, rows, scale, folder, data_dir).items():
        rate = best(by_rate)
        planned += (
            runner.plan([row], scale, 1, folder, data_dir, below='rate-undecided')
            if rate is None
            else with_rate(row, rate, scale, 1, folder, data_dir)
        )
    return planned


def document(rates: Rates, rows: Sequence[Row], scale: str, folder: Path, data_dir: str | None) -> list[dict[str, Any]]:
    """Returns, for each row with a finished run, its validation metric by rate, and the chosen rate or None."""
    return [
        {
            'column': row.column,
            'model': row.model,
            'validation': {str(rate): validated(run) for rate, run in by_rate.items()},
            'rate': best(by_rate),
        }
        for row, by_rate in first_runs(rates, rows, scale, folder, data_dir).items()
        if any(run.evaluation for run in by_rate.values())
    ]
