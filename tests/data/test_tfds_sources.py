import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kit
import numpy as np
import pytest

from combiner.data import tfds_sources

TRAIN, TEST = 20, 5


def images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Three sets, of a few records each."""
    directory = tmp_path_factory.mktemp('tfds')
    kit.write_tfds(
        directory,
        'cifar10',
        {
            split: [
                {'id': f'{split}_{i:05d}', 'image': kit.png(image), 'label': i % 10}
                for i, image in enumerate(images(count))
            ]
            for split, count in {'train': TRAIN, 'test': TEST}.items()
        },
    )
    reviews = [{'text': f'It is {"good" * (i % 2)} № {i}.', 'label': i % 2} for i in range(TRAIN)]
    kit.write_tfds(directory, 'imdb_reviews/plain_text', {'train': reviews, 'test': reviews[:TEST]})
    articles = [{'wikidata_id': f'Q{i // 2}', 'text': f'_START_ARTICLE_ {i}', 'version_id': str(i)} for i in range(4)]
    kit.write_tfds(directory, 'wiki40b/en', dict.fromkeys(('train', 'validation', 'test'), articles))
    return str(directory)


@pytest.fixture
def copy(data_dir, tmp_path):
    """Copies one set to where it may be damaged; returns its folder."""

    def copied(name: str) -> Path:
        source = tfds_sources.locate(name, data_dir)
        folder = tmp_path / source.relative_to(data_dir)
        folder.mkdir(parents=True)
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return copied


@pytest.mark.parametrize('split', ['train', 'test'])
def test_images_come_back_as_they_were(data_dir, split):
    source = tfds_sources.open_tfds('cifar10', split, data_dir)
    given = images({'train': TRAIN, 'test': TEST}[split])
    assert len(source) == len(given)
    for index, record in enumerate(source):
        own = record['id'].decode()
        number = int(own.removeprefix(f'{split}_'))
        assert record['key'] == f'cifar10/{split}/{index}/{own}'
        assert record['label'] == number % 10
        assert record['image'].dtype == np.uint8
        np.testing.assert_array_equal(record['image'], given[number])


def test_texts_are_bytes(data_dir):
    records = list(tfds_sources.open_tfds('imdb_reviews', 'train', data_dir))
    numbers = sorted(int(record['text'].decode().rpartition('№ ')[2].rstrip('.')) for record in records)
    assert numbers == list(range(TRAIN))
    assert all((b'good' in record['text']) == record['label'] for record in records)
    assert [record['key'] for record in records] == [f'imdb_reviews/train/{i}' for i in range(TRAIN)]


def test_keys_are_unique_though_the_ids_of_wiki40b_are_not(data_dir):
    records = list(tfds_sources.open_tfds('wiki40b/en', 'validation', data_dir))
    assert len({record['wikidata_id'] for record in records}) == 2
    assert len({record['key'] for record in records}) == 4
    for index, record in enumerate(records):
        assert record['key'] == f'wiki40b/en/validation/{index}/{record["wikidata_id"].decode()}'


def test_slices_part_a_split(data_dir):
    whole, head, tail = (
        [record['id'] for record in tfds_sources.open_tfds('cifar10', split, data_dir)]
        for split in ('train', 'train[:90%]', f'train[{TRAIN - 2}:]')
    )
    assert len(head) == TRAIN * 9 // 10
    assert head + tail == whole
    assert tfds_sources.open_tfds('cifar10', 'train[:90%]', data_dir)[3]['key'].startswith('cifar10/train[:90%]/3/')
    assert len(tfds_sources.open_tfds('cifar10', 'train+test', data_dir)) == TRAIN + TEST


@pytest.mark.parametrize('index', [-1, TEST, 10**9])
def test_there_is_nothing_beyond_the_end(data_dir, index):
    source = tfds_sources.open_tfds('cifar10', 'test', data_dir)
    assert source[np.int64(0)]['key'].startswith('cifar10/test/0/')
    with pytest.raises(IndexError, match=f'cifar10/test/{index} of {TEST}'):
        source[index]


def test_a_source_travels_to_another_process(data_dir):
    source = tfds_sources.open_tfds('wiki40b/en', 'train', data_dir)
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_threads_read_what_one_reads(data_dir):
    source = tfds_sources.open_tfds('cifar10', 'train', data_dir)
    indices = list(np.random.default_rng(0).integers(0, TRAIN, 200))
    expected = [record['key'] for record in source]
    with ThreadPoolExecutor(8) as threads:
        assert [record['key'] for record in threads.map(source.__getitem__, indices)] == [expected[i] for i in indices]


def test_threads_may_open_first_and_nothing_is_imported_before(data_dir):
    """In a new process, as the first opening imports TFDS; which must not wait for the network either."""
    program = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from combiner.data import tfds_sources
assert 'tensorflow_datasets' not in sys.modules
def first(name):
    return tfds_sources.open_tfds(name, 'test', {data_dir!r})[0]['key']
names = ['cifar10', 'imdb_reviews', 'wiki40b/en'] * 4
with ThreadPoolExecutor(12) as threads:
    print([key.split('/test/0')[0] for key in threads.map(first, names)] == names)
assert 'tensorflow' not in sys.modules and 'tensorflow_datasets.text.wiki40b' not in sys.modules
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == 'True\n', done.stderr


def test_a_set_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as raised:
        tfds_sources.open_tfds('cifar10', 'train', str(tmp_path))
    message = str(raised.value)
    assert f'there is no {tmp_path}/cifar10/3.0.2.' in message
    assert f'python -m combiner.data.prepare cifar10 --data_dir {tmp_path}' in message
    assert '--config configs/photos.py' in message
    assert not list(tmp_path.iterdir())

    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'elsewhere'))
    with pytest.raises(FileNotFoundError, match=f'{tmp_path}/elsewhere/wiki40b/en/1.3.0 .*configs/text.py'):
        tfds_sources.open_tfds('wiki40b/en', 'train')


def test_the_default_directory(data_dir, monkeypatch):
    monkeypatch.setenv('TFDS_DATA_DIR', data_dir)
    assert len(tfds_sources.open_tfds('cifar10', 'test')) == TEST
    monkeypatch.delenv('TFDS_DATA_DIR')
    monkeypatch.setenv('HOME', '/home/someone')
    assert tfds_sources.default_data_dir() == '/home/someone/tensorflow_datasets'


def test_another_version_is_named_and_left_alone(copy, tmp_path):
    folder = copy('cifar10')
    folder.rename(folder.with_name('3.0.1'))
    with pytest.raises(FileNotFoundError, match=r'no \S+cifar10/3.0.2; version 3.0.1 exists'):
        tfds_sources.open_tfds('cifar10', 'train', str(tmp_path))
    folder.with_name('3.0.1').rename(folder)
    info = json.loads((folder / 'dataset_info.json').read_text())
    (folder / 'dataset_info.json').write_text(json.dumps({**info, 'version': '3.0.1'}))
    with pytest.raises(ValueError, match=r'holds cifar10/3.0.1, not cifar10/3.0.2'):
        tfds_sources.open_tfds('cifar10', 'train', str(tmp_path))


def test_another_file_format_is_refused(copy, tmp_path):
    info = copy('imdb_reviews') / 'dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(
        ValueError, match=r'format tfrecord, .* python -m combiner.data.prepare imdb_reviews --data_dir'
    ):
        tfds_sources.open_tfds('imdb_reviews', 'train', str(tmp_path))


def test_unknown_names_and_splits(data_dir):
    with pytest.raises(ValueError, match=r"unknown data set 'cifar11'; known: cifar10, .*c4/en"):
        tfds_sources.open_tfds('cifar11', 'train', data_dir)
    for split in ('validation', 'train[', '', f'train[:{TRAIN + 1}]', 'train[:200%]'):
        with pytest.raises(ValueError, match=r'no split .* in cifar10, which has test, train, and slices') as raised:
            tfds_sources.open_tfds('cifar10', split, data_dir)
        assert repr(split) in str(raised.value)
    for split in ('train[:0]', 'train[9:3]'):
        with pytest.raises(ValueError, match='of cifar10 has no records'):
            tfds_sources.open_tfds('cifar10', split, data_dir)


def test_a_damaged_record_is_named_and_the_others_are_read(copy, tmp_path):
    shard = copy('cifar10') / 'cifar10-train.array_record-00000-of-00001'
    source = tfds_sources.open_tfds('cifar10', 'train', str(tmp_path))
    ids = [record['id'].decode() for record in source]
    content = bytearray(shard.read_bytes())
    place = content.find(kit.png(images(TRAIN)[7])[100:140])
    assert place > 0
    content[place] ^= 1
    shard.write_bytes(content)

    source = tfds_sources.open_tfds('cifar10', 'train', str(tmp_path))
    damaged = ids.index('train_00007')
    with pytest.raises(ValueError, match=rf'record cifar10/train/{damaged} cannot be read: .*hash mismatch'):
        source[damaged]
    rest = [index for index in range(TRAIN) if index != damaged]
    assert [source[index]['id'].decode() for index in rest] == [ids[index] for index in rest]


def test_a_shard_that_was_cut_or_lost(copy, tmp_path):
    shard = copy('cifar10') / 'cifar10-train.array_record-00000-of-00001'
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(ValueError, match='record cifar10/train/0 cannot be read'):
        tfds_sources.open_tfds('cifar10', 'train', str(tmp_path))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f'{shard} of cifar10 is missing'):
        tfds_sources.open_tfds('cifar10', 'train', str(tmp_path))
    assert len(tfds_sources.open_tfds('cifar10', 'test', str(tmp_path))) == TEST


@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
@pytest.mark.parametrize('content', ['', '{"name', '{}'])
def test_a_damaged_description(copy, tmp_path, name, content):
    folder = copy('cifar10')
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf'{folder} (has a damaged description|holds )'):
        tfds_sources.open_tfds('cifar10', 'train', str(tmp_path))


@pytest.mark.parametrize('name', tfds_sources.SETS)
def test_the_version_is_the_one_that_tfds_would_prepare(name, tmp_path):
    """Otherwise `combiner.data.prepare` would prepare what is not read."""
    builder = kit.builder('imdb_reviews/plain_text' if name == 'imdb_reviews' else name, tmp_path)
    assert builder.info.full_name == tfds_sources.SETS[name].folder
    own = tfds_sources.SETS[name].own_id
    assert not own or own in builder.info.features


FULL_KIT = {
    'cifar10': {'train[:90%]': 45_000, 'train[90%:]': 5_000, 'test': 10_000},
    'imdb_reviews': {'train': 25_000, 'test': 25_000},
    'wiki40b/en': {'train': 9_075, 'validation': 504, 'test': 504},
    'pg19': {'train': 248, 'validation': 15, 'test': 15},
    'downsampled_imagenet/64x64': {'train': 2_577, 'validation': 276},
}


@pytest.mark.parametrize('name', FULL_KIT)
def test_the_whole_kit(name):
    """COMBINER_KIT names a data directory with the sets of the offline kit: the real ones in part, else stand-ins."""
    if 'COMBINER_KIT' not in os.environ:
        pytest.skip('the environment variable COMBINER_KIT names no directory with prepared sets')
    for split, count in FULL_KIT[name].items():
        source = tfds_sources.open_tfds(name, split, os.environ['COMBINER_KIT'])
        assert len(source) == count
        picked = [source[i] for i in np.linspace(0, count - 1, min(count, 200)).astype(int)]
        assert len({record['key'] for record in picked}) == len(picked)
        for record in picked:
            if 'image' in record:
                assert record['image'].shape == ((32, 32, 3) if name == 'cifar10' else (64, 64, 3))
            else:
                assert record['book_text' if name == 'pg19' else 'text'].decode().strip()
