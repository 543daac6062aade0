"""The tasks of the Long Range Arena (Tay et al. 2021): classification, in accuracy.

Splits are as in the benchmark, except where it validates on test records: there, validation uses training records.
`pretrain=mlm` and `pretrain=causal` train on the same sequences without labels: `combiner.data.pretraining`.
"""

import functools
from collections.abc import Mapping
from typing import Any

from grain.sources import RandomAccessDataSource

from combiner.data import ops, pretraining, tfds_sources
from combiner.data.lra import generated, listops, release
from combiner.data.task import Example, Source, Task

FILES = ('generated', 'release')
VALIDATIONS = ('held_out', 'test')
EXPRESSIONS = ('benchmark', 'short')

_BYTES = 257  # padding and 256 values
_GREY = 256


def _task(name: str, dataset: str, source: Source, pretrain: str, padding: bool, **fields: Any) -> Task:
    rest: dict[str, Any] = {'head': 'classifier', 'metrics': ('accuracy',), 'classes': 2}
    task = Task(name=name, dataset=dataset, source=source, **(rest | fields))
    return pretraining.pretraining(task, pretrain, padding)


def _checked(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f'unknown {name}={value!r}; choose {" or ".join(known)}')
    return value


def _directory(data_dir: str | None) -> str:
    return tfds_sources.default_data_dir() if data_dir is None else data_dir


def list_operations(record: Mapping[str, Any], length: int) -> Example:
    """Converts a ListOps expression to an example.

    Raises:
        ValueError: the expression is longer than `length`; the message has the record's key.
    """
    tokens = listops.tokenize(record['source'], record['key'])
    if len(tokens) > length:
        raise ValueError(f'record {record["key"]} has {len(tokens):,} tokens, more than length={length}; raise length')
    return ops.classification(*ops.pad(tokens, length), record['label'])


def lra_listops(
    *, files: str = 'generated', length: int = 2000, expressions: str = 'benchmark', pretrain: str = 'none'
) -> Task:
    """Returns ListOps: the value, 0 to 9, of nested lists of digits with minimum, maximum, median, sum modulo ten.

    Args:
        files: `generated` by this project, or the `release`'s.
        length: tokens, to which expressions are padded.
        expressions: as long as the `benchmark`'s, 501 to 1,999 tokens, or `short`, 11 to 63.
        pretrain: `mlm` or `causal`, to train on the same sequences without labels; or `none`.
    """
    _checked('files', files, FILES)
    short = _checked('expressions', expressions, EXPRESSIONS) == 'short'
    if short and files == 'release':
        raise ValueError('files=release has no expressions=short; choose files=generated')

    def source(split: str, data_dir: str | None) -> RandomAccessDataSource:
        if files == 'release':
            return release.ListOpsFile(_directory(data_dir), split)
        return generated.open_split('lra_listops_short' if short else 'lra_listops', split, _directory(data_dir))

    return _task(
        'lra_listops',
        f'LRA ListOps ({"short, " if short else ""}{files})',
        source,
        pretrain,
        padding=True,
        transform=functools.partial(list_operations, length=length),
        vocab_size=len(listops.VOCABULARY),
        shape=(length,),
        classes=10,
    )


def lra_text(*, length: int = 4000, validation: str = 'held_out', pretrain: str = 'none') -> Task:
    """Returns Text: whether a film review is positive, from its first bytes.

    Args:
        length: bytes that are read; shorter reviews are padded.
        validation: on `test`, the test reviews, as the benchmark does, which trains on all 25,000 training reviews; or
            on the last tenth of the training reviews (`held_out`).
        pretrain: `mlm` or `causal`, to train on the same sequences without labels; or `none`.
    """
    _checked('validation', validation, VALIDATIONS)
    splits = {'train': 'train', 'validation': 'test', 'test': 'test'}
    if validation == 'held_out':
        splits |= {'train': 'train[:90%]', 'validation': 'train[90%:]'}
    return _task(
        'lra_text',
        'LRA Text (imdb_reviews, TFDS)',
        tfds_sources.by_split('imdb_reviews', splits),
        pretrain,
        padding=True,
        transform=functools.partial(ops.byte_classification, length=length),
        vocab_size=_BYTES,
        shape=(length,),
    )


def lra_retrieval(*, length: int = 4000, pretrain: str = 'none') -> Task:
    """Returns Retrieval: whether one paper cites the other, from the first bytes of both; needs the release's files.

    Args:
        length: bytes that are read of each paper.
        pretrain: `mlm` or `causal`, to train on the same sequences without labels; or `none`.
    """

    def source(split: str, data_dir: str | None) -> RandomAccessDataSource:
        return release.RetrievalFile(_directory(data_dir), split)

    return _task(
        'lra_retrieval',
        'LRA Retrieval (AAN, release)',
        source,
        pretrain,
        padding=True,
        transform=functools.partial(ops.byte_pair_classification, length=length),
        vocab_size=_BYTES,
        shape=(length,),
        head='dual_encoder',
    )


def shrunk_image(record: Mapping[str, Any], size: int, black_is_padding: bool) -> Example:
    """Converts a record to an example of its image, reduced to `size` rows and columns."""
    return ops.image_classification(ops.shrunk(record, size), (size, size), black_is_padding)


def lra_image(*, size: int = 32, black_is_padding: bool = False, pretrain: str = 'none') -> Task:
    """Returns Image: the class of a grey CIFAR-10 image; validation uses the last tenth of the training images.

    Args:
        size: 32, the benchmark's, or 16 or 8: their means over blocks.
        black_is_padding: whether the value 0 counts as padding, as in the benchmark's code.
        pretrain: `mlm` or `causal`, to train on the same sequences without labels; or `none`.
    """
    if size not in (32, 16, 8):
        raise ValueError(f'size={size}: images of CIFAR-10 can have size 32, or reduced 16 or 8')
    splits = {'train': 'train[:90%]', 'validation': 'train[90%:]', 'test': 'test'}
    return _task(
        'lra_image',
        f'LRA Image (cifar10 in grey{f" at {size}x{size}" if size < 32 else ""}, TFDS)',
        tfds_sources.by_split('cifar10', splits),
        pretrain,
        padding=False,
        transform=functools.partial(shrunk_image, size=size, black_is_padding=black_is_padding),
        vocab_size=_GREY,
        shape=(size, size),
        classes=10,
    )


def lra_pathfinder(
    *,
    size: int = 32,
    difficulty: str = 'intermediate',
    files: str = 'generated',
    black_is_padding: bool = False,
    pretrain: str = 'none',
) -> Task:
    """Returns Pathfinder: whether two marked points are the ends of one dashed line; size 128, hard, is Path-X.

    Args:
        size: side of the images in pixels.
        difficulty: `easy`, `intermediate` or `hard`.
        files: `generated` by this project, or the `release`'s.
        black_is_padding: whether the value 0, the background, counts as padding, as in the benchmark's code.
        pretrain: `mlm` or `causal`, to train on the same sequences without labels; or `none`.
    """
    _checked('files', files, FILES)
    name = f'lra_pathfinder{size}_{difficulty}'
    generated.recipe(name)  # raises for an unknown size or difficulty

    def source(split: str, data_dir: str | None) -> RandomAccessDataSource:
        if files == 'release':
            return release.PathfinderFolder(_directory(data_dir), size, difficulty, split)
        return generated.open_split(name, split, _directory(data_dir))

    return _task(
        'lra_pathfinder',
        f'LRA Pathfinder {size}x{size} {difficulty} ({files})',
        source,
        pretrain,
        padding=False,
        transform=functools.partial(ops.image_classification, shape=(size, size), black_is_padding=black_is_padding),
        vocab_size=_GREY,
        shape=(size, size),
    )


TASKS = {task.__name__: task for task in (lra_listops, lra_text, lra_retrieval, lra_image, lra_pathfinder)}
