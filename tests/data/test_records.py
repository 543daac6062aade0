import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from combiner.data import records
from combiner.data.records import GeneratedSplit, Recipe

ROOT = Path(__file__).parents[2]
COUNTS = {'train': 2500, 'validation': 3, 'test': 1000}


def arrange(seed, counts, in_parallel):
    starts = itertools.accumulate(in_parallel(int, counts.values()), initial=0)
    return {split: np.arange(start, start + counts[split]) for split, start in zip(counts, starts, strict=False)}


def encode(seed, number):
    return json.dumps({'number': number, 'label': number % 2, 'noise': [seed] * (number % 50)}).encode()


def encode_slowly(seed, number):
    time.sleep(0.005)
    return encode(seed, number)


def decode(record):
    return json.loads(record)


RECIPE = Recipe('numbers', '1', {'sizes': (1, 2)}, COUNTS, arrange, encode, decode)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp('sets') / 'combiner_lra' / 'numbers'
    records.write(directory, RECIPE, seed=7)
    return directory


@pytest.fixture
def copied(written, tmp_path):
    directory = tmp_path / 'combiner_lra' / 'numbers'
    directory.mkdir(parents=True)
    for path in written.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.mark.parametrize('split', COUNTS)
def test_every_record_is_read_back(written, split):
    source = GeneratedSplit(written, RECIPE, split)
    start = int(arrange(7, COUNTS, map)[split][0])
    assert len(source) == COUNTS[split]
    for index in {0, 1, len(source) // 2, 999, len(source) - 1} & set(range(len(source))):
        number = start + index
        expected = {'number': number, 'label': number % 2, 'noise': [7] * (number % 50)}
        assert source[np.int64(index)] == expected | {'key': f'numbers/{split}/{index}'}


def test_several_threads_read_one_source(written):
    source = GeneratedSplit(written, RECIPE, 'train')
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert [record['number'] for record in pool.map(source.__getitem__, order)] == order


def test_manifest_says_what_is_there(written):
    manifest = json.loads((written / 'manifest.json').read_text())
    assert manifest | {'splits': 0} == {
        'name': 'numbers',
        'version': '1',
        'parameters': {'sizes': [1, 2]},
        'seed': 7,
        'counts': COUNTS,
        'shard_records': 1000,
        'splits': 0,
    }
    train = manifest['splits']['train']
    assert train['records'] == 2500
    assert train['labels'] == {'0': 1250, '1': 1250}
    assert [shard['records'] for shard in train['shards']] == [1000, 1000, 500]
    for shard in train['shards']:
        data = (written / shard['file']).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard['bytes'], shard['sha256'])


def test_two_processes_write_the_same_files(written, tmp_path):
    told = []
    records.write(tmp_path, RECIPE, seed=7, workers=2, progress=told.append)
    assert contents(tmp_path) == contents(written)
    assert sum(told) == sum(COUNTS.values())


def test_another_seed_writes_other_files(written, tmp_path):
    records.write(tmp_path, RECIPE, seed=8)
    assert contents(tmp_path).keys() == contents(written).keys()
    assert not set(contents(tmp_path).values()) & set(contents(written).values())


def test_writing_goes_on_with_the_shards_that_are_missing(copied, written):
    shard = copied / 'numbers-train.array_record-00001-of-00003'
    shard.unlink()
    (copied / 'manifest.json').unlink()
    (copied / 'numbers-train.array_record-00001-of-00003.writing-1').write_bytes(b'half')
    kept = copied / 'numbers-train.array_record-00000-of-00003'
    before = kept.stat().st_mtime_ns
    records.write(copied, RECIPE, seed=7)
    assert contents(copied) == contents(written)
    assert kept.stat().st_mtime_ns == before


def test_a_whole_set_is_left_alone(copied):
    before = {path: path.stat().st_mtime_ns for path in copied.iterdir()}
    told = []
    assert records.write(copied, RECIPE, seed=7, progress=told.append)['seed'] == 7
    assert {path: path.stat().st_mtime_ns for path in copied.iterdir()} == before
    assert told == [sum(COUNTS.values())]


@pytest.mark.parametrize('unfinished', [False, True])
@pytest.mark.parametrize(
    ('recipe', 'seed', 'what'),
    [
        (RECIPE, 8, 'seed is 7, not 8'),
        (replace(RECIPE, version='2'), 7, "version is '1', not '2'"),
        (replace(RECIPE, parameters={}), 7, 'parameters is'),
        (replace(RECIPE, counts={**COUNTS, 'train': 2}), 7, 'counts is'),
    ],
)
def test_a_folder_with_another_set_is_refused(copied, recipe, seed, what, unfinished):
    if unfinished:
        (copied / 'manifest.json').unlink()
    with pytest.raises(ValueError, match=rf'is of another set: {what}.*delete'):
        records.write(copied, recipe, seed)


def test_a_second_writer_is_refused(tmp_path):
    inside, go_on = threading.Event(), threading.Event()

    def waiting(seed, counts, in_parallel):
        inside.set()
        go_on.wait(60)
        return arrange(seed, counts, in_parallel)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(records.write, tmp_path, replace(RECIPE, arrange=waiting), 7)
        assert inside.wait(60)
        with pytest.raises(ValueError, match='another process is generating into'):
            records.write(tmp_path, RECIPE, 7)
        go_on.set()
        first.result()


def test_a_shard_that_is_not_of_the_set_is_not_taken(copied):
    (copied / 'manifest.json').unlink()
    shard = copied / 'numbers-validation.array_record-00000-of-00001'
    shard.write_bytes((copied / 'numbers-test.array_record-00000-of-00001').read_bytes())
    with pytest.raises(ValueError, match='has 1000 records, not 3; delete it'):
        records.write(copied, RECIPE, seed=7)


def test_no_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no complete numbers; run .*combiner\.data\.generate numbers'):
        GeneratedSplit(tmp_path / 'combiner_lra' / 'numbers', RECIPE, 'train')


def test_a_set_of_other_parameters_is_not_read(written):
    with pytest.raises(ValueError, match=r'parameters is .* not \{\'sizes\': 3\}; give another folder, or delete'):
        GeneratedSplit(written, replace(RECIPE, parameters={'sizes': 3}), 'train')


def test_a_set_of_other_counts_is_read(written):
    assert len(GeneratedSplit(written, replace(RECIPE, counts=dict.fromkeys(COUNTS, 10**6)), 'train')) == 2500


def test_unknown_split(written):
    with pytest.raises(ValueError, match="unknown split 'dev' of numbers; known: train, validation, test"):
        GeneratedSplit(written, RECIPE, 'dev')


@pytest.mark.parametrize('index', [-1, 3])
def test_index_out_of_range(written, index):
    with pytest.raises(IndexError, match=f'record {index} of 3'):
        GeneratedSplit(written, RECIPE, 'validation')[index]


def test_a_shard_of_another_size(copied):
    with (copied / 'numbers-test.array_record-00000-of-00001').open('ab') as file:
        file.write(b'more')
    with pytest.raises(ValueError, match=r'bytes, not .*; delete it and .*manifest\.json, then run python -m'):
        GeneratedSplit(copied, RECIPE, 'test')
    assert len(GeneratedSplit(copied, RECIPE, 'train')) == 2500


def test_a_missing_shard(copied):
    (copied / 'numbers-test.array_record-00000-of-00001').unlink()
    with pytest.raises(FileNotFoundError, match='is missing; delete it and'):
        GeneratedSplit(copied, RECIPE, 'test')


def test_a_corrupt_shard_is_noticed(copied):
    path = copied / 'numbers-train.array_record-00002-of-00003'
    assert records.verify(copied, RECIPE) == 5
    data = bytearray(path.read_bytes())
    for position in range(2000, 4000):
        data[position] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r'train\.array_record-00002-of-00003 is corrupt \(SHA-256\); delete it'):
        records.verify(copied, RECIPE)
    source = GeneratedSplit(copied, RECIPE, 'train')
    with pytest.raises(ValueError, match=r'record numbers/train/2\d\d\d in .*00002-of-00003 cannot be read .*delete'):
        [source[index] for index in range(2000, 2500)]
    assert source[0]['number'] == 0


def test_a_record_that_cannot_be_decoded_is_named(written):
    def refusing(record):
        raise ValueError('no digits')

    with pytest.raises(ValueError, match=r'record numbers/test/5 in .* cannot be read \(no digits\)'):
        GeneratedSplit(written, replace(RECIPE, decode=refusing), 'test')[5]


@pytest.mark.parametrize(('seed', 'workers', 'match'), [(-1, 1, 'seed -1'), (2**32, 1, 'seed'), (0, 0, 'workers 0')])
def test_numbers_out_of_range(tmp_path, seed, workers, match):
    with pytest.raises(ValueError, match=match):
        records.write(tmp_path / 'new', RECIPE, seed, workers)
    assert not (tmp_path / 'new').exists()


@pytest.mark.slow
def test_killed_at_any_moment_the_set_becomes_the_same(written, tmp_path):
    program = (
        'import sys; sys.path[:0] = sys.argv[2:]\n'
        'from dataclasses import replace\n'
        'import test_records as t\n'
        'from combiner.data import records\n'
        'if __name__ == "__main__":\n'
        '    records.write(sys.argv[1], replace(t.RECIPE, encode=t.encode_slowly), 7, workers=2)\n'
    )
    script = tmp_path / 'script.py'
    script.write_text(program)
    command = [sys.executable, str(script), str(tmp_path / 'set'), str(ROOT), str(Path(__file__).parent)]
    killed = 0
    for seconds in (4, 5, 6, 7, None):
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must end by themselves
            process.wait()
            killed += 1
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and _lives(process.pid):
                time.sleep(0.1)
            assert not _lives(process.pid)
    assert killed >= 2
    assert contents(tmp_path / 'set') == contents(written)


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
