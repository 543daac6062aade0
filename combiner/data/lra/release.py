"""Readers of the Long Range Arena's released files: ListOps, Retrieval (AAN) and Pathfinder.

The host of the release no longer exists, so nothing is downloaded. A data directory may be the folder with the files,
or contain it as the release does (`listops-1000/`, `tsv_data/`, `pathfinder32/`), also inside `lra_release/`. Memory
holds only the positions of the lines, not the files.
"""

import ast
import contextlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, SupportsIndex, SupportsInt, TypeVar

import numpy as np
from jaxtyping import Int64
from PIL import Image

from combiner import atomic, paths
from combiner.data.indices import checked
from combiner.data.lra import listops

T = TypeVar('T')

LISTOPS_FILES = {'train': 'basic_train.tsv', 'validation': 'basic_val.tsv', 'test': 'basic_test.tsv'}
RETRIEVAL_FILES = {
    'train': 'new_aan_pairs.train.tsv',
    'validation': 'new_aan_pairs.eval.tsv',
    'test': 'new_aan_pairs.test.tsv',
}
PATHFINDER_FOLDERS = {
    'easy': 'curv_baseline',
    'intermediate': 'curv_contour_length_9',
    'hard': 'curv_contour_length_14',
}
PATHFINDER_SHARES = {'train': (0, 8), 'validation': (8, 9), 'test': (9, 10)}  # tenths

# An empty image file in the release's pathfinder32.
_EMPTY = 'curv_baseline/imgs/0/sample_172.png'
_RELEASE = ('', 'lra_release', 'lra_release/lra_release')


class Lines:
    """Random access to the lines of a text file of any size, as bytes without line breaks.

    The file is read once to find the ends of its lines (8 bytes per line). If the folder is writable, they are saved
    in it as `.NAME.lines.npy`, and loaded from there unless the file has changed. Several threads may read at once.

    Args:
        path: the file.
        skip: number of lines to skip at the start.
    """

    def __init__(self, path: Path, skip: int = 0):
        self._path = path
        self._ends = _line_ends(path)
        self._skip = skip

    def __len__(self) -> int:
        return max(len(self._ends) - self._skip, 0)

    def __getitem__(self, index: SupportsIndex) -> bytes:
        index = checked(index, len(self), 'line')
        line = index + self._skip
        start = self._ends[line - 1] if line else 0
        with self._path.open('rb') as file:
            return _between(file, start, self._ends[line]).rstrip(b'\r\n')


class ListOpsFile:
    """A split of the release's ListOps.

    Args:
        data_dir: see the module.
        split: 'train', 'validation' or 'test'.

    Raises:
        FileNotFoundError: the file was not found.
        ValueError: the split is unknown, or the header of the file is not Source and Target.
    """

    def __init__(self, data_dir: str | os.PathLike[str], split: str):
        self._path = _find(data_dir, ('listops-1000', 'listops'), _of_split(LISTOPS_FILES, split), 'ListOps')
        self._lines = Lines(self._path, skip=1)
        with self._path.open(encoding='utf-8') as file:
            header = file.readline().rstrip()
        if header != listops.HEADER:
            raise ValueError(f'{self._path} begins with {header[:40]!r}, not {listops.HEADER!r}; unpack it again')

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Reads `{'source': str, 'label': int, 'key': 'basic_train.tsv/17'}`.

        Raises:
            IndexError: there is no such record.
            ValueError: the line is not a record of ListOps.
        """
        line, key = self._lines[index], f'{self._path.name}/{index.__index__()}'
        return {**listops.read_line(_text(line, key), key), 'key': key}


class RetrievalFile:
    """A split of the release's Retrieval: pairs of papers; one cites the other (label 1) or not (label 0).

    A line has a label, two ids and two texts. The release writes texts as Python's bytes literals, b'…'; plain texts
    are accepted too.

    Args:
        data_dir: see the module.
        split: 'train', 'validation' or 'test'.

    Raises:
        FileNotFoundError: the file was not found.
        ValueError: the split is unknown.
    """

    def __init__(self, data_dir: str | os.PathLike[str], split: str):
        self._path = _find(data_dir, ('tsv_data', 'aan'), _of_split(RETRIEVAL_FILES, split), 'Retrieval')
        self._lines = Lines(self._path)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Reads `{'text1': bytes, 'text2': bytes, 'label': int, 'key': 'new_aan_pairs.train.tsv/17'}`.

        Raises:
            IndexError: there is no such record.
            ValueError: the line does not have five columns, or one of them is invalid.
        """
        line, key = self._lines[index], f'{self._path.name}/{index.__index__()}'
        columns = line.split(b'\t')
        if len(columns) != 5:
            raise ValueError(
                f'record {key} has {len(columns)} columns, not label, id1, id2, text1, text2; unpack again'
            )
        label = columns[0].decode('ascii', 'replace')
        if label not in ('0', '1', '0.0', '1.0'):
            raise ValueError(f'record {key} has the label {label!r}, not 0 or 1; unpack the release again')
        texts = {f'text{number}': _bytes(columns[2 + number], key) for number in (1, 2)}
        return {**texts, 'label': int(label[0]), 'key': key}


class PathfinderFolder:
    """A split of the release's Pathfinder images of one size and difficulty.

    The release has no splits. Of its samples, in the order of the metadata files' numbers, the first eight tenths are
    for training, then a tenth each for validation and test.

    Args:
        data_dir: see the module.
        size: 32, 64, 128 or 256.
        difficulty: 'easy', 'intermediate' or 'hard'.
        split: 'train', 'validation' or 'test'.

    Raises:
        FileNotFoundError: there is no metadata.
        ValueError: a name is unknown, or a line of the metadata is invalid.
    """

    def __init__(self, data_dir: str | os.PathLike[str], size: int, difficulty: str, split: str):
        if difficulty not in PATHFINDER_FOLDERS:
            known = ', '.join(PATHFINDER_FOLDERS)
            raise ValueError(f'unknown Pathfinder difficulty {difficulty!r}; known: {known}')
        first, last = _of_split(PATHFINDER_SHARES, split)
        name = PATHFINDER_FOLDERS[difficulty]
        self._size = size
        self._folder = _find(data_dir, (f'pathfinder{size}/{name}', name), 'metadata', f'Pathfinder {size}').parent
        samples = [sample for file in _numbered(self._folder / 'metadata') for sample in _samples(file)]
        samples = [sample for sample in samples if f'{name}/{sample[0]}' != _EMPTY]
        samples = samples[len(samples) * first // 10 : len(samples) * last // 10]
        # Arrays of bytes take a tenth of the memory of Python objects.
        self._paths = np.array([path.encode() for path, _ in samples])
        self._labels = np.array([label for _, label in samples], np.uint8)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Reads `{'image': uint8 [size, size], 'label': int, 'key': 'curv_baseline/imgs/7/sample_0.png'}`.

        Raises:
            IndexError: there is no such record.
            FileNotFoundError: the image is missing.
            ValueError: the file is not an image of this size.
        """
        index = checked(index, len(self), 'image')
        path = self._folder / self._paths[index].decode()
        key = path.relative_to(self._folder.parent).as_posix()
        try:
            with Image.open(path) as file:
                image = np.array(file.convert('L'))
        except FileNotFoundError:
            raise FileNotFoundError(f'record {key} is missing: no file {path}; unpack the release again') from None
        except (OSError, SyntaxError) as error:
            raise ValueError(f'record {key} is not an image ({error}); unpack the release again') from None
        if image.shape != (self._size, self._size):
            raise ValueError(
                f'record {key} is {image.shape[0]}x{image.shape[1]}, not {self._size}x{self._size}; unpack again'
            )
        return {'image': image, 'label': int(self._labels[index]), 'key': key}


def _of_split(table: Mapping[str, T], split: str) -> T:
    if split not in table:
        raise ValueError(f'unknown split {split!r}; known: {", ".join(table)}')
    return table[split]


def _find(data_dir: str | os.PathLike[str], folders: tuple[str, ...], name: str, what: str) -> Path:
    """Returns the first existing path with this name in the folders where the release may have been unpacked."""
    folder_of_all = paths.parse(data_dir, 'data directory')
    if not isinstance(folder_of_all, Path):
        raise ValueError(
            f"data directory {str(data_dir)!r}: the release's files of {what} can be read from a local disk only; "
            'copy them to a folder of this machine, or use the generated sets (files=generated)'
        )
    candidates = [folder_of_all / release / folder / name for release in _RELEASE for folder in (*folders, '')]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    expected = ', '.join(str(candidate) for candidate in dict.fromkeys(candidates))
    raise FileNotFoundError(
        f"the release's files of {what} were not found: expected one of {expected}; unpack the Long Range Arena "
        f'release there'
    )


def _line_ends(path: Path) -> Int64[np.ndarray, ' lines']:
    """Returns the end of each line, with its line break; ignores empty lines at the end of the file."""
    kept = path.with_name(f'.{path.name}.lines.npy')
    status = path.stat()
    mark = np.array([status.st_size, status.st_mtime_ns])
    if kept.exists():
        try:
            found = np.load(kept)
        except (ValueError, EOFError):
            found = np.zeros(0, np.int64)
        if found.dtype == np.int64 and np.array_equal(found[:2], mark):
            return found[2:]
    parts, size = [], 0
    with path.open('rb') as file:
        while block := file.read(1 << 24):
            parts.append(size + 1 + np.flatnonzero(np.frombuffer(block, np.uint8) == ord('\n')))
            size += len(block)
        ends = np.concatenate([np.zeros(1, np.int64), *parts, [size]]).astype(np.int64)
        while len(ends) > 1 and not _between(file, ends[-2], ends[-1]).rstrip(b'\r\n'):
            ends = ends[:-1]
    ends = ends[1:]
    # If the folder is not writable, the ends are computed every time.
    with contextlib.suppress(OSError), atomic.replacing(kept) as partial, partial.open('wb') as file:
        np.save(file, np.concatenate([mark, ends]))
    return ends


def _between(file: BinaryIO, start: SupportsInt, end: SupportsInt) -> bytes:
    file.seek(int(start))
    return file.read(int(end) - int(start))


def _text(line: bytes, key: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'record {key} is not UTF-8 ({error}); unpack the release again') from None


def _bytes(column: bytes, key: str) -> bytes:
    """Returns the bytes of a text, which is plain or a Python bytes literal."""
    if column[:2] not in (b"b'", b'b"') or len(column) < 3 or column[-1:] != column[1:2]:
        return column
    try:
        value = ast.literal_eval(_text(column, key))
    except (SyntaxError, ValueError) as error:
        raise ValueError(f'record {key} has a text that is not a bytes literal ({error}): {column[:40]!r}…') from None
    return value


def _numbered(folder: Path) -> list[Path]:
    """Returns the metadata files in the order of their numbers."""
    files = [path for path in folder.glob('*.npy') if path.stem.isdecimal()]
    if not files:
        raise FileNotFoundError(f'{folder} has no files such as 0.npy; unpack the release again')
    return sorted(files, key=lambda path: int(path.stem))


def _samples(file: Path) -> list[tuple[str, int]]:
    """Returns path and label of each image in a metadata file, from columns 0, 1 and 3 of its lines."""
    found = []
    for number, line in zip(itertools.count(1), _text(file.read_bytes(), str(file)).splitlines(), strict=False):
        columns = line.split()
        if len(columns) < 4 or columns[3] not in ('0', '1') or '..' in line:
            raise ValueError(
                f'{file}, line {number}: expected folder, file, number and label 0 or 1, got {line[:60]!r}'
            )
        found.append((f'{columns[0]}/{columns[1]}', int(columns[3])))
    return found
