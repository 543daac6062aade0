"""The table of tasks: what a name stands for, from its records to its metric."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from grain.sources import RandomAccessDataSource

from combiner.data import ops, photos

SPLITS = ('train', 'validation', 'test')


@dataclass(frozen=True)
class Task:
    """One learning problem on one data set.

    Attributes:
        name: the key in `TASKS`.
        dataset: full name of the data set, printed beside every result.
        source: (split, data_dir) -> random-access source of records; see `open_split`.
        transform: record -> example, a dict of arrays of fixed shapes with at least int32 `tokens` [length]
            and float32 `weights` [length] (1 where a token counts in the loss). Depends on the record only.
        vocab_size: tokens are 0..vocab_size - 1.
        shape: layout of the sequence, for instance (rows, columns, channels); its product is the length.
        head: name of the model's output head.
        metric: name of the figure that is reported.
    """

    name: str
    dataset: str
    source: Callable[[str, str | None], RandomAccessDataSource]
    transform: Callable[[Mapping[str, Any]], dict[str, np.ndarray]]
    vocab_size: int
    shape: tuple[int, ...]
    head: str
    metric: str

    @property
    def length(self) -> int:
        """Number of tokens in an example."""
        return math.prod(self.shape)


def _photos(size: int) -> Task:
    # The photographs are embedded: there is no directory to read them from.
    def source(split: str, data_dir: str | None) -> photos.Photos:
        del data_dir
        return photos.Photos(photos.SPLITS[split], size)

    return Task(
        name=f'photos{size}',
        dataset=f'photos {size}x{size} (crops of the photographs in scikit-image and scikit-learn)',
        source=source,
        transform=ops.image_language_model,
        vocab_size=256,
        shape=(size, size, 3),
        head='language_model',
        metric='bits_per_dim',
    )


TASKS = {task.name: task for task in (_photos(16), _photos(32))}


def get(name: str) -> Task:
    """Looks a task up.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in TASKS:
        raise ValueError(f'unknown task {name!r}; known: {", ".join(TASKS)}')
    return TASKS[name]


def open_split(task: Task, split: str, data_dir: str | None = None) -> RandomAccessDataSource:
    """Opens the records of one split of a task; `data_dir` is where data sets lie, for tasks that read files.

    Raises:
        ValueError: the split is unknown or empty, or the directory does not exist.
        FileNotFoundError: a file of the data set is missing.
    """
    if split not in SPLITS:
        raise ValueError(f'unknown split {split!r} of task {task.name!r}; known: {", ".join(SPLITS)}')
    if data_dir is not None and not (data_dir and Path(data_dir).is_dir()):  # '' would be here
        raise ValueError(f'data directory {data_dir!r} does not exist; create it or leave data_dir unset')
    source = task.source(split, data_dir)
    if not len(source):
        raise ValueError(f'split {split!r} of task {task.name!r} has no records; prepare the data set anew')
    return source
