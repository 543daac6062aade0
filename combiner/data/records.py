"""Generated data sets on disk: ARRAY_RECORD shards, written in parallel, with random access.

A set is a folder with `recipe.json` (the parameters: written first), shards of 1,000 records with names as in TFDS,
and `manifest.json` (the recipe with counts, labels, sizes and SHA-256 of all shards: written last). A folder without
a manifest is incomplete, and writing continues with the missing shards. The files do not depend on the number of
processes, and each appears only when it is complete.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int64

from combiner import atomic, paths
from combiner.data.indices import checked
from combiner.data.open_files import allow_open_files

SHARD_RECORDS = 1000  # the most that a killed process loses
RECIPE, MANIFEST = 'recipe.json', 'manifest.json'

Arrange = Callable[[int, Mapping[str, int], Callable[..., Iterable]], Mapping[str, Int64[np.ndarray, ' n']]]


@dataclass(frozen=True)
class Recipe:
    """The generator of a data set. Its functions must be importable by name, as they are sent to other processes.

    Attributes:
        name: of the set.
        version: of the generator; changes when the same seed gives other records.
        parameters: on which records depend besides the seed; JSON can store them.
        counts: number of records per split, in the order of the splits.
        arrange: (seed, counts, a parallel `map`) -> the numbers of the records in each split.
        encode: (seed, number) -> the bytes of a record.
        decode: the bytes of a record -> a dict with at least `label`; raises ValueError for other bytes.
    """

    name: str
    version: str
    parameters: Mapping[str, Any]
    counts: Mapping[str, int]
    arrange: Arrange
    encode: Callable[[int, int], bytes]
    decode: Callable[[bytes], dict[str, Any]]


@dataclass(frozen=True)
class _Shard:
    """A shard to write, and the numbers of its records."""

    path: Path
    split: str
    numbers: Int64[np.ndarray, ' n']


@dataclass
class _Instruction:
    """The fields of a shard that ArrayRecordDataSource needs in order not to open it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def write(
    directory: str | os.PathLike[str],
    recipe: Recipe,
    seed: int,
    workers: int = 1,
    progress: Callable[[int], object] = lambda records: None,
) -> dict[str, Any]:
    """Generates a set, or its missing shards, and returns its manifest.

    Args:
        directory: the folder of the set; created if needed.
        recipe: the set to generate.
        seed: 0..2**32 - 1.
        workers: number of processes; 1 uses this process.
        progress: called with the number of records of each shard that is on disk.

    Raises:
        ValueError: a number is out of its range; the folder holds another set, or a damaged shard; another process is
            writing there.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f'seed {seed} does not lie in 0..2**32 - 1')
    if workers < 1:
        raise ValueError(f'workers {workers} must be at least 1')
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        identity = _identity(recipe) | {'seed': seed, 'counts': dict(recipe.counts)}
        for file in (RECIPE, MANIFEST):
            if (directory / file).exists():
                _check_same(directory / file, identity)
        if (directory / MANIFEST).exists():
            progress(sum(recipe.counts.values()))
            return json.loads((directory / MANIFEST).read_text(encoding='utf-8'))
        atomic.write_text(directory / RECIPE, _json(identity))
        atomic.sweep(directory, seconds=0.0)
        with _parallel(workers) as in_parallel:
            splits = recipe.arrange(seed, recipe.counts, in_parallel)
            shards = [shard for split in recipe.counts for shard in _shards(directory, recipe, split, splits[split])]
            done: dict[str, list] = {split: [] for split in recipe.counts}
            jobs = itertools.repeat(recipe), itertools.repeat(seed), shards
            for shard, description in zip(shards, in_parallel(_write_shard, *jobs), strict=True):
                done[shard.split].append(description)
                progress(description['records'])
        manifest = identity | {'splits': {split: _sum_up(described) for split, described in done.items()}}
        atomic.write_text(directory / MANIFEST, _json(manifest))
    return manifest


class GeneratedSplit:
    """A random-access source of one split of a generated set.

    Opening it reads the manifest and checks the sizes of the shards; shards are opened when they are first read.
    Several threads may read at once.

    Args:
        directory: the folder of the set.
        recipe: the expected set; seed and counts may differ.
        split: a name from the recipe's counts.

    Raises:
        FileNotFoundError: there is no complete set, or a shard is missing.
        ValueError: the folder holds another set; the size of a shard differs from the manifest; the split is unknown.
    """

    def __init__(self, directory: str | os.PathLike[str], recipe: Recipe, split: str):
        self._directory = paths.parse(directory, 'data directory')
        self._recipe = recipe
        self._split = split
        manifest = read_manifest(self._directory, recipe)
        if split not in manifest['splits']:
            raise ValueError(f'unknown split {split!r} of {recipe.name}; known: {", ".join(manifest["splits"])}')
        self._shards = manifest['splits'][split]['shards']
        for shard in self._shards:
            _check_size(self._directory, recipe, shard)
        instructions = [
            _Instruction(str(self._directory / shard['file']), 0, shard['records'], shard['records'])
            for shard in self._shards
        ]
        self._length = manifest['splits'][split]['records']
        allow_open_files()
        self._records = ArrayRecordDataSource(instructions)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Returns a record: the recipe's dict, with a `key` such as 'lra_listops/train/17'.

        Raises:
            IndexError: there is no such record.
            ValueError: the record cannot be read or decoded.
        """
        index = checked(index, self._length, 'record')
        key = f'{self._recipe.name}/{self._split}/{index}'
        try:
            return {**self._recipe.decode(self._records[index]), 'key': key}
        except (ValueError, RuntimeError, OSError) as error:
            file = self._directory / self._shards[index // SHARD_RECORDS]['file']
            way_out = _way_out(self._directory, self._recipe)
            again = 'repeat the command, and if this comes again,'
            raise ValueError(f'record {key} in {file} cannot be read ({error}); {again} {way_out}') from None


def read_manifest(directory: str | os.PathLike[str], recipe: Recipe) -> dict[str, Any]:
    """Reads the manifest of a set and checks that it belongs to the recipe, with any seed and counts.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: the manifest is damaged or belongs to another set.
    """
    path = paths.parse(directory, 'data directory') / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f'{directory} has no complete {recipe.name}; run {_command(directory, recipe)}')
    return _check_same(path, _identity(recipe))


def verify(directory: str | os.PathLike[str], recipe: Recipe) -> int:
    """Reads all shards of a set and compares them with the SHA-256 in its manifest.

    Returns:
        The number of shards.

    Raises:
        FileNotFoundError: there is no manifest, or a shard is missing.
        ValueError: the folder holds another set, or a shard has changed.
    """
    directory = Path(directory)
    splits = read_manifest(directory, recipe)['splits'].values()
    shards = [shard for split in splits for shard in split['shards']]
    for shard in shards:
        _check_size(directory, recipe, shard)
        if _sha256(directory / shard['file']) != shard['sha256']:
            raise ValueError(f'{directory / shard["file"]} is corrupt (SHA-256); {_way_out(directory, recipe)}')
    return len(shards)


def _shards(directory: Path, recipe: Recipe, split: str, numbers: Int64[np.ndarray, ' n']) -> Iterator[_Shard]:
    count = -(-len(numbers) // SHARD_RECORDS)
    for shard in range(count):
        name = f'{recipe.name}-{split}.array_record-{shard:05d}-of-{count:05d}'
        yield _Shard(directory / name, split, numbers[shard * SHARD_RECORDS :][:SHARD_RECORDS])


def _write_shard(recipe: Recipe, seed: int, shard: _Shard) -> dict[str, Any]:
    """Writes a shard unless it exists, and returns its description, read from disk."""
    if not shard.path.exists():
        with atomic.replacing(shard.path) as partial:
            writer = ArrayRecordWriter(str(partial), 'group_size:1')  # records are read one at a time
            for number in shard.numbers.tolist():
                writer.write(recipe.encode(seed, number))
            writer.close()
    try:
        reader = ArrayRecordReader(str(shard.path))
        labels = Counter(recipe.decode(record)['label'] for record in reader.read_all())
        reader.close()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f'{shard.path} is corrupt ({error}); delete it and generate again') from None
    if labels.total() != len(shard.numbers):
        raise ValueError(f'{shard.path} has {labels.total()} records, not {len(shard.numbers)}; delete it')
    return {
        'file': shard.path.name,
        'records': len(shard.numbers),
        'labels': labels,
        'bytes': shard.path.stat().st_size,
        'sha256': _sha256(shard.path),
    }


def _sum_up(described: list[dict[str, Any]]) -> dict[str, Any]:
    labels = sum((Counter(shard.pop('labels')) for shard in described), Counter())
    return {
        'records': labels.total(),
        'labels': {str(label): labels[label] for label in sorted(labels)},
        'shards': described,
    }


@contextlib.contextmanager
def _parallel(workers: int) -> Iterator[Callable[..., Iterable]]:
    """Yields a `map` over spawned processes; a fork of a process with threads (JAX has some) may hang."""
    if workers == 1:
        yield map
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent) as pool:
        try:
            yield pool.map
        except BaseException:
            # Do not wait for shards, which may take minutes: incomplete ones are written again the next time.
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _follow_parent() -> None:
    """Ends a worker when its parent process is killed, and makes it ignore Ctrl-C, which the parent handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Locks a folder against a second writer; the lock is released however the process ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'another process is generating into {directory}; wait until it ends') from None
        yield
    finally:
        os.close(handle)


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Returns the values that identify a set, as JSON restores them."""
    identity = {'name': recipe.name, 'version': recipe.version, 'parameters': recipe.parameters}
    return json.loads(json.dumps(identity | {'shard_records': SHARD_RECORDS}))


def _check_same(path: paths.AnyPath, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a recipe or manifest and checks that it has the values of `identity`."""
    way_out = f'give another folder, or delete {path.parent} and generate again'
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is damaged ({error}); {way_out}') from None
    for name, value in identity.items():
        if found.get(name) != value:
            raise ValueError(f'{path} is of another set: {name} is {found.get(name)!r}, not {value!r}; {way_out}')
    return found


def _check_size(directory: paths.AnyPath, recipe: Recipe, shard: Mapping[str, Any]) -> None:
    path = directory / shard['file']
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; {_way_out(directory, recipe)}')
    size = paths.file_size(path)
    if size != shard['bytes']:
        raise ValueError(f'{path} has {size:,} bytes, not {shard["bytes"]:,}; {_way_out(directory, recipe)}')


def _command(directory: str | os.PathLike[str], recipe: Recipe) -> str:
    return f'python -m combiner.data.generate {recipe.name} --data_dir {paths.parse(directory).parent.parent}'


def _way_out(directory: paths.AnyPath, recipe: Recipe) -> str:
    return f'delete it and {directory / MANIFEST}, then run {_command(directory, recipe)} (other shards are kept)'


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1) + '\n'


def _sha256(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
