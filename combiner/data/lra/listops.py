"""ListOps (Nangia and Bowman 2018) as the Long Range Arena generates it: nested lists of digits, each with an operator.

A tree is stored as its tokens in reading order: an operator, its arguments, and `]`. The vocabulary has a fixed order:
0 is padding, 1..10 are the digits 0..9, 11..14 `[MIN`, `[MAX`, `[MED` and `[SM`, 15 `]`. (The benchmark's own order
came from a Python set and so was different in every process.)

The benchmark's files write a tree in nested pairs, `( ( ( [MED 0 ) 5 ) ] )`: the operator takes one argument after the
other, and `]` last. The parentheses contain no information; models read the tokens without them.
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
LENGTHS = range(501, 2_000)  # permitted numbers of tokens of a tree: the benchmark's
SHORT_LENGTHS = range(11, 64)  # this project's own, for training within minutes on a CPU

_IDS = {token: number for number, token in enumerate(VOCABULARY)}
_FIRST_DIGIT, _FIRST_OPERATOR, _END = _IDS['0'], _IDS[OPERATORS[0]], _IDS[']']
# A uniform integer below 720 chooses a node: 180 of the values give an operator, 5 for each operator and number of
# arguments; 540 give a digit, 54 for each. At the greatest depth all values give digits, 72 for each.
_OUTCOMES = 720
_OPERATOR_OUTCOMES = _OUTCOMES // 4
_BLOCK = 4096


def generate(seed: int, index: int, lengths: range = LENGTHS) -> list[int]:
    """Generates tree number `index` of a seed: the first of its random stream with a permitted number of tokens.

    A node is a digit with probability 3/4, and always at depth 10; otherwise an operator with 2 to 10 arguments, all
    operators and numbers equally likely. 8.35 % of all trees have more than 500 and fewer than 2,000 tokens, the
    benchmark's lengths; these have 1,040 tokens on average, with a median of 958.

    Returns:
        The tokens, as indices into `VOCABULARY`.
    """
    stream = _uniform(np.random.default_rng([seed, index]))
    trees = (random_tree(stream, lengths[-1]) for _ in itertools.count())
    return next(tree for tree in trees if tree and len(tree) in lengths)


def random_tree(stream: Iterator[int], longest: int = LENGTHS[-1]) -> list[int] | None:
    """Generates a tree from a stream of integers, uniform in 0..719; returns None if it is longer than `longest`."""
    tokens = []
    missing = [1]  # number of missing arguments at each depth; the root is one
    while missing:
        if not missing[-1]:
            missing.pop()
            if missing:
                tokens.append(_END)
            continue
        missing[-1] -= 1
        number = next(stream)
        if number < _OPERATOR_OUTCOMES and len(missing) < MAX_DEPTH:
            arguments, operator = divmod(number, len(OPERATORS))
            tokens.append(_FIRST_OPERATOR + operator)
            missing.append(2 + arguments % (MAX_ARGUMENTS - 1))
        else:
            tokens.append(_FIRST_DIGIT + number % 10)
        if len(tokens) + len(missing) - 1 > longest:  # each open operator needs a `]`
            return None
    return tokens


def evaluate(tokens: Iterable[int]) -> int:
    """Computes the value of a tree: MED is the median rounded down, SM the last digit of the sum."""
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
    """Writes a tree in nested pairs, as in the benchmark's files."""
    pieces: list[str] = []
    indices: list[int] = []  # of the open operators in `pieces`
    arguments: list[int] = []  # number of arguments that each open operator has so far
    for token in tokens:
        if token != _END and token >= _FIRST_OPERATOR:
            indices.append(len(pieces))
            arguments.append(0)
            pieces.append(VOCABULARY[token])
            continue
        pieces.append(VOCABULARY[token])
        if token == _END:
            pieces.append(')')
            # One pair for every argument, and one for the end.
            index = indices.pop()
            pieces[index] = '( ' * (arguments.pop() + 1) + pieces[index]
        if indices:
            arguments[-1] += 1
            pieces.append(')')
    return ' '.join(pieces)


def tokenize(source: str, key: str) -> Int32[np.ndarray, ' length']:
    """Returns the tokens of a source without parentheses, as indices into `VOCABULARY`; `key` is for error messages.

    Raises:
        ValueError: the source has a word that is not a token, or no tokens.
    """
    try:
        ids = [_IDS[word] for word in source.split() if word not in '()']
    except KeyError as error:
        known = ' '.join(VOCABULARY[1:])
        raise ValueError(f'record {key}: {error.args[0]!r} is not a token of ListOps; known: {known} ( )') from None
    if not ids or 0 in ids:
        raise ValueError(f'record {key}: the source {source[:40]!r} is empty or padded; give an expression of ListOps')
    return np.array(ids, np.int32)


def write_line(source: str, label: int) -> str:
    """Returns a record as a line of the benchmark's files, without a line break."""
    return f'{source}\t{label}'


def read_line(line: str, key: str) -> dict[str, Any]:
    """Inverts `write_line`; ignores a line break.

    Returns:
        `{'source': str, 'label': int}`.

    Raises:
        ValueError: the line does not consist of a source, a tab and a digit.
    """
    source, tab, label = line.rstrip('\r\n').partition('\t')
    if not tab or label not in VOCABULARY[_FIRST_DIGIT : _FIRST_DIGIT + 10]:
        raise ValueError(f'record {key}: expected a source, a tab and a digit, got {line[:40]!r}…{line[-20:]!r}')
    return {'source': source, 'label': int(label)}


def write_tsv(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Writes records with `source` and `label` atomically to a file of the benchmark's format, with its header."""
    with atomic.replacing(Path(path)) as partial, partial.open('w', encoding='utf-8', newline='\n') as file:
        file.write(HEADER + '\n')
        file.writelines(write_line(record['source'], record['label']) + '\n' for record in records)


def digests(seed: int, indices: Iterable[int], lengths: range = LENGTHS) -> list[bytes]:
    """Returns a hash of 16 bytes for each tree of these indices."""
    return [hashlib.blake2b(bytes(generate(seed, index, lengths)), digest_size=16).digest() for index in indices]


def arrange(
    seed: int, counts: Mapping[str, int], in_parallel: Callable[..., Iterable], lengths: range = LENGTHS
) -> dict[str, Int64[np.ndarray, ' n']]:
    """Chooses distinct trees for all splits, and shuffles them.

    It takes the first trees of the seed; a repeated tree (never at the benchmark's lengths) is replaced by that of
    the next index. A permutation, determined by the seed, distributes the trees to the splits.

    Args:
        seed: of the set.
        counts: number of trees per split.
        in_parallel: works as the built-in `map`, possibly over several processes.
        lengths: permitted numbers of tokens.

    Returns:
        The indices of the trees of each split.
    """
    total = sum(counts.values())
    blocks = [range(start, min(start + 1000, total)) for start in range(0, total, 1000)]
    first: dict[bytes, int] = {}
    found = in_parallel(digests, itertools.repeat(seed), blocks, itertools.repeat(lengths))
    for index, digest in enumerate(itertools.chain.from_iterable(found)):
        first.setdefault(digest, index)
    for index in itertools.count(total):
        if len(first) >= total:
            break
        first.setdefault(digests(seed, [index], lengths)[0], index)
    # A third number, so that no tree has this stream: numpy treats [seed] as [seed, 0].
    shuffled = np.random.default_rng([seed, 0, 1]).permutation(np.array(list(first.values()), np.int64))
    ends = np.cumsum(list(counts.values()))
    return dict(zip(counts, np.split(shuffled, ends[:-1]), strict=True))


def _uniform(rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.integers(_OUTCOMES, size=_BLOCK, dtype=np.uint16).tolist()


def _apply(operator: str, values: list[int]) -> int:
    if operator == '[MIN':
        return min(values)
    if operator == '[MAX':
        return max(values)
    if operator == '[MED':
        ranked = sorted(values)
        return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) // 2
    return sum(values) % 10
