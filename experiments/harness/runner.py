"""The command line of every table: runs what is missing, then writes the table.

    python -m experiments.tables.table1 [--rows PATTERN,…] [--scale full|cpu|small|quick] [--seeds N]
        [--workdir DIR] [--data_dir DIR] [--launcher local|slurm] [--nodes N] [--dry_run] [--measure]

Runs lie in DIR/TABLE/SCALE/COLUMN/MODEL/seedN. Finished runs are skipped and interrupted runs resume from their last
checkpoint. A run that fails is reported with the last line of its output, and the others continue. The command writes
DIR/TABLE.md, DIR/TABLE.json and DIR/TABLE.png, with all rows and all finished seeds, at the end and between runs, every
ten minutes at most: --rows and --seeds only select what is run. These files are of one scale: give each scale a
--workdir of its own. `experiments.tables.merge` joins the JSON files of several machines.

A pattern is that of a file name, for COLUMN/MODEL, COLUMN or MODEL as in the folders: `--rows 'cifar-10/*fixed*'`.

After the runs, the cost of a step is measured: this process takes training steps of all rows that have a result, in
turn, and writes their seconds and memory to DIR/TABLE_costs.json, which the table shows. `--measure` does only that,
for the selected rows; all other rows keep what was measured before. With Slurm, whose jobs run on other machines, only
`--measure` does it.

`--launcher slurm` submits a job for each unfinished run, with N nodes each; see `experiments.harness.slurm`.

Exit status: 0 if all selected runs are finished, 1 if some failed, 2 for bad input, 130 after Ctrl-C and 143 after
SIGTERM (or a lost terminal), which are forwarded to the training process, so that it saves its step.
"""

import argparse
import fnmatch
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from combiner import cli, messages, paths
from combiner import config as common
from combiner.metrics import FIGURES
from experiments.harness import slurm, step_cost, table, timing
from experiments.harness.row import Row
from experiments.harness.run import Processes, Run, complete, slug
from experiments.harness.table_files import all_costs, check_scale, costs_of, write_table

ROUNDS = 5  # of timing
SECONDS_OF_A_TABLE = 600  # least time after which it is written again while runs go on


def names_of(row: Row) -> tuple[str, str, str]:
    """Returns what a pattern may match: COLUMN/MODEL, COLUMN, MODEL."""
    column, model = slug(row.column), slug(row.model)
    return f'{column}/{model}', column, model


def check(rows: Sequence[Row]) -> None:
    """Raises ValueError if two rows would share a folder, or a metric is unknown."""
    by_folder: dict[str, Row] = {}
    for row in rows:
        if row.metric not in FIGURES:
            raise ValueError(f'unknown metric {row.metric!r} of {row}; known: {", ".join(FIGURES)}')
        folder = names_of(row)[0]
        if folder in by_folder:
            raise ValueError(
                f'{row} and {by_folder[folder]} would share the folder {folder}; give them different models'
            )
        by_folder[folder] = row


def select(rows: Sequence[Row], patterns: str) -> list[Row]:
    """Returns the rows that match any of the patterns, separated by commas; all for ''.

    Raises:
        ValueError: a pattern matches no row.
    """
    wanted = [pattern.strip().lower() for pattern in patterns.split(',') if pattern.strip()]
    for pattern in wanted:
        if not any(fnmatch.filter(names_of(row), pattern) for row in rows):
            known = ', '.join(names_of(row)[0] for row in rows)
            raise ValueError(f'no row matches {pattern!r}; known: {known}')
    return [row for row in rows if not wanted or any(fnmatch.filter(names_of(row), pattern) for pattern in wanted)]


def plan(
    rows: Sequence[Row], scale: str, seeds: int, folder: Path, data_dir: str | None = None, below: str = ''
) -> list[Run]:
    """Returns the runs of the rows with seeds 0..seeds - 1, and with any other seed that has a folder; row by row.

    Args:
        rows: of the table.
        scale: one of `combiner.config.SCALES`.
        seeds: how many.
        folder: of the table.
        data_dir: folder of prepared data sets; None for the configs' own.
        below: a folder between that of a row and those of its seeds, for rows with several kinds of runs.
    """
    planned = []
    for row in rows:
        parent = folder / scale / names_of(row)[0] / below
        existing = {int(path.name[4:]) for path in parent.glob('seed*') if path.name[4:].isdigit()}
        planned += [
            Run(row, scale, seed, parent / f'seed{seed}', data_dir) for seed in sorted(existing | set(range(seeds)))
        ]
    return planned


def run_locally(to_do: Sequence[Run], processes: Processes, show: Callable[[], object]) -> dict[Run, str]:
    """Completes runs one after the other until a signal arrives; returns the errors of failed runs.

    Args:
        to_do: the runs.
        processes: that execute their commands.
        show: writes the table of what is there; it is called after a run, at most once in `SECONDS_OF_A_TABLE`.
    """
    failed = {}
    began = shown = time.monotonic()
    for index, run in enumerate(to_do, start=1):
        left = (time.monotonic() - began) / (index - 1) * (len(to_do) - index + 1) if index > 1 else 0.0
        time_left = f', about {messages.duration(left)} left if the rest take as long as these' if left else ''
        print(f'[{index}/{len(to_do)}] {run}: {run.workdir}/log.txt{time_left}', flush=True)
        error = complete(run, processes)
        if processes.received:
            break
        if error:
            failed[run] = error
            print(f'  {error}', file=sys.stderr, flush=True)
        elif time.monotonic() - shown >= SECONDS_OF_A_TABLE:
            show()
            shown = time.monotonic()
    return failed


def parse(
    module: str, arguments: Sequence[str] | None, **defaults: Any
) -> tuple[argparse.Namespace, Callable[[str], NoReturn]]:
    """Parses the command line.

    Args:
        module: that declares the table.
        arguments: None for those of this process.
        **defaults: of options, where the table has its own.

    Returns:
        The options, and a function that reports a mistake in them and exits.
    """
    parser = argparse.ArgumentParser(
        prog=f'python -m {module}', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rows', default='', help='patterns, separated by commas (default: all rows)')
    parser.add_argument(
        '--scale', choices=common.SCALES, default='full', help='size of the runs (default: %(default)s)'
    )
    parser.add_argument('--seeds', type=int, default=1, help='how many, from 0 (default: %(default)s)')
    parser.add_argument('--workdir', type=paths.argument, default=Path('runs/tables'), help='default: %(default)s')
    parser.add_argument('--data_dir', type=paths.argument, help='folder of prepared data sets')
    parser.add_argument('--launcher', choices=('local', 'slurm'), default='local', help='default: local')
    parser.add_argument('--nodes', type=int, default=1, help='of a job of Slurm (default: %(default)s)')
    parser.add_argument('--dry_run', action='store_true', help='print the commands of unfinished runs, and stop')
    parser.add_argument('--measure', action='store_true', help='time the steps of the rows in turn, and stop')
    parser.set_defaults(**defaults)
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f'--seeds={options.seeds} must be at least 1')
    if options.measure and options.dry_run:
        parser.error('--measure runs no commands that --dry_run could print; leave out one of them')
    if options.nodes < 1 or (options.nodes > 1 and options.launcher == 'local'):
        parser.error(f'--nodes={options.nodes} must be at least 1, and 1 without --launcher slurm')
    options.data_dir = None if options.data_dir is None else str(options.data_dir)
    return options, parser.error


def launch(to_do: Sequence[Run], executor: Any, show: Callable[[], object]) -> tuple[dict[Run, str], int]:
    """Completes runs, as jobs if there is an executor, else in this process, which shows the table meanwhile.

    Returns:
        The errors of failed runs, and the signal that stopped the command, or 0.
    """
    if executor is not None:
        return slurm.launch(to_do, executor)
    with Processes() as processes:
        return run_locally(to_do, processes, show), processes.received


def print_commands(to_do: Sequence[Run]) -> None:
    """Prints the commands that train and evaluate the runs, one per line."""
    for run in to_do:
        print(*map(shlex.join, run.commands().values()), sep='\n')


def measure(planned: Sequence[Run], name: str, scale: str, workdir: Path) -> dict[Run, str]:
    """Times the steps of the runs in turn and writes their costs; returns the errors of runs that failed.

    What was measured before stays in the file, as sessions of their own, except for rows that are measured again.
    """

    def config_of(run: Run) -> Any:
        print(f'compiling {run.row.column}, {run.row.model}', flush=True)
        return run.config()

    found = step_cost.time_interleaved({run: partial(config_of, run) for run in planned}, ROUNDS)
    rows = [
        {'column': run.row.column, 'model': run.row.model, **costs}
        for run, costs in found.items()
        if not isinstance(costs, str)
    ]
    failed = {run: error for run, error in found.items() if isinstance(error, str)}
    unknown = [{'column': run.row.column, 'model': run.row.model, 'wrong': error} for run, error in failed.items()]
    document = {**timing.environment(), 'scale': scale, 'rounds': ROUNDS}
    path = workdir / f'{name}_costs.json'
    sessions = [{**document, 'rows': rows, 'not_measured': unknown}, *costs_of(path, scale)]
    of_other_scales = [session for session in all_costs(path) if session.get('scale') != scale]
    timing.write_json(path, [*table.largest_first(table.distinct(sessions)), *of_other_scales])
    return failed


def without_costs(planned: Sequence[Run], name: str, options: argparse.Namespace) -> list[Run]:
    """Returns a finished run of each row if not all of them were timed; else no run."""
    done = {(run.row.column, run.row.model): run for run in planned if run.evaluation}
    found = costs_of(options.workdir / f'{name}_costs.json', options.scale)
    timed = {
        (row['column'], row['model'])
        for session in found
        for key in ('rows', 'not_measured')
        for row in session.get(key, ())
    }
    return [] if done.keys() <= timed else list(done.values())


def undecided(failed: dict[Run, str], stage: Sequence[Run]) -> dict[Run, str]:
    """Returns the errors of rows that are not in the next stage: where a rate was chosen, others may have diverged."""
    decided = {names_of(run.row) for run in stage}
    return {run: error for run, error in failed.items() if names_of(run.row) not in decided}


def report_outcome(
    selected: Sequence[Run], failed: dict[Run, str], stopped_by: int, table: Path, runs: bool = True
) -> int:
    """Prints the errors and how many runs are finished; returns the exit status.

    Args:
        selected: of the last stage.
        failed: the errors.
        stopped_by: a signal, or 0.
        table: the file.
        runs: whether the command completes runs.
    """
    for run, error in failed.items():
        print(f'{run}: {error}', file=sys.stderr)
    if stopped_by:
        print(f'stopped by signal {stopped_by}; the same command resumes', file=sys.stderr)
        messages.next_steps(messages.same_command())
        return 128 + stopped_by
    # Of a row whose sweep failed, none of the selected runs is planned yet.
    asked = {*selected, *failed} if runs else set(selected)
    done = sum(bool(run.evaluation) for run in asked)
    print(f'{done} of {len(asked)} runs are finished; the table: {table}')
    again = f'{messages.same_command()}  # takes up the others' if runs and done < len(asked) else ''
    messages.next_steps(again, messages.module_command('experiments.report', '--workdir', table.parent))
    return 1 if failed else 0


def finish(
    planned: Sequence[Run],
    name: str,
    options: argparse.Namespace,
    write: Callable[[str, str, Sequence[Run], Path], str],
    measures: bool,
) -> str:
    """Writes the table; then times rows that were not, if it `measures`, and writes it again; returns the Markdown."""
    text = write(name, options.scale, planned, options.workdir)  # before timing, in which memory may run out
    if measures and (unmeasured := without_costs(planned, name, options)):
        measure(unmeasured, name, options.scale, options.workdir)
        text = write(name, options.scale, planned, options.workdir)
    return text


def show_start(table: str, folder: Path, options: argparse.Namespace) -> None:
    """Prints what the command runs, and where; nothing before --dry_run, whose output is commands."""
    if not options.dry_run:
        messages.heading(
            table=f'{table}, scale {options.scale}, seeds from 0 to {options.seeds - 1}',
            device='this machine' if options.launcher == 'local' else 'jobs of Slurm',
            data=options.data_dir,
            workdir=folder,
        )


def one_stage(*arguments: Any) -> Iterable[list[Run]]:
    """Returns the only stage of a table whose runs do not depend on each other; takes the arguments of `plan`."""
    return [plan(*arguments)]


@cli.guarded
def command(
    rows: Sequence[Row],
    name: str,
    arguments: Sequence[str] | None = None,
    *,
    module: str = '',
    stages: Callable[..., Iterable[list[Run]]] = one_stage,
    write: Callable[[str, str, Sequence[Run], Path], str] = write_table,
    **defaults: Any,
) -> None:
    """Runs the command line of a table; does not return.

    Args:
        rows: of the table.
        name: of the table, in the names of its folder and files.
        arguments: of the command line; None for those of this process.
        module: that declares the table; by default the one in `experiments.tables` with the table's name.
        stages: takes the arguments of `plan` and yields lists of runs, each when the runs of the list before have
            ended; the table consists of the last list.
        write: writes the table; see `table_files.write_table`.
        **defaults: of options, where the table has its own.

    Raises:
        ValueError: see `check`.
        SystemExit: always, with the exit status of the module's docstring.
    """
    check(rows)
    options, mistake = parse(module or f'experiments.tables.{name}', arguments, **defaults)
    folder = options.workdir.resolve() / name if options.launcher == 'slurm' else options.workdir / name
    submits = options.launcher == 'slurm' and not options.dry_run
    try:
        chosen = {names_of(row) for row in select(rows, options.rows)}
        if not options.dry_run:
            check_scale(options.workdir / name, options.scale)
        executor = slurm.executor(folder / 'jobs', nodes=options.nodes) if submits else None
    except ValueError as error:
        mistake(str(error))
    plan_arguments = (rows, options.scale, options.seeds, folder, options.data_dir)
    show_start(f'{name}, {len(chosen)} of {len(rows)} rows', folder, options)
    planned, selected, failed, stopped_by = [], [], {}, 0
    if options.measure:
        first_seeds = [run for run in plan(*plan_arguments) if names_of(run.row) in chosen and run.seed == 0]
        failed = measure(first_seeds, name, options.scale, options.workdir)
    for planned in stages(*plan_arguments):
        # One seed of every row before the next: each row has a value early, also in the table after Ctrl-C.
        selected = [run for run in planned if names_of(run.row) in chosen and run.seed < options.seeds]
        selected.sort(key=lambda run: run.seed)
        failed = failed if options.measure else undecided(failed, planned)
        to_do = [run for run in selected if not run.evaluation and run not in failed]
        if options.dry_run:
            print_commands(to_do)
        elif not options.measure:
            errors, stopped_by = launch(to_do, executor, partial(write, name, options.scale, planned, options.workdir))
            failed |= errors
        if stopped_by:
            break
    if options.dry_run:
        raise SystemExit
    print('\n' + finish(planned, name, options, write, executor is None and not options.measure and not stopped_by))
    raise SystemExit(report_outcome(selected, failed, stopped_by, options.workdir / f'{name}.md', not options.measure))
