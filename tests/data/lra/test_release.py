import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from combiner.data.lra import listops, release

PAIRS = [
    b"1.0\ta\tb\tb'one \\xc3\\xa9\\t\\'x\\''\tb\"it's\"",
    b'0.0\tc\td\tplain text\tb is no bytes',
    b"1\te\tf\tb''\t",
    '0\tg\th\tnaïve\tb'.encode(),
]
READ = [
    {'text1': b"one \xc3\xa9\t'x'", 'text2': b"it's", 'label': 1},
    {'text1': b'plain text', 'text2': b'b is no bytes', 'label': 0},
    {'text1': b'', 'text2': b'', 'label': 1},
    {'text1': 'naïve'.encode(), 'text2': b'b', 'label': 0},
]


@pytest.mark.parametrize('end', [b'\n', b'\r\n'])
@pytest.mark.parametrize('last', [True, False])
def test_lines_of_any_kind(tmp_path, end, last):
    lines = [b'first', b'', b'a\rb', b'x' * 10_000, 'ü'.encode()]
    path = tmp_path / 'file.tsv'
    path.write_bytes(end.join(lines) + (end if last else b''))
    found = release.Lines(path)
    assert [found[np.int64(index)] for index in range(len(found))] == lines
    assert list(release.Lines(path, skip=2)) == lines[2:]
    with pytest.raises(IndexError, match='line 5 of 5'):
        found[5]
    with pytest.raises(IndexError, match='line -1 of 5'):
        found[-1]


@pytest.mark.parametrize('text', [b'', b'\n', b'one', b'one\n\n\n'])
def test_few_lines(tmp_path, text):
    path = tmp_path / 'file.tsv'
    path.write_bytes(text)
    assert list(release.Lines(path)) == [b'one'] * text.count(b'one')
    assert not len(release.Lines(path, skip=3))


def test_the_beginnings_of_lines_are_searched_for_once(tmp_path, monkeypatch):
    path = tmp_path / 'file.tsv'
    path.write_bytes(b'one\ntwo\n')
    assert list(release.Lines(path)) == [b'one', b'two']
    monkeypatch.setattr(release.np, 'flatnonzero', None)
    assert list(release.Lines(path)) == [b'one', b'two']
    monkeypatch.undo()
    path.write_bytes(b'one\ntwo\nthree\n')
    assert list(release.Lines(path)) == [b'one', b'two', b'three']
    (tmp_path / '.file.tsv.lines.npy').write_bytes(b'damaged')
    assert list(release.Lines(path)) == [b'one', b'two', b'three']
    assert sorted(file.name for file in tmp_path.iterdir()) == ['.file.tsv.lines.npy', 'file.tsv']


def test_a_file_is_not_held(tmp_path):
    path = tmp_path / 'file.tsv'
    path.write_bytes((b'x' * 10_000 + b'\n') * 3_000)
    release.Lines(path)
    tracemalloc.start()
    lines = release.Lines(path)
    assert lines[2_999] == b'x' * 10_000
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_several_threads_read_one_file(tmp_path):
    path = tmp_path / 'file.tsv'
    path.write_text('\n'.join(map(str, range(2000))))
    lines = release.Lines(path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda index: int(lines[index]), range(2000))) == list(range(2000))


@pytest.mark.parametrize('folder', ['', 'listops-1000', 'lra_release/lra_release/listops-1000'])
def test_listops(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(3):
        tokens = listops.generate(0, index)
        records.append({'source': listops.write_source(tokens), 'label': listops.evaluate(tokens)})
    listops.write_tsv(tmp_path / folder / 'basic_val.tsv', records)
    source = release.ListOpsFile(tmp_path, 'validation')
    assert list(source) == [record | {'key': f'basic_val.tsv/{index}'} for index, record in enumerate(records)]


def test_listops_with_another_header(tmp_path):
    (tmp_path / 'basic_test.tsv').write_text('( ( ( [SM 1 ) 2 ) ] )\t3\n')
    with pytest.raises(ValueError, match=r"begins with '\( \( .*, not 'Source"):
        release.ListOpsFile(tmp_path, 'test')


@pytest.mark.parametrize(('split', 'name'), [('train', 'train'), ('validation', 'eval'), ('test', 'test')])
def test_retrieval(tmp_path, split, name):
    (tmp_path / f'new_aan_pairs.{name}.tsv').write_bytes(b'\n'.join(PAIRS) + b'\n')
    source = release.RetrievalFile(tmp_path, split)
    keys = [{'key': f'new_aan_pairs.{name}.tsv/{index}'} for index in range(len(PAIRS))]
    assert list(source) == [record | key for record, key in zip(READ, keys, strict=True)]


@pytest.mark.parametrize(
    ('line', 'match'),
    [
        (b'1\ta\tb\ttext', 'has 4 columns'),
        (b'2\ta\tb\ttext\ttext', "has the label '2'"),
        (b"1\ta\tb\tb'\\x4'\ttext", 'is not a bytes literal'),
        (b"1\ta\tb\tb'a' + f()+b'b'\ttext", 'is not a bytes literal'),
        (b"1\ta\tb\tb'\xff'\ttext", 'is not UTF-8'),
    ],
)
def test_a_line_that_is_no_pair(tmp_path, line, match):
    (tmp_path / 'new_aan_pairs.train.tsv').write_bytes(PAIRS[0] + b'\n' + line + b'\n')
    source = release.RetrievalFile(tmp_path, 'train')
    with pytest.raises(ValueError, match=rf'record new_aan_pairs\.train\.tsv/1 .*{match}'):
        source[1]


@pytest.fixture
def pathfinder(tmp_path):
    """Twelve metadata files of ten images each, in the release's form; the last ten are not there."""
    folder = tmp_path / 'pathfinder32' / 'curv_contour_length_9'
    (folder / 'metadata').mkdir(parents=True)
    for batch in range(12):
        lines = [f'imgs/{batch} sample_{n}.png {n} {n % 2} 1.0 9 3 2 0.5 1 1' for n in range(10)]
        (folder / 'metadata' / f'{batch}.npy').write_text('\n'.join(lines) + '\n')
        (folder / 'imgs' / str(batch)).mkdir(parents=True)
        for n in range(10 if batch < 11 else 0):
            Image.fromarray(np.full((32, 32), 10 * batch + n, np.uint8)).save(folder / f'imgs/{batch}/sample_{n}.png')
    return tmp_path


def test_pathfinder(pathfinder):
    splits = {
        name: release.PathfinderFolder(pathfinder, 32, 'intermediate', name) for name in release.PATHFINDER_SHARES
    }
    assert {name: len(split) for name, split in splits.items()} == {'train': 96, 'validation': 12, 'test': 12}
    for place, record in enumerate([*splits['train'], *splits['validation']]):
        batch, number = divmod(place, 10)
        assert record['key'] == f'curv_contour_length_9/imgs/{batch}/sample_{number}.png'
        assert record['label'] == number % 2
        assert record['image'].shape == (32, 32)
        assert record['image'].dtype == np.uint8
        assert (record['image'] == place).all()
    with pytest.raises(IndexError, match='image 96 of 96'):
        splits['train'][96]


def test_pathfinder_images_that_are_not_as_they_should_be(pathfinder):
    folder = pathfinder / 'pathfinder32' / 'curv_contour_length_9' / 'imgs' / '0'
    (folder / 'sample_1.png').write_bytes(b'')
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder / 'sample_2.png')
    source = release.PathfinderFolder(pathfinder, 32, 'intermediate', 'train')
    with pytest.raises(ValueError, match=r'record curv_contour_length_9/imgs/0/sample_1\.png is not an image'):
        source[1]
    with pytest.raises(ValueError, match=r'sample_2\.png is 64x64, not 32x32'):
        source[2]
    test = release.PathfinderFolder(pathfinder, 32, 'intermediate', 'test')
    with pytest.raises(FileNotFoundError, match=r'record curv_contour_length_9/imgs/11/sample_9\.png is missing'):
        test[11]


def test_the_empty_image_of_the_release_is_left_out(pathfinder):
    folder = pathfinder / 'pathfinder32' / 'curv_contour_length_9'
    folder.rename(folder.with_name('curv_baseline'))
    metadata = folder.with_name('curv_baseline') / 'metadata' / '0.npy'
    metadata.write_text('imgs/0 sample_172.png 172 1\n' + metadata.read_text())
    assert release.PathfinderFolder(pathfinder, 32, 'easy', 'train')[0]['key'] == 'curv_baseline/imgs/0/sample_0.png'


@pytest.mark.parametrize('line', ['imgs/0 sample_0.png 0', 'imgs/0 sample_0.png 0 7', '.. x.png 0 1', ''])
def test_metadata_that_is_not_as_it_should_be(pathfinder, line):
    metadata = pathfinder / 'pathfinder32' / 'curv_contour_length_9' / 'metadata' / '3.npy'
    metadata.write_text(f'imgs/3 sample_0.png 0 1\n{line}\n')
    with pytest.raises(ValueError, match=r'3\.npy, line 2: expected folder, file, number and label'):
        release.PathfinderFolder(pathfinder, 32, 'intermediate', 'train')


@pytest.mark.parametrize(
    ('opened', 'expected'),
    [
        (release.ListOpsFile, 'basic_train.tsv'),
        (release.RetrievalFile, 'new_aan_pairs.train.tsv'),
        (lambda d, s: release.PathfinderFolder(d, 128, 'hard', s), 'pathfinder128/curv_contour_length_14/metadata'),
    ],
)
def test_files_that_are_not_there_and_unknown_splits(tmp_path, opened, expected):
    with pytest.raises(FileNotFoundError, match=rf'expected one of .*{tmp_path}/.*{expected}.*unpack the Long Range'):
        opened(tmp_path, 'train')
    with pytest.raises(ValueError, match="unknown split 'dev'; known: train, validation, test"):
        opened(tmp_path, 'dev')


def test_unknown_difficulty(tmp_path):
    with pytest.raises(ValueError, match="difficulty 'medium'; known: easy"):
        release.PathfinderFolder(tmp_path, 32, 'medium', 'train')
