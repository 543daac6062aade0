"""Batches of a task's records for training and evaluation.

`batch_size` is always global. Process p of P holds the p-th of P equal parts of every global batch, so the global
batches do not depend on the number of processes.
"""

import hashlib
import json
from pathlib import Path

import grain
import numpy as np

from combiner import paths
from combiner.data.indices import evenly_spaced, spread
from combiner.data.task import Example, Task, open_split

# One thread and a short buffer are faster than the model and leave the other cores to it. As the threads share Python's
# lock, 2 and 4 of them read embedded data 0.2 to 0.9 times as fast, and generated sets 0.7 to 1.5 times (on 2 cores).
_READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
# A cloud store answers a request, of a record, after tens of milliseconds. Each thread reads one batch: of records that
# take 20 ms each (a sleep), 1, 2, 4 and 16 threads read 2.9, 6.0, 11 and 43 batches of 16 a second.
_READ_STORE = grain.ReadOptions(num_threads=16, prefetch_buffer_size=16)
_FINGERPRINT_RECORDS = 256
_EVAL_SEED = 0  # of a task's random numbers in evaluation; another seed would give other results


def train_batches(
    task: Task,
    *,
    batch_size: int,
    seed: int,
    data_dir: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Returns the endless batches of the training split for one process.

    The stream of examples consists of epochs; each is a new permutation of the whole split, determined by the seed. A
    global batch is the next batch_size examples of the stream. So every example comes exactly once per epoch: if
    batch_size does not divide the split, no example is dropped or repeated, and a batch may contain the end of one
    epoch and the start of the next.

    The iterator's `get_state()` is a small dict that JSON can store, the same in every process: it counts global
    batches. `set_state()` on an iterator of the same data, batch size and seed continues bitwise, with any number of
    processes. Grain does not detect other data: store `fingerprint` with the state.

    Args:
        task: the task to read.
        batch_size: examples in a global batch.
        seed: 0..2**32 - 1.
        data_dir: folder of the data sets, for tasks that read files.
        process_index: index of this process.
        process_count: number of processes; must divide batch_size.

    Returns:
        Dataset of dicts of arrays whose leading axis is batch_size / process_count.

    Raises:
        ValueError: a number is out of its range, or see `open_split`.
        FileNotFoundError: a file of the data set is missing.
    """
    share = _share(batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise ValueError(f'seed {seed} does not lie in 0..2**32 - 1')
    stream = grain.MapDataset.source(open_split(task, 'train', data_dir)).seed(seed).shuffle().repeat()
    examples = stream.map(task.transform)
    if task.randomise is not None:
        examples = examples.random_map(task.randomise)  # seeded by the position in the stream: new in every epoch
    batches = examples.batch(share, drop_remainder=True)
    return batches[process_index::process_count].to_iter_dataset(_options(data_dir))


def eval_batches(
    task: Task,
    split: str,
    *,
    batch_size: int,
    limit: int | None = None,
    evaluation: str | None = None,
    data_dir: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """Returns one pass over a split for one process: every example exactly once, in order.

    The random numbers of an example (see `Task.randomise`) depend only on its index in the split. So they are the same
    in every evaluation, at any step, batch size or limit.

    The last global batch is padded with zeros, weights included, so that all batches have one shape and every process
    gets the same number of batches.

    Args:
        task: the task to read.
        split: 'train', 'validation' or 'test'.
        batch_size: examples in a global batch.
        limit: number of examples to read, spread over the split (all, if it has fewer).
        evaluation: one of the task's `evaluations`; None for the first.
        data_dir: folder of the data sets, for tasks that read files.
        process_index: index of this process.
        process_count: number of processes; must divide batch_size.

    Returns:
        Dataset of dicts of arrays with leading axis batch_size / process_count; it can be iterated several times.

    Raises:
        ValueError: a number is out of its range, or see `open_split`.
        FileNotFoundError: a file of the data set is missing.
    """
    share = _share(batch_size, process_index, process_count)
    if limit is not None and limit < 1:
        raise ValueError(f'limit {limit} leaves nothing to evaluate; give at least 1, or None for all')
    source = open_split(task.evaluated(evaluation), split, data_dir)
    chosen = spread(len(source), limit)
    padding = -1
    indices = np.pad(chosen, (0, -len(chosen) % batch_size), constant_values=padding)
    blank = {name: np.zeros_like(value) for name, value in task.transform(source[0]).items()}

    def read(index: int) -> Example:
        if index == padding:
            return blank
        example = task.transform(source[index])
        return task.randomise(example, np.random.default_rng([_EVAL_SEED, index])) if task.randomise else example

    batches = grain.MapDataset.source(indices.tolist()).map(read).batch(share)
    return batches[process_index::process_count].to_iter_dataset(_options(data_dir))


def fingerprint(task: Task, split: str, data_dir: str | None = None) -> str:
    """Returns a fingerprint of the examples of a split: 16 hexadecimal digits.

    It is a SHA-256 over the task's name, the split, its length and its examples (256 evenly spaced ones if there are
    more).

    Raises:
        ValueError: see `open_split`.
        FileNotFoundError: a file of the data set is missing.
    """
    source = open_split(task, split, data_dir)
    digest = hashlib.sha256(json.dumps([task.name, split, len(source)]).encode())
    for index in evenly_spaced(len(source), _FINGERPRINT_RECORDS):
        for name, value in sorted(task.transform(source[int(index)]).items()):
            digest.update(json.dumps([name, str(value.dtype), value.shape]).encode())
            digest.update(value.tobytes())
    return digest.hexdigest()[:16]


def examples_evaluated(task: Task, split: str, *, limit: int | None = None, data_dir: str | None = None) -> str:
    """Returns an identifier of the examples that `eval_batches` reads: the split's `fingerprint`, number and choice.

    Raises:
        ValueError: see `open_split`.
        FileNotFoundError: a file of the data set is missing.
    """
    size = len(open_split(task, split, data_dir))
    count = len(spread(size, limit))
    return f'{fingerprint(task, split, data_dir)}/{count}{"" if count == size else " spread"}'


def _options(data_dir: str | None) -> grain.ReadOptions:
    """Returns how to read ahead; the batches are the same."""
    local = data_dir is None or isinstance(paths.parse(data_dir, 'data directory'), Path)
    return _READ if local else _READ_STORE


def _share(batch_size: int, process_index: int, process_count: int) -> int:
    """Returns the number of rows of a global batch that each process gets."""
    if not 0 <= process_index < process_count:
        raise ValueError(f'process_index {process_index} does not lie in 0..{process_count - 1}')
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f'batch_size {batch_size} is not a positive multiple of process_count {process_count}; choose one'
        )
    return batch_size // process_count
