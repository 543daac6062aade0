"""The definition of a task: from the records of a data set to the figures that are reported."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from grain.sources import RandomAccessDataSource

from combiner import paths

SPLITS = ('train', 'validation', 'test')

Example = dict[str, np.ndarray]
Source = Callable[[str, str | None], RandomAccessDataSource]


@dataclass(frozen=True)
class Evaluation:
    """One of several ways to cut a data set into examples for evaluation.

    Attributes:
        source: as `Task.source`, for all splits, `train` included.
        context: as `Task.context`.
    """

    source: Source
    context: str


@dataclass(frozen=True)
class Task:
    """One learning problem on one data set.

    An example is a dict of arrays with fixed shapes. Every task has int32 `tokens` [length] (for pairs: [2, length]),
    int32 `targets` (one per token, or [] for a class) and float32 `weights` of the targets' shape: 0 for targets that
    do not count. Optional are bool `valid` and int32 `segments`, of the tokens' shape: False for padding, and the
    packed document of each token. For evaluation there may be float32 `words` and `bytes` []: the number of words and
    UTF-8 bytes in the targets that count.

    Attributes:
        name: the key in `tasks.TASKS`.
        dataset: full name of the data set, printed with every result.
        source: (split, data_dir) -> random-access source of records, dicts with a unique 'key'; see `open_split`.
        transform: record -> example; depends on the record only.
        vocab_size: tokens are 0..vocab_size - 1.
        shape: layout of the sequence, for instance (rows, columns, channels); its product is the length.
        head: name of the model's output head.
        metrics: names of the reported figures; the first one is compared with the published value.
        classes: number of classes, for classifying heads.
        packed: whether training packs documents that must not attend to each other: examples have `segments`.
        randomise: (example, random numbers) -> example: a random change, such as masking; new in every epoch of
            training, always the same in evaluation.
        show: (tokens, data_dir) -> text for readers.
        tokenizer: data_dir -> the file of the SentencePiece model; None for a task without one.
        context: the context of a prediction in evaluation, as text.
        evaluations: the ways to cut the data set for evaluation, by name; the first one gives the main results. Empty
            if evaluation reads the examples of `source`.
        identity: (split, data_dir) -> fingerprints by name, in addition to `pipeline.fingerprint`, such as the
            tokenizer's.
    """

    name: str
    dataset: str
    source: Source
    transform: Callable[[Mapping[str, Any]], Example]
    vocab_size: int
    shape: tuple[int, ...]
    head: str
    metrics: tuple[str, ...]
    classes: int = 0
    packed: bool = False
    randomise: Callable[[Example, np.random.Generator], Example] | None = None
    show: Callable[[np.ndarray, str | None], str] | None = None
    tokenizer: Callable[[str | None], Path] | None = None
    context: str = 'the whole sequence'
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict, hash=False)
    identity: Callable[[str, str | None], dict[str, str]] | None = None

    @property
    def length(self) -> int:
        """Number of tokens in a sequence."""
        return math.prod(self.shape)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an example's tokens."""
        return (2, self.length) if self.head == 'dual_encoder' else (self.length,)

    def text(self, tokens: np.ndarray, data_dir: str | None = None) -> str:
        """Returns tokens as text for readers; as numbers, if the task does not say how to show them."""
        return self.show(tokens, data_dir) if self.show else ' '.join(map(str, tokens.ravel()))

    def evaluated(self, name: str | None = None) -> 'Task':
        """Returns the task with the examples that evaluation reads, for all splits.

        Args:
            name: one of `evaluations`; None for the first.

        Raises:
            ValueError: there is no such evaluation.
        """
        if name is not None and name not in self.evaluations:
            known = ', '.join(self.evaluations) or 'only one, without a name'
            raise ValueError(f'unknown evaluation {name!r} of task {self.name!r}; known: {known}')
        if not self.evaluations:
            return self
        chosen = self.evaluations[name or next(iter(self.evaluations))]
        return replace(self, source=chosen.source, context=chosen.context)


def open_split(task: Task, split: str, data_dir: str | None = None) -> RandomAccessDataSource:
    """Opens the records of one split of a task; `data_dir` is the folder of the data sets, for tasks that read files.

    Raises:
        ValueError: the split is unknown or empty, or the directory does not exist or cannot be read from here.
        FileNotFoundError: a file of the data set is missing.
    """
    if split not in SPLITS:
        raise ValueError(f'unknown split {split!r} of task {task.name!r}; known: {", ".join(SPLITS)}')
    if data_dir is not None:
        given, folder = data_dir, paths.parse(data_dir, 'data directory')
        data_dir = str(folder)
        if not folder.is_dir():
            wrong = 'is a file' if folder.exists() else 'does not exist'
            raise ValueError(
                f'data directory {given!r} {wrong}; create it, give another one (--data_dir where there are no '
                '--config flags), or leave it unset'
            )
    source = task.source(split, data_dir)
    if not len(source):
        raise ValueError(f'split {split!r} of task {task.name!r} has no records; prepare the data set again')
    return source
