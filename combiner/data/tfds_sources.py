"""Data sets of TensorFlow Datasets (TFDS), read at random, without TensorFlow and without ever downloading.

A set is read where `combiner.data.prepare` has left it, in TFDS's own layout: DIR/NAME[/CONFIG]/VERSION, in the
format ARRAY_RECORD, the only one of TFDS's that is read at random without TensorFlow. All that a reader needs to know
lies beside the records, so the builders that made them are not imported. One version of each set is read, that of
`SETS`, so that figures measured on it can be compared; other versions beside it are left alone.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from combiner import paths

_IMAGES, _TEXT = 'configs/photos.py', 'configs/text.py'


@dataclass(frozen=True)
class TfdsSet:
    """One prepared data set.

    Attributes:
        folder: where it lies below the data directory; also its full name in TFDS, NAME[/CONFIG]/VERSION.
        own_id: the feature that is the set's own name of a record; '' where it has none.
        stand_in: the config whose data are embedded and of the same kind.
    """

    folder: str
    own_id: str
    stand_in: str


SETS = {
    'cifar10': TfdsSet('cifar10/3.0.2', 'id', _IMAGES),
    'downsampled_imagenet/64x64': TfdsSet('downsampled_imagenet/64x64/2.0.0', '', _IMAGES),
    'imagenet_resized/64x64': TfdsSet('imagenet_resized/64x64/0.1.0', '', _IMAGES),
    'imdb_reviews': TfdsSet('imdb_reviews/plain_text/1.0.0', '', _TEXT),
    'wiki40b/en': TfdsSet('wiki40b/en/1.3.0', 'wikidata_id', _TEXT),
    'pg19': TfdsSet('pg19/0.1.1', 'book_id', _TEXT),
    'c4/en': TfdsSet('c4/en/3.1.0', '', _TEXT),
}


class TfdsSource:
    """A random-access source of one split; holds no records, opens a shard when it is first read from.

    Several threads may read it, and it may be pickled into another process.
    """

    def __init__(self, records: Any, prefix: str, own_id: str):
        self._records = records
        self._prefix = prefix
        self._own_id = own_id

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Reads and decodes a record.

        Returns:
            TFDS's features as they are (text as bytes, images as uint8 [height, width, channels], labels as int) and
            `key`: 'cifar10/train[:90%]/17/train_16399', the set, the split, the index and, where the set has one, its
            own name of the record. The index makes it unique: Wiki-40B has several articles of one `wikidata_id`.

        Raises:
            IndexError: there is no such record.
            ValueError: the record is damaged, or its file is gone.
        """
        index = index.__index__()
        key = f'{self._prefix}/{index}'
        if not 0 <= index < len(self):
            raise IndexError(f'record {key} of {len(self)}')
        try:
            record = self._records[index]
        except Exception as error:  # of many kinds: from the file, its compression, the record's fields or an image
            raise ValueError(
                f'record {key} cannot be read: {error}; delete the data set and prepare it anew'
            ) from error
        if self._own_id:
            own = record[self._own_id]
            key = f'{key}/{own.decode() if isinstance(own, bytes) else own}'
        return record | {'key': key}


def open_tfds(name: str, split: str, data_dir: str | None = None) -> TfdsSource:
    """Opens a split of a prepared data set.

    The first call in a process imports tensorflow_datasets, and is slower for it.

    Args:
        name: from `SETS`.
        split: a split or an expression of TFDS's: 'train', 'train[:90%]', 'train[48000:]', 'train+test'.
        data_dir: the data directory; None stands for `default_data_dir()`.

    Raises:
        ValueError: the name or the split is unknown, the split is empty, or the set lies there in another format than
            ARRAY_RECORD, or its description is damaged or another set's.
        FileNotFoundError: the set, in its one version, or a file of it is not there.
    """
    folder = locate(name, data_dir)
    builder = _builder(folder, SETS[name].folder)
    if builder.info.file_format.value != 'array_record':
        raise ValueError(
            f'{folder} was prepared in the format {builder.info.file_format.value}, which cannot be read at random '
            f'without TensorFlow; prepare it again elsewhere: python -m combiner.data.prepare {name} --data_dir DIR'
        )
    try:
        part = builder.info.splits[split]
    except (ValueError, KeyError) as error:
        known = ', '.join(sorted(builder.info.splits))
        raise ValueError(f'no split {split!r} in {name}, which has {known}, and slices of them: {error}') from error
    if part.num_examples <= 0:
        raise ValueError(f'split {split!r} of {name} has no records; ask for a larger slice')
    for file in part.file_instructions:
        if not Path(file.filename).is_file():
            raise FileNotFoundError(f'{file.filename} of {name} is missing; delete {folder} and prepare it anew')
    return TfdsSource(builder.as_data_source(split=split), f'{name}/{split}', SETS[name].own_id)


def by_split(name: str, splits: Mapping[str, str]) -> Callable[[str, str | None], TfdsSource]:
    """The (split, data_dir) -> source of a set, whose `splits` say which of TFDS's each one is; see `open_tfds`."""

    def source(split: str, data_dir: str | None) -> TfdsSource:
        return open_tfds(name, splits[split], data_dir)

    return source


def locate(name: str, data_dir: str | None = None) -> Path:
    """Returns the folder of a prepared data set; whole or absent, as TFDS puts it there in one step when it is ready.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the set is not there; the message says how to prepare it and what trains without.
    """
    if name not in SETS:
        raise ValueError(f'unknown data set {name!r}; known: {", ".join(SETS)}')
    root = Path(default_data_dir() if data_dir is None else data_dir)
    folder = root / SETS[name].folder
    if (folder / 'dataset_info.json').is_file():
        return folder
    others = sorted(path.parent.name for path in folder.parent.glob('[0-9]*/dataset_info.json'))
    raise FileNotFoundError(
        f'data set {name} is missing: there is no {folder}'
        + (' (data_dir is not set, so that is where TFDS looks)' if data_dir is None else '')
        + (f'; version {", ".join(others)} is there, but figures on it would not compare' if others else '')
        + f'. Prepare it: python -m combiner.data.prepare {name} --data_dir {root}. What trains now, on embedded data: '
        f'python -m combiner.train --config {SETS[name].stand_in} --workdir DIR'
    )


def default_data_dir() -> str:
    """Where TFDS looks when it is not told: the environment variable TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return str(paths.local(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets', 'TFDS_DATA_DIR'))


def cache_dir() -> Path:
    """Where lies what this project made and can make again: $XDG_CACHE_HOME/combiner, else ~/.cache/combiner."""
    return paths.local(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'XDG_CACHE_HOME') / 'combiner'


def _builder(folder: Path, full_name: str) -> Any:
    """TFDS's reader of a folder, which has no code to download with."""
    import tensorflow_datasets as tfds  # here, as the import is slow and most tasks do without

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS and protobuf have many kinds
        raise ValueError(f'{folder} has a damaged description: {error}; delete it and prepare it anew') from error
    if builder.info.full_name != full_name:
        raise ValueError(f'{folder} holds {builder.info.full_name}, not {full_name}; move it to where it belongs')
    return builder
