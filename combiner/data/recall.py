"""Associative recall over chosen distances: generated, nothing to download.

The task is that of multi-query associative recall (Arora et al. 2023, arXiv 2312.04927), but a key and its value are
one token, so that one layer of attention suffices. A sequence is filler with some pairs. The key of each pair comes
again, a chosen distance later, and the next token is the value, which the model must predict. Values are drawn for each
sequence: a mechanism that cannot reach the pair guesses.

    … (k3 v7) … (k1 v2) … … k3 [v7] … k1 [v2]        [·]: the targets that count

A model that knows nothing but the values of the sequence is right in one of `pairs` cases, or a little more.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int

from combiner.data.indices import checked
from combiner.data.task import SPLITS, Evaluation, Example, Task

FILLER = 0
COUNTS = {'train': 1_000_000, 'validation': 2_000, 'test': 2_000}
NEAREST = 4  # the least distance of a key from its pair, in tokens
_ATTEMPTS = 100  # at a sequence in which all pairs find room


class Layout(NamedTuple):
    """The sizes of a recall task. Tokens are filler, then pairs, keys, and values.

    Attributes:
        length: tokens in a sequence.
        pairs: pairs in a sequence, each of another key.
        keys: distinct keys.
        values: distinct values.
    """

    length: int
    pairs: int
    keys: int
    values: int

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return 1 + self.keys * self.values + self.keys + self.values


def ranges(length: int, pairs: int = 1) -> list[range]:
    """Returns the ranges of distances, each twice as far as the one before: 4 to 7, 8 to 15, … up to `length - 2`.

    The last range is longer where the rest, with fewer than four distances for each of `pairs` pairs, has no room.
    """
    starts = [NEAREST]
    while 2 * starts[-1] <= length - 1 - 4 * pairs:
        starts.append(2 * starts[-1])
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], length - 1], strict=True)]


class Recall:
    """A random-access source of sequences, each made from the seed and its index.

    Args:
        layout: the sizes.
        distances: of keys from their pairs: first one of these ranges is drawn, then a distance in it.
        seed: of all sequences; different splits have different seeds.
        count: number of sequences.
    """

    def __init__(self, layout: Layout, distances: list[range], seed: int, count: int):
        self._layout, self._distances, self._seed, self._count = layout, distances, seed, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Returns `{'key': str, 'tokens': int32 [length], 'answers': int [pairs]}`, the positions of the targets."""
        index = checked(index, self._count, 'sequence')
        tokens, answers = generate(self._layout, self._distances, np.random.default_rng([self._seed, index]))
        return {'key': f'{self._seed}/{index}', 'tokens': tokens, 'answers': answers}

    def __repr__(self) -> str:
        return f'Recall({self._layout}, {self._distances}, seed={self._seed}, count={self._count})'


def generate(
    layout: Layout, distances: list[range], generator: np.random.Generator
) -> tuple[Int[np.ndarray, ' length'], Int[np.ndarray, ' pairs']]:
    """Generates one sequence; returns its tokens and the positions of the values to predict.

    Pairs are placed one after the other, each uniformly among the free places of its distance; if there is none, all
    start again.

    Raises:
        ValueError: the pairs found no room in 100 attempts.
    """
    keys = generator.permutation(layout.keys)[: layout.pairs]
    values = generator.integers(layout.values, size=layout.pairs)
    for _ in range(_ATTEMPTS):
        tokens, answers = np.full(layout.length, FILLER, np.int32), []
        for key, value in zip(keys, values, strict=True):
            reach = distances[generator.integers(len(distances))]
            distance = generator.integers(reach.start, reach.stop)
            free = tokens == FILLER
            places = np.flatnonzero(free[: -distance - 1] & free[distance:-1] & free[distance + 1 :])
            if not len(places):
                break
            pair = generator.choice(places)
            tokens[pair] = 1 + key * layout.values + value
            tokens[pair + distance] = 1 + layout.keys * layout.values + key
            tokens[pair + distance + 1] = 1 + layout.keys * layout.values + layout.keys + value
            answers.append(pair + distance + 1)
        else:
            return tokens, np.array(answers)
    raise ValueError(f'{layout.pairs} pairs find no room in {layout.length} tokens; give fewer, or a greater length')


def recall_example(record: Mapping[str, Any]) -> Example:
    """Converts a record to an example of a language model whose targets are the values after keys."""
    tokens = record['tokens']
    weights = np.zeros(tokens.shape, np.float32)
    weights[record['answers']] = 1
    return {'tokens': tokens, 'targets': tokens, 'weights': weights}


def recall(*, length: int = 256, pairs: int = 8, keys: int = 16, values: int = 16) -> Task:
    """Returns the task; training mixes all ranges of distances, and evaluation has a result for each too.

    Args:
        length: tokens in a sequence.
        pairs: pairs in a sequence.
        keys: distinct keys, at least `pairs`.
        values: distinct values.

    Raises:
        ValueError: a number is out of its range.
    """
    if not 1 <= pairs <= keys or values < 2 or length < 8 * pairs:
        raise ValueError(
            f'length={length}, pairs={pairs}, keys={keys}, values={values}: pairs must lie in 1..keys, values be at '
            'least 2, and length at least 8 for each pair'
        )
    layout = Layout(length, pairs, keys, values)

    def source(split: str, data_dir: str | None, distances: list[range]) -> Recall:
        del data_dir  # everything is generated
        return Recall(layout, distances, SPLITS.index(split), COUNTS[split])

    every = ranges(length, pairs)
    chosen = {'all': every} | {f'distance {reach.start}–{reach.stop - 1}': [reach] for reach in every}
    evaluations = {
        name: Evaluation(functools.partial(source, distances=distances), f'the pair before it, {_text(distances)}')
        for name, distances in chosen.items()
    }
    return Task(
        name='recall',
        dataset=f'associative recall, {pairs} pairs in {length:,} tokens (generated)',
        source=functools.partial(source, distances=every),
        transform=recall_example,
        vocab_size=layout.vocab_size,
        shape=(length,),
        head='language_model',
        metrics=('accuracy',),
        context=evaluations['all'].context,
        evaluations=evaluations,
    )


def _text(distances: list[range]) -> str:
    return f'{distances[0].start} to {distances[-1].stop - 1} tokens back'


TASKS = {'recall': recall}
