"""Data sets of TensorFlow Datasets (TFDS) with random access, without TensorFlow and without downloads.

`combiner.data.prepare` writes them in TFDS's own layout, DIR/NAME[/CONFIG]/VERSION, in the format ARRAY_RECORD: of
TFDS's formats, only this one has random access without TensorFlow. The description of the records is in the same
folder, so TFDS's builders are not imported. Only the version in `SETS` is read, so that results can be compared; other
versions are ignored.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

from combiner import paths
from combiner.data.open_files import allow_open_files

_IMAGES, _TEXT = 'configs/photos.py', 'configs/text.py'


@dataclass(frozen=True)
class TfdsSet:
    """One prepared data set.

    Attributes:
        folder: its folder in the data directory; also its full name in TFDS, NAME[/CONFIG]/VERSION.
        own_id: the feature with the set's own id of a record; '' if there is none.
        stand_in: a config with embedded data of the same kind.
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

# The arguments for the config that trains on a set of TFDS.
CONFIGS = {
    'cifar10': ['configs/cifar10.py'],
    'imdb_reviews': ['configs/lra.py:task=text'],
    'downsampled_imagenet/64x64': ['configs/imagenet64.py'],
    'imagenet_resized/64x64': ['configs/imagenet64.py', '--config.task=imagenet_resized64'],
    'wiki40b/en': ['configs/wiki40b.py'],
    'pg19': ['configs/pg19.py'],
    'c4/en': ['configs/c4_mlm.py'],
}


class TfdsSource:
    """A random-access source of one split; it holds no records and opens a shard when it is first read.

    Several threads may read it, and it can be pickled to another process.
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
            TFDS's features (text as bytes, images as uint8 [height, width, channels], labels as int) and `key`:
            'cifar10/train[:90%]/17/train_16399', the set, the split, the index and the set's own id, if it has one.
            The index makes the key unique: Wiki-40B has several articles with one `wikidata_id`.

        Raises:
            IndexError: there is no such record.
            ValueError: the record is damaged, or its file is missing.
        """
        index = index.__index__()
        key = f'{self._prefix}/{index}'
        if not 0 <= index < len(self):
            raise IndexError(f'record {key} of {len(self)}')
        try:
            record = self._records[index]
        except Exception as error:  # of many kinds: from the file, its compression, the record's fields or an image
            raise ValueError(
                f'record {key} cannot be read: {error}; repeat the command, and if this comes again, delete the data '
                'set and prepare it again'
            ) from error
        if self._own_id:
            own = record[self._own_id]
            key = f'{key}/{own.decode() if isinstance(own, bytes) else own}'
        return record | {'key': key}


def open_tfds(name: str, split: str, data_dir: str | None = None) -> TfdsSource:
    """Opens a split of a prepared data set.

    The first call in a process is slower, as it imports tensorflow_datasets.

    Args:
        name: from `SETS`.
        split: a split or an expression of TFDS: 'train', 'train[:90%]', 'train[48000:]', 'train+test'.
        data_dir: the data directory; None for `default_data_dir()`.

    Raises:
        ValueError: the name or the split is unknown, the split is empty, the set has another format than ARRAY_RECORD,
            or its description is damaged or of another set.
        FileNotFoundError: the set (in this version) or one of its files is missing.
    """
    folder = locate(name, data_dir)
    builder = _builder(folder, SETS[name].folder)
    if builder.info.file_format.value != 'array_record':
        raise ValueError(
            f'{folder} was prepared in the format {builder.info.file_format.value}, which has no random access '
            f'without TensorFlow; prepare it in another folder: python -m combiner.data.prepare {name} --data_dir DIR'
        )
    try:
        part = builder.info.splits[split]
    except (ValueError, KeyError) as error:
        known = ', '.join(sorted(builder.info.splits))
        raise ValueError(f'no split {split!r} in {name}, which has {known}, and slices of them: {error}') from error
    if part.num_examples <= 0:
        raise ValueError(f'split {split!r} of {name} has no records; choose a larger slice')
    present = {path.name for path in folder.iterdir()}  # one request to a cloud store, for any number of files
    for file in part.file_instructions:
        if os.path.basename(file.filename) not in present:
            raise FileNotFoundError(f'{file.filename} of {name} is missing; delete {folder} and prepare it again')
    allow_open_files()
    return TfdsSource(builder.as_data_source(split=split), f'{name}/{split}', SETS[name].own_id)


def by_split(name: str, splits: Mapping[str, str]) -> Callable[[str, str | None], TfdsSource]:
    """Returns the function (split, data_dir) -> source of a set; `splits` maps our splits to those of `open_tfds`."""

    def source(split: str, data_dir: str | None) -> TfdsSource:
        return open_tfds(name, splits[split], data_dir)

    return source


def locate(name: str, data_dir: str | None = None) -> paths.AnyPath:
    """Returns the folder of a prepared data set, which is complete: TFDS creates it in one step.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the set is missing; the message says how to prepare it and which config needs no data set.
    """
    if name not in SETS:
        raise ValueError(f'unknown data set {name!r}; known: {", ".join(SETS)}')
    root = paths.parse(default_data_dir() if data_dir is None else data_dir, 'data directory')
    folder = root / SETS[name].folder
    if (folder / 'dataset_info.json').is_file():
        return folder
    others = sorted(path.parent.name for path in folder.parent.glob('[0-9]*/dataset_info.json'))
    raise FileNotFoundError(
        f'data set {name} is missing: there is no {folder}'
        + (' (data_dir is not set, so this is the default of TFDS)' if data_dir is None else '')
        + (f'; version {", ".join(others)} exists, but results on it would not compare' if others else '')
        + f'. Prepare it: python -m combiner.data.prepare {name} --data_dir {root}. Or train on embedded data: '
        f'python -m combiner.train --config {SETS[name].stand_in} --workdir DIR'
    )


def default_data_dir() -> str:
    """Returns TFDS's default data directory: the environment variable TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return str(paths.parse(given_data_dir(), 'TFDS_DATA_DIR'))


def given_data_dir() -> str:
    """Returns the same as the user wrote it."""
    return os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'


def _builder(folder: paths.AnyPath, full_name: str) -> Any:
    """Returns TFDS's reader of a folder, which cannot download."""
    import tensorflow_datasets as tfds  # here, as the import is slow and most tasks do not need it

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS and protobuf have many kinds
        raise ValueError(f'{folder} has a damaged description: {error}; delete it and prepare it again') from error
    if builder.info.full_name != full_name:
        raise ValueError(f'{folder} holds {builder.info.full_name}, not {full_name}; move it to its own folder')
    return builder
