import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest

from combiner.data.text import token_store
from combiner.data.text.token_store import TokenStore
from combiner.data.text.tokenizer import END_OF_DOCUMENT, Tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    'One document.',
    '',
    'Another one, of\n\n  more words\tthan the first.\u3000',
    ' ',
    'caf\u00e9 \u2581 \U0001f600<br>line<br>and\u00a0the rest ',
    'x' * 3000,
    '',
    'The last.',
]


@pytest.fixture(scope='module')
def tokenizer():
    return Tokenizer.train([topics.topics['assert'], topics.topics['class']], 500, ['<br>'])


def records(texts=TEXTS):
    return [{'text': text, 'key': f'test/{index}'} for index, text in enumerate(texts)]


def build(directory, tokenizer, source_of=records, **arguments):
    arguments = {'name': 'corpus/test', 'source': 'some', 'shard_records': 3} | arguments
    return token_store.build(directory, source_of(), tokenizer, **arguments)


def expected_tokens(tokenizer):
    """What the stream is, document by document."""
    return [[*tokenizer.encode([text])[0].tolist(), END_OF_DOCUMENT] if text else [] for text in TEXTS]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize('shard_records', [1, 3, 8, 100, None])
@pytest.mark.parametrize('as_bytes', [False, True])
def test_the_stream_is_every_document_and_its_end(tokenizer, tmp_path, shard_records, as_bytes):
    texts = [text.encode() for text in TEXTS] if as_bytes else TEXTS
    store = build(tmp_path, tokenizer, lambda: records(texts), shard_records=shard_records)
    expected = expected_tokens(tokenizer)
    stream = np.concatenate(expected)
    np.testing.assert_array_equal(store.read(0, store.tokens), stream)
    np.testing.assert_array_equal(np.diff(store.offsets), [len(document) for document in expected])
    assert store.read(0, 5).dtype == np.int32
    for start in range(0, len(stream), 7):
        for stop in (start, start + 1, min(start + 500, len(stream)), len(stream)):
            np.testing.assert_array_equal(store.read(start, stop), stream[start:stop])


def test_counts(tokenizer, tmp_path):
    store = build(tmp_path, tokenizer)
    assert (store.name, store.tokenizer, store.source) == ('corpus/test', tokenizer.fingerprint, 'some')
    assert (store.records, store.empty) == (8, 2)
    assert store.tokens == sum(map(len, expected_tokens(tokenizer)))
    assert store.bytes == sum(len(text.encode()) for text in TEXTS)
    assert store.words == sum(len(text.replace('<br>', ' ').split()) for text in TEXTS)
    assert store.words != sum(len(text.split()) for text in TEXTS)  # the marker joins words


def test_ids_are_as_small_as_the_vocabulary_allows(tokenizer, tmp_path, monkeypatch):
    tokens = build(tmp_path / 'small', tokenizer).tokens
    small = sum(path.stat().st_size for path in (tmp_path / 'small').glob('tokens-*'))
    monkeypatch.setattr(tokenizer, 'vocab_size', 2**16 + 1)
    store = build(tmp_path / 'large', tokenizer)
    assert small == 2 * tokens
    assert sum(path.stat().st_size for path in (tmp_path / 'large').glob('tokens-*')) == 4 * tokens
    np.testing.assert_array_equal(store.read(0, tokens), np.concatenate(expected_tokens(tokenizer)))


@pytest.mark.parametrize(('start', 'stop'), [(-1, 2), (3, 2), (0, 10**6)])
def test_reading_what_is_not_there(tokenizer, tmp_path, start, stop):
    store = build(tmp_path, tokenizer)
    with pytest.raises(IndexError, match=f'corpus/test: tokens {start}..{stop} of {store.tokens}'):
        store.read(start, stop)


@pytest.mark.parametrize('text', [b'caf\xe9', 'half \ud800'])
def test_text_that_is_not_unicode(tokenizer, tmp_path, text):
    with pytest.raises(ValueError, match=r"record 'test/1' is not UTF-8 .*prepare the data set again"):
        build(tmp_path, tokenizer, lambda: records(['fine', text]))


@pytest.mark.parametrize('texts', [[], ['', '']])
def test_no_text_at_all(tokenizer, tmp_path, texts):
    with pytest.raises(ValueError, match=f'corpus/test has no text in its {len(texts)} records'):
        build(tmp_path, tokenizer, lambda: records(texts))


class Interrupted(list):
    """Records of which some cannot be read yet; says which were."""

    def __init__(self, fail_at=None):
        super().__init__(records())
        self.fail_at = fail_at
        self.read = []

    def __getitem__(self, index):
        if index == self.fail_at:
            raise OSError('no power')
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize(('fail_at', 'finished'), [(0, 0), (2, 0), (3, 3), (5, 3), (7, 6)])
def test_goes_on_behind_the_last_whole_shard(tokenizer, tmp_path, fail_at, finished):
    build(tmp_path / 'whole', tokenizer)
    with pytest.raises(OSError, match='no power'):
        build(tmp_path / 'resumed', tokenizer, lambda: Interrupted(fail_at))
    with pytest.raises(FileNotFoundError, match=r'resumed has no manifest\.json: build the store, or continue'):
        TokenStore(tmp_path / 'resumed')
    rest = Interrupted()
    build(tmp_path / 'resumed', tokenizer, lambda: rest)
    assert rest.read == list(range(finished, 8))
    assert contents(tmp_path / 'whole') == contents(tmp_path / 'resumed')
    untouched = Interrupted()
    build(tmp_path / 'resumed', tokenizer, lambda: untouched)
    assert not untouched.read


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
import test_token_store as tests
from combiner.data.text.tokenizer import Tokenizer

class Fatal(list):
    def __getitem__(self, index):
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

tests.build(sys.argv[1], Tokenizer.load(sys.argv[2]), lambda: Fatal(tests.records()))
"""


def test_a_killed_process_leaves_only_whole_shards(tokenizer, tmp_path):
    tokenizer.save(tmp_path / 'model')
    paths = [str(ROOT), str(Path(__file__).parent)]
    command = [sys.executable, '-c', KILLED, str(tmp_path / 'killed'), str(tmp_path / 'model'), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    names = [path.name for path in (tmp_path / 'killed').iterdir() if 'writing' not in path.name]
    shards = [f'{kind}-0000{shard}.bin' for kind in ('documents', 'tokens') for shard in (0, 1)]
    assert sorted(names) == sorted([*shards, 'plan.json'])
    rest = Interrupted()
    build(tmp_path / 'killed', tokenizer, lambda: rest)
    assert rest.read == [6, 7]
    build(tmp_path / 'whole', tokenizer)
    whole = contents(tmp_path / 'whole')
    assert {name: contents(tmp_path / 'killed')[name] for name in whole} == whole


def test_builders_at_once_do_no_harm(tokenizer, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: build(tmp_path / 'shared', tokenizer, shard_records=1), range(8)))
    build(tmp_path / 'alone', tokenizer, shard_records=1)
    assert contents(tmp_path / 'shared') == contents(tmp_path / 'alone')
    for store in stores:
        np.testing.assert_array_equal(store.read(0, store.tokens), np.concatenate(expected_tokens(tokenizer)))


@pytest.mark.parametrize('finished', [True, False])
@pytest.mark.parametrize('changed', [{'source': 'other'}, {'tokenizer': None}, {'shard_records': 2}])
def test_other_data_or_tokenizer_is_refused(tokenizer, tmp_path, finished, changed):
    if finished:
        build(tmp_path, tokenizer)
    else:
        with pytest.raises(OSError, match='no power'):
            build(tmp_path, tokenizer, lambda: Interrupted(4))
    arguments = {name: value for name, value in changed.items() if value is not None}
    if 'tokenizer' in changed:
        tokenizer = Tokenizer.train([topics.topics['assert']], 400)
    if finished and 'shard_records' in changed:
        assert build(tmp_path, tokenizer, **arguments).records == 8  # how it was cut no longer matters
        return
    with pytest.raises(ValueError, match=rf'was built with {next(iter(changed))} .*delete this one to build it again'):
        build(tmp_path, tokenizer, **arguments)


def test_opening_checks_fingerprints_only_when_told(tokenizer, tmp_path):
    build(tmp_path, tokenizer)
    assert TokenStore(tmp_path).records == TokenStore(tmp_path, tokenizer.fingerprint, 'some').records == 8
    with pytest.raises(ValueError, match=r"built with tokenizer '.*', not 'abc'"):
        TokenStore(tmp_path, 'abc')
    with pytest.raises(ValueError, match="built with source 'some', not 'abc'"):
        TokenStore(tmp_path, source='abc')


def test_a_damaged_manifest_is_named(tokenizer, tmp_path):
    build(tmp_path, tokenizer)
    (tmp_path / 'manifest.json').write_text('')
    with pytest.raises(ValueError, match=rf'{tmp_path}/manifest.json is damaged .*; delete its directory'):
        TokenStore(tmp_path)


@pytest.mark.parametrize('name', ['tokens-00001.bin', 'offsets.bin'])
def test_files_of_another_size_or_gone(tokenizer, tmp_path, name):
    build(tmp_path, tokenizer)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf'{name} has {len(whole) - 1} bytes, not the {len(whole)} of the manifest'):
        TokenStore(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        TokenStore(tmp_path)


def test_memory_and_shards_of_a_large_corpus(tokenizer, tmp_path, monkeypatch):
    assert len(list(tmp_path.iterdir())) == 0
    many = [{'text': 'word ' * (index % 5), 'key': str(index)} for index in range(3000)]
    monkeypatch.setattr(token_store, '_LEAST_RECORDS', 1)
    monkeypatch.setattr(token_store, '_BATCH_BYTES', 100)
    sizes = []
    encode = tokenizer.encode
    monkeypatch.setattr(
        tokenizer, 'encode', lambda texts, threads: sizes.append(sum(map(len, texts))) or encode(texts, threads)
    )
    store = build(tmp_path, tokenizer, lambda: many, shard_records=None)
    assert 200 < len(list(tmp_path.glob('tokens-*.bin'))) <= 256
    assert max(sizes) <= 120
    assert store.words == sum(index % 5 for index in range(3000))
    assert json.loads((tmp_path / 'manifest.json').read_text(encoding='utf-8'))['records'] == 3000


@pytest.mark.parametrize('shard_records', [0, -1])
def test_shards_without_records(tokenizer, tmp_path, shard_records):
    with pytest.raises(ValueError, match=f'shard_records {shard_records} is less than 1'):
        build(tmp_path, tokenizer, shard_records=shard_records)
