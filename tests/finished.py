"""What commands leave behind, without running them."""

import json
from pathlib import Path

from combiner.run import saved_config
from experiments.harness import run as runs
from experiments.harness.row import Row

ENVIRONMENT = {'device': 'abacus', 'machine': 'x86_64', 'cores': 2, 'python': '3.11', 'jax': '0.10', 'commit': 'abc'}


def row(model, column='Photos', argument='attention=full', metric='bits_per_dim', published=None):
    return Row(model, column, 'configs/photos.py', argument, metric, published)


def run(row, folder, seed=0, scale='cpu'):
    column, model = runs.slug(row.column), runs.slug(row.model)
    return runs.Run(row, scale, seed, Path(folder) / scale / column / model / f'seed{seed}')


def train(workdir, arguments):
    """100 steps with the config of these arguments, 60 at 6,144 tokens/s (8·768) and 40 at half of that."""
    saved_config.claim(workdir, runs.parse_config(arguments))
    lines = [{'step': 60, 'tokens_per_second': 6144}, {'step': 60, 'validation_bits_per_dim': 5.0}]
    lines.append({'step': 100, 'tokens_per_second': 3072})
    (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + '{"step": 1')


def evaluate(workdir, value, metric='bits_per_dim', **changed):
    config = saved_config.load(workdir)
    found = {metric: value, 'dataset': 'photos 16x16', 'examples': 1853, 'context': 'all before'}
    found |= {'step': config.steps, 'limit': config.run.test_examples, **changed}
    (workdir / runs.EVALUATION).write_text(json.dumps(found))


class Fake:
    """Executes nothing: leaves behind what the commands would, or fails.

    Attributes:
        said: the modules and workdirs of the commands, in turn.
        broken: what fails: the model's folder.
    """

    def __init__(self, broken=''):
        self.said, self.broken = [], broken

    def __call__(self, command, log):
        module, workdir = command[2], Path(command[-1])
        self.said.append((module, f'{workdir.parent.name}/{workdir.name}'))
        log.write(b'this and that\n')
        log.flush()
        if self.broken == workdir.parent.name:
            log.write(b'Traceback:\n  deep\nerror: a pipe burst\n\n')
            log.flush()
            return runs.Ended(2, 1.5, 10.0)
        if module == 'combiner.train':
            train(workdir, command[3:-2])
        else:
            evaluate(workdir, 4.0 + 0.5 * int(workdir.name.removeprefix('seed')))
        return runs.Ended(0, 2.5, 100.0 if module == 'combiner.train' else 900.0)
