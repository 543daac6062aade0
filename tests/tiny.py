"""A task and a model so small that tests can train: 4×4×3 images, two layers of width 16.

Also a command, for tests that need a process of their own: it trains, python tests/tiny.py WORKDIR [key=JSON …], or
evaluates, python tests/tiny.py --evaluate WORKDIR … As the real ones, it shows and hides what is logged, and joins
other processes: --coordinator=… --processes=… --process=….
"""

import functools
import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from combiner import config as common
from combiner import evaluate, train
from combiner.data import ops, tasks
from combiner.data.task import Task
from combiner.run import processes


class Images:
    """Slanted gradients: something to learn in a few steps."""

    def __init__(self, split, size=24):
        self.split, self.size = split, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        random = np.random.default_rng([index, len(self.split)])
        y, x, channel = np.mgrid[:4, :4, :3]
        image = random.integers(100) + random.integers(8) * y + random.integers(8) * x + 10 * channel
        return {'image': image.astype(np.uint8), 'key': f'{self.split}/{index}'}


def task(name, head='language_model', **changes):
    arguments = {
        'name': name,
        'dataset': 'tiny gradients',
        'source': lambda split, data_dir: Images(split),
        'transform': functools.partial(ops.image_language_model, shape=(4, 4, 3)),
        'vocab_size': 256,
        'shape': (4, 4, 3),
        'head': head,
        'metrics': ('bits_per_dim',),
    }
    return Task(**(arguments | changes))


def classified(record):
    """Whether the first column grows faster than the first row; every third example has padding."""
    image = record['image'].astype(np.int32)
    down, right = image[-1, 0, 0] - image[0, 0, 0], image[0, -1, 0] - image[0, 0, 0]
    valid = np.arange(48) < (40 if image[0, 0, 0] % 3 == 0 else 48)
    return ops.classification(image.reshape(-1), valid, int(down > right))


TASKS = {
    'tiny': lambda: task('tiny'),
    'tiny_classes': lambda: task('tiny_classes', 'classifier', transform=classified, metrics=('accuracy',), classes=2),
}
TASK = TASKS['tiny']()


def config(task='tiny', **changes):
    """The tiny config; changes by dotted key."""
    base = common.base()
    base.task = task
    base.steps = 6
    base.model.layers, base.model.width, base.model.heads, base.model.mlp_ratio = 2, 16, 2, 2.0
    base.model.attention = common.attention('combiner_axial_rowmajor', row=12)
    base.optimizer.learning_rate, base.optimizer.warmup_steps, base.optimizer.ema_decay = 1e-2, 2, 0.9
    base.run.update(log_every=2, eval_every=3, eval_examples=8, eval_batch_size=8, checkpoint_every=3)
    base.update_from_flattened_dict(changes)
    return base


def digest(state):
    """A hash over every bit of a state."""
    result = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        whole = multihost_utils.process_allgather(leaf, tiled=True) if jax.process_count() > 1 else leaf
        result.update(jax.tree_util.keystr(path).encode() + np.asarray(whole).tobytes())
    return result.hexdigest()


def main(workdir, *changes):
    tasks.TASKS.update(TASKS)
    changes = dict(change.split('=') for change in changes)
    state = train.train(config(**{key: json.loads(value) for key, value in changes.items()}), workdir)
    print('digest', digest(state))


def evaluate_all(*workdirs):
    tasks.TASKS.update(TASKS)
    print('metrics', json.dumps([evaluate.evaluate(Path(workdir)) for workdir in workdirs]))


if __name__ == '__main__':
    joins = [argument for argument in sys.argv[1:] if argument.startswith(('--coordinator', '--process'))]
    arguments = [argument for argument in sys.argv[1:] if argument not in joins]
    sys.argv[1:] = joins
    processes.run(
        lambda: evaluate_all(*arguments[1:]) if arguments[0] == '--evaluate' else main(*arguments), preemption=True
    )
