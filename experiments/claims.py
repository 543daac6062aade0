"""The paper's claims at equal architecture, data, steps and seeds, small enough for two CPU cores: do they show?

    python -m experiments.claims [--rows PATTERN,…] [--data_dir DIR] [--workdir runs/claims]

First every row is trained with each learning rate that `RATES` has for its column, seed 0, at its full number of steps;
the rate of the best validation figure is then run with the other seeds, which are judged on the test split. So every
row, Combiner or not, has the same grid and the same budget. Rows that are compared with chance alone, on the Long Range
Arena's tasks, have the config's own rate.

CIFAR-10 and the Long Range Arena's data lie in DIR (docs/data.md says how to get them there); the other columns are
embedded. All of the other options, and where runs lie, are those of the tables (see `experiments.runner`); below a
row's folder there is one for each rate.

What is claimed is in `CLAIMS`; each row of the Long Range Arena's tasks is claimed to do better than the most frequent
class of the test split. It is shown where the better mean is the better one, and clear where the two 95 % intervals
(Student's t over the seeds) do not meet.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from combiner import checkpoint, evaluate
from combiner.data.task import open_split
from experiments import runner, runs, table_files, verdicts
from experiments.rows import Row
from experiments.runs import Run
from experiments.verdicts import Claim

RATES = {
    'CIFAR-10': (1e-3, 2e-3, 4e-3),
    'Photographs': (2e-3, 4e-3, 8e-3),
    'Prose': (2e-3, 4e-3, 8e-3),
}

_OF_IMAGES = ('optimizer.warmup_steps=50', 'run.eval_every=200', 'run.checkpoint_every=400', 'run.test_examples=500')
_CIFAR10 = ('steps=800', 'data.batch_size=2', *_OF_IMAGES)
_PHOTOS = ('steps=800', *_OF_IMAGES)
# A step of the text's columns has 4,096 tokens at any length.
_TEXT = ('steps=600', 'model.width=64', 'optimizer.warmup_steps=50', 'run.eval_every=150', 'run.checkpoint_every=300')
_LISTOPS = (
    'steps=400',
    'optimizer.schedule=cosine',
    'optimizer.warmup_steps=50',
    'model.dropout=0.0',
    'run.eval_every=100',
    'run.test_examples=2000',
)
_PATHFINDER = (
    'steps=1500',
    'optimizer.warmup_steps=50',
    'model.dropout=0.0',
    'model.layers=2',
    'model.heads=4',
    'model.width=64',
    'model.qkv_width=64',
    'run.eval_every=250',
)
_IMAGE_MODELS = {
    'Logsparse': 'logsparse',
    'Combiner-Logsparse': 'combiner_logsparse',
    'Fixed': 'fixed',
    'Combiner-Fixed': 'combiner_fixed',
    'Axial': 'axial',
    'Combiner-Axial': 'combiner_axial_rowmajor',
    'Combiner-Mixture': 'combiner_mixture',
}
_TEXT_MODELS = {
    'Fixed': ('fixed+block=32', 512),
    'Combiner-Fixed': ('combiner_fixed+block=32', 512),
    'Axial': ('axial+columns=32', 512),
    'Combiner-Axial': ('combiner_axial_rowmajor+columns=32', 512),
    'Combiner-Fixed, half the length': ('combiner_fixed+block=32', 256),
}
_COMBINERS = {
    'Combiner-Fixed': 'combiner_fixed',
    'Combiner-Logsparse': 'combiner_logsparse',
    'Combiner-Tree': 'combiner_tree',
    'Combiner-Axial': 'combiner_axial_rowmajor',
    'Combiner-Axial-Vertical': 'combiner_axial_vertical',
    'Combiner-Axial-Horizontal': 'combiner_axial_horizontal',
    'Combiner-Mixture': 'combiner_mixture',
    'Combiner-Routing': 'combiner_routing',
}
_LONG_RANGE = {
    'ListOps': ('task=listops', _LISTOPS),
    'Pathfinder-easy': ('task=pathfinder,difficulty=easy', _PATHFINDER),
}
SWEPT = (
    *(
        Row(model, column, config, f'attention={attention}{rest}', 'bits_per_dim', settings=settings)
        for column, config, rest, settings in (
            ('CIFAR-10', 'configs/cifar10.py', ',layers=6', _CIFAR10),
            ('Photographs', 'configs/photos.py', '', _PHOTOS),
        )
        for model, attention in _IMAGE_MODELS.items()
    ),
    *(
        Row(
            model,
            'Prose',
            'configs/text.py',
            f'attention={attention},length={length},layers=2',
            'perplexity',
            settings=(*_TEXT, f'data.batch_size={4_096 // length}', f'run.eval_examples={32_768 // length}'),
        )
        for model, (attention, length) in _TEXT_MODELS.items()
    ),
)
ABOVE_CHANCE = tuple(
    Row(model, column, 'configs/lra.py', f'{task},attention={attention}', 'accuracy', settings=settings)
    for column, (task, settings) in _LONG_RANGE.items()
    for model, attention in _COMBINERS.items()
)
ROWS = (*SWEPT, *ABOVE_CHANCE)

CLAIMS = (
    *(
        Claim(column, better, worse, clearly)
        for column in ('CIFAR-10', 'Photographs')
        for better, worse, clearly in (
            ('Combiner-Logsparse', 'Logsparse', True),
            ('Combiner-Fixed', 'Fixed', False),
            ('Combiner-Axial', 'Axial', True),
            ('Combiner-Mixture', 'Combiner-Axial', False),
        )
    ),
    Claim('Prose', 'Combiner-Fixed', 'Fixed'),
    Claim('Prose', 'Combiner-Axial', 'Axial'),
    Claim('Prose', 'Combiner-Fixed', 'Combiner-Fixed, half the length'),
)


def validated(run: Run) -> float | None:
    """The last validation figure of a run; None where it was not validated yet."""
    name = f'validation_{run.row.metric}'
    found = [line[name] for line in runs.lines_of(run.workdir / 'metrics.jsonl') if name in line]
    return found[-1] if found else None


def sweep(row: Row, scale: str, folder: Path, data_dir: str | None) -> dict[float, Run]:
    """The first seed of a row with each rate."""
    return {rate: with_rate(row, rate, scale, 1, folder, data_dir)[0] for rate in RATES[row.column]}


def with_rate(row: Row, rate: float, scale: str, seeds: int, folder: Path, data_dir: str | None) -> list[Run]:
    """The seeds of a row, trained with this learning rate."""
    there = dataclasses.replace(row, settings=(*row.settings, f'optimizer.learning_rate={rate}'))
    return runner.plan([there], scale, seeds, folder, data_dir, below=f'rate-{rate}')


def best(swept: dict[float, Run]) -> float | None:
    """The rate whose run has the lowest validation figure; None unless all are done."""
    if not all(run.evaluation for run in swept.values()):
        return None
    return min(swept, key=lambda rate: validated(swept[rate]) or math.inf)


def stages(rows: Sequence[Row], scale: str, seeds: int, folder: Path, data_dir: str | None) -> Iterator[list[Run]]:
    """The sweep, then all seeds at each row's best rate; a row whose sweep is not whole has to wait."""
    swept = {row: sweep(row, scale, folder, data_dir) for row in rows if row in SWEPT}
    yield [run for runs_of_row in swept.values() for run in runs_of_row.values()]
    planned = []
    for row in rows:
        if row not in swept:
            planned += runner.plan([row], scale, seeds, folder, data_dir)
        elif rate := best(swept[row]):
            planned += with_rate(row, rate, scale, seeds, folder, data_dir)
    yield planned


def most_frequent(run: Run) -> float:
    """The share of the most frequent class of a classifier's test split."""
    config = checkpoint.load_config(run.workdir)
    task = evaluate.task_of(config)
    source = open_split(task, 'test', config.data.data_dir)
    counts = collections.Counter(int(task.transform(source[index])['targets']) for index in range(len(source)))
    return max(counts.values()) / len(source)


def write(name: str, scale: str, planned: Sequence[Run], folder: Path) -> str:
    """The table, as `table_files.write`, with the sweep and what of the claims shows."""
    data_dir = next((run.data_dir for run in planned), None)
    swept = {row: sweep(row, scale, folder / name, data_dir) for row in SWEPT}
    done = {run.row.column: run for run in planned if run.evaluation and run.row in ABOVE_CHANCE}
    chances = {column: most_frequent(run) for column, run in done.items()}
    judged = verdicts.judge(CLAIMS, table_files.document(name, scale, planned)['rows'], chances)
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
    return table_files.write(name, scale, planned, folder, more, [verdicts.table(judged), _sweep(rates)])


def _sweep(rates: list[dict[str, Any]]) -> str:
    body = [
        (
            row['column'],
            row['model'],
            ', '.join(f'{value:.4g} at {rate}' for rate, value in row['validation'].items() if value is not None),
            '' if row['rate'] is None else str(row['rate']),
        )
        for row in rates
    ]
    return table_files.grid(['column', 'model', 'validation by learning rate', 'chosen'], body)


if __name__ == '__main__':
    runner.command(ROWS, 'claims', stages=stages, write=write, scale='cpu', seeds=3, workdir=Path('runs/claims'))
