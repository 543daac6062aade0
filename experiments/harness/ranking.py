"""Tables that rank mechanisms: one config, one seed each, at cpu scale, with image codecs among the rows.

    python -m experiments.tables.photos [--names NAME,…] [--workdir runs/photos] [--results results]

Runs lie in WORKDIR/NAME. Finished runs are skipped and interrupted runs resume. If all succeed, the command writes
RESULTS/TABLE.json and RESULTS/TABLE.md. Exit status: that of `experiments.harness.runner`.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from combiner import cli, messages, paths
from experiments.harness import runner
from experiments.harness.row import Row
from experiments.harness.run import Run, train_minutes
from experiments.harness.table import UNITS

CODECS = {'png': 'PNG', 'webp_lossless': 'WebP, lossless', 'order0_entropy': 'order-0 entropy'}


@dataclass(frozen=True)
class Ranking:
    """A table with one row for each mechanism.

    Attributes:
        name: of the table, of its module and of its files.
        column: name of the data.
        config: a config file whose argument names the mechanism.
        metric: see `Row`.
        mechanisms: that are run unless the command line names others.
    """

    name: str
    column: str
    config: str
    metric: str
    mechanisms: tuple[str, ...]

    def run(self, mechanism: str, workdir: Path) -> Run:
        """Returns the run of a mechanism."""
        row = Row(mechanism, self.column, self.config, f'attention={mechanism}', self.metric)
        return Run(row, 'cpu', 0, workdir / mechanism)


def result(run: Run) -> dict[str, Any]:
    """Returns the evaluation of a finished run, with its mechanism and the minutes of training."""
    evaluation = run.evaluation or {}
    return {'attention': run.row.model, **evaluation, 'train_minutes': round(train_minutes(run.workdir), 2)}


def table(rows: list[dict[str, Any]], metric: str = 'bits_per_dim') -> str:
    """Returns the rows and the codecs as Markdown, best first."""
    lines = [
        (row[metric], f'| `{row["attention"]}` | {row[metric]:.3f} | {row["train_minutes"]:.1f} |') for row in rows
    ]
    codecs = rows[0]['codecs_bits_per_dim']
    lines += [(codecs[key], f'| *{name}* | *{codecs[key]:.3f}* | |') for key, name in CODECS.items()]
    head = [f'| attention | {UNITS[metric]} | minutes of training |', '|---|---|---|']
    return '\n'.join(head + [line for _, line in sorted(lines)])


def write(ranking: Ranking, rows: list[dict[str, Any]], folder: Path) -> str:
    """Writes the rows as JSON and Markdown into `folder`; returns the Markdown."""
    folder.mkdir(exist_ok=True)
    device = f'{jax.devices()[0].device_kind}, {platform.machine()}'
    document = {'config': ranking.config, 'device': device, 'jax': jax.__version__, 'rows': rows}
    (folder / f'{ranking.name}.json').write_text(json.dumps(document, indent=2) + '\n', encoding='utf-8')
    text = (
        f'{rows[0]["dataset"]}, test split of {rows[0]["examples"]:,} crops; {rows[0]["step"]:,} steps of '
        f'`{ranking.config}`, one seed, on {device}.\n\n'
        f'Made by `python -m experiments.tables.{ranking.name}`.\n\n{table(rows, ranking.metric)}\n'
    )
    (folder / f'{ranking.name}.md').write_text(text, encoding='utf-8')
    return text


@cli.guarded
def command(ranking: Ranking, arguments: Sequence[str] | None = None) -> None:
    """Runs the command line of a ranking.

    Raises:
        SystemExit: a run failed or a signal arrived; the status is that of `runner.report_outcome`.
    """
    parser = argparse.ArgumentParser(
        prog=f'python -m experiments.tables.{ranking.name}',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--names', default=','.join(ranking.mechanisms), help='mechanisms, separated by commas')
    parser.add_argument('--workdir', type=paths.argument, default=Path('runs') / ranking.name)
    parser.add_argument('--results', type=paths.argument, default=Path('results'))
    options = parser.parse_args(arguments)
    messages.heading(table=ranking.name, config=ranking.config, device='this machine', workdir=options.workdir)
    runs = [ranking.run(name, options.workdir) for name in options.names.split(',')]
    failed, stopped_by = runner.launch([run for run in runs if not run.evaluation], None)
    if failed or stopped_by:
        raise SystemExit(runner.report_outcome(runs, failed, stopped_by, options.results / f'{ranking.name}.md'))
    print(write(ranking, [result(run) for run in runs], options.results))
    messages.next_steps(f'read {options.results / ranking.name}.md')
