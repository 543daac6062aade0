"""ListOps (Nangia and Bowman 2018) as the Long Range Arena generates it: nested lists of digits with an operator each.

A tree is kept as its tokens in the order in which they are read: an operator, what it is applied to, and `]`. The
vocabulary has a fixed order: 0 is padding, 1..10 are the digits 0..9, 11..14 `[MIN`, `[MAX`, `[MED` and `[SM`, 15 `]`.
(The benchmark's own order came out of a Python set, and so was another one in every process.)

In the benchmark's files a tree is written in nested pairs, `( ( ( [MED 0 ) 5 ) ] )`: the operator takes one argument
after the other, and `]` last. The parentheses say nothing new; models read the tokens without them.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from combiner import atomic

OPERATORS = ('[MIN', '[MAX', '[MED', '[SM')
VOCABULARY = ('<pad>', *'0123456789', *OPERATORS, ']')
HEADER = 'Source\tTarget'

MAX_DEPTH = 10
MAX_ARGUMENTS = 10
SHORTEST, LONGEST = 501, 1999  # tokens of a tree that is kept

_IDS = {token: number for number, token in enumerate(VOCABULARY)}
_FIRST_DIGIT, _FIRST_OPERATOR, _END = _IDS['0'], _IDS[OPERATORS[0]], _IDS[']']
# One whole number below 720 decides on a node: 180 of them on an operator, 5 on each with each number of arguments;
# 540 on a digit, 54 on each. At the greatest depth all are digits, 72 on each.
_DRAWS = 720
_OPERATOR_DRAWS = _DRAWS // 4
_BLOCK = 4096


def generate(seed: int, index: int) -> list[int]:
    """Draws tree number `index` of a seed: the first of its random stream that is neither too short nor too long.

    A node is a digit with probability 3/4, and always at depth 10; else an operator, each equally likely, with 2 to 10
    arguments. 8.35 % of all trees have more than 500 and fewer than 2,000 tokens; those have 1,040 on average, half of
    them at most 958.

    Returns:
        The tokens, as numbers of `VOCABULARY`.
    """
    stream = _draws(np.random.default_rng([seed, index]))
    return next(tree for tree in (draw(stream) for _ in itertools.count()) if tree and len(tree) >= SHORTEST)


def draw(stream: Iterator[int]) -> list[int] | None:
    """One tree of any length from a stream of whole numbers, uniform in 0..719; None if it is longer than `LONGEST`."""
    tokens = []
    missing = [1]  # arguments at each depth that are still to come; the root is one
    while missing:
        if not missing[-1]:
            missing.pop()
            if missing:
                tokens.append(_END)
            continue
        missing[-1] -= 1
        number = next(stream)
        if number < _OPERATOR_DRAWS and len(missing) < MAX_DEPTH:
            arguments, operator = divmod(number, len(OPERATORS))
            tokens.append(_FIRST_OPERATOR + operator)
            missing.append(2 + arguments % (MAX_ARGUMENTS - 1))
        else:
            tokens.append(_FIRST_DIGIT + number % 10)
        if len(tokens) + len(missing) - 1 > LONGEST:  # what is open has yet to be closed
            return None
    return tokens


def evaluate(tokens: Iterable[int]) -> int:
    """The value of a tree: MED is the median rounded down, SM the last digit of the sum."""
    lists: list[list[int]] = [[]]
    for token in tokens:
        if token == _END:
            operator, *values = lists.pop()
            lists[-1].append(_apply(OPERATORS[operator - _FIRST_OPERATOR], values))
        elif token >= _FIRST_OPERATOR:
            lists.append([token])
        else:
            lists[-1].append(token - _FIRST_DIGIT)
    return lists[0][0]


def write_source(tokens: Iterable[int]) -> str:
    """A tree in nested pairs, as the benchmark's files have it."""
    pieces: list[str] = []
    places: list[int] = []  # of the open operators in `pieces`
    arguments: list[int] = []  # that each of them has had
    for token in tokens:
        if token != _END and token >= _FIRST_OPERATOR:
            places.append(len(pieces))
            arguments.append(0)
            pieces.append(VOCABULARY[token])
            continue
        pieces.append(VOCABULARY[token])
        if token == _END:
            pieces.append(')')
            # One pair for every argument, and one for the end.
            place = places.pop()
            pieces[place] = '( ' * (arguments.pop() + 1) + pieces[place]
        if places:
            arguments[-1] += 1
            pieces.append(')')
    return ' '.join(pieces)


def tokenize(source: str, key: str) -> Int32[np.ndarray, ' length']:
    """The tokens of a source without its parentheses, as numbers of `VOCABULARY`; `key` names the record in errors.

    Raises:
        ValueError: the source has a word that is no token, or no tokens at all.
    """
    try:
        ids = [_IDS[word] for word in source.split() if word not in '()']
    except KeyError as error:
        known = ' '.join(VOCABULARY[1:])
        raise ValueError(f'record {key}: {error.args[0]!r} is no token of ListOps; known: {known} ( )') from None
    if not ids or 0 in ids:
        raise ValueError(f'record {key}: the source {source[:40]!r} is empty or padded; give an expression of ListOps')
    return np.array(ids, np.int32)


def write_line(source: str, label: int) -> str:
    """A record as a line of the benchmark's files, without the line's end."""
    return f'{source}\t{label}'


def read_line(line: str, key: str) -> dict[str, Any]:
    """Inverts `write_line`; a line's end is dropped.

    Returns:
        `{'source': str, 'label': int}`.

    Raises:
        ValueError: the line is no source and digit with a tab between them.
    """
    source, tab, label = line.rstrip('\r\n').partition('\t')
    if not tab or label not in VOCABULARY[_FIRST_DIGIT : _FIRST_DIGIT + 10]:
        raise ValueError(f'record {key}: expected a source, a tab and a digit, got {line[:40]!r}…{line[-20:]!r}')
    return {'source': source, 'label': int(label)}


def write_tsv(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records with `source` and `label` as a file of the benchmark, its header first; atomic."""
    with atomic.replacing(Path(path)) as partial, partial.open('w', encoding='utf-8', newline='\n') as file:
        file.write(HEADER + '\n')
        file.writelines(write_line(record['source'], record['label']) + '\n' for record in records)


def digests(seed: int, indices: Iterable[int]) -> list[bytes]:
    """16 bytes for each of the trees of these indices; equal only for equal trees."""
    return [hashlib.blake2b(bytes(generate(seed, index)), digest_size=16).digest() for index in indices]


def arrange(
    seed: int, counts: Mapping[str, int], in_parallel: Callable[..., Iterable]
) -> dict[str, Int64[np.ndarray, ' n']]:
    """Chooses the trees of all splits: distinct ones, shuffled.

    The first trees of the seed are taken; one that came before (it never happens at these lengths) is left out for
    the next index. A permutation that follows from the seed deals them out to the splits.

    Args:
        seed: of the set.
        counts: trees in each split.
        in_parallel: as the built-in `map`, possibly over several processes.

    Returns:
        The indices of the trees of each split.
    """
    total = sum(counts.values())
    blocks = [range(start, min(start + 1000, total)) for start in range(0, total, 1000)]
    first: dict[bytes, int] = {}
    found = in_parallel(digests, itertools.repeat(seed), blocks)
    for index, digest in enumerate(itertools.chain.from_iterable(found)):
        first.setdefault(digest, index)
    for index in itertools.count(total):
        if len(first) >= total:
            break
        first.setdefault(digests(seed, [index])[0], index)
    # A third number, so that it is the stream of no tree: numpy takes [seed] for [seed, 0].
    shuffled = np.random.default_rng([seed, 0, 1]).permutation(np.array(list(first.values()), np.int64))
    ends = np.cumsum(list(counts.values()))
    return dict(zip(counts, np.split(shuffled, ends[:-1]), strict=True))


def _draws(rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.integers(_DRAWS, size=_BLOCK, dtype=np.uint16).tolist()


def _apply(operator: str, values: list[int]) -> int:
    if operator == '[MIN':
        return min(values)
    if operator == '[MAX':
        return max(values)
    if operator == '[MED':
        ranked = sorted(values)
        return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) // 2
    return sum(values) % 10
