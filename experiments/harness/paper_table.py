"""The command of a table of the paper: `runner.command`, and at the small scale a sweep of learning rates.

At `--scale small`, each row is trained with its config's learning rate and with twice that, and the better one is
chosen (`experiments.harness.sweep`); at the other scales, it has the config's.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from experiments.harness import runner, sweep
from experiments.harness.row import Row
from experiments.harness.run import Run
from experiments.harness.table_files import write_table

FACTORS = {'small': (1, 2)}  # of the config's learning rate, by scale


def rates(row: Row, scale: str) -> tuple[float, ...]:
    """Returns the learning rates that a row is trained with; () for the config's alone."""
    if scale not in FACTORS:
        return ()
    config = Run(row, scale, 0, Path()).config()
    return tuple(factor * config.optimizer.learning_rate for factor in FACTORS[scale])


def write(rows: Sequence[Row], name: str, scale: str, planned: Sequence[Run], folder: Path) -> str:
    """Writes the table as `table_files.write_table` does, with the sweep; returns the Markdown."""
    runs, swept = sweep.written(functools.cache(rates), rows, scale, folder / name, planned)
    return write_table(name, scale, runs, folder, swept)


def command(rows: Sequence[Row], name: str, arguments: Sequence[str] | None = None, *, module: str = '') -> None:
    """Runs the command line of a table; see `runner.command`."""
    runner.command(
        rows,
        name,
        arguments,
        module=module,
        stages=functools.partial(sweep.stages, functools.cache(rates)),
        write=functools.partial(write, rows),
    )
