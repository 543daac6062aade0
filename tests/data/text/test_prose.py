import importlib.util
import itertools
import subprocess
import sys

import numpy as np
import pytest

from combiner.data.text import prose

# Finding the documents takes seconds, once in a process.
pytestmark = pytest.mark.xdist_group('prose')


@pytest.fixture(scope='module')
def splits():
    return {split: list(prose.Prose(split)) for split in prose.SPLITS}


def test_it_is_a_few_megabytes_of_prose(splits):
    size = {split: sum(len(record['text']) for record in records) for split, records in splits.items()}
    assert 1.5e6 < size['train'] < 8e6
    assert 0.02 < size['validation'] / size['train'] < 0.15
    assert 0.02 < size['test'] / size['train'] < 0.15
    words = [word for record in splits['test'] for word in record['text'].split()]
    assert np.mean([word.strip('.,:;()"').isalpha() for word in words]) > 0.8
    text = '\n\n'.join(record['text'] for records in splits.values() for record in records)
    assert '\n>>> ' not in text
    assert '\n----' not in text


def test_documents_of_every_origin_are_named_and_ordered(splits):
    for split, records in splits.items():
        keys = [record['key'] for record in records]
        assert keys == sorted(set(keys))
        assert {prose.split_of(key) for key in keys} == {split}
        assert all(len(record['text']) >= 1000 for record in records)
    origins = {record['key'].partition('/')[0] for record in splits['train']}
    assert origins == {'pydoc_data', 'python', *prose.PACKAGES}


def test_the_share_of_each_split():
    split = [prose.split_of(f'package/module{index}') for index in range(10_000)]
    assert {name: round(split.count(name) / 10_000, 2) for name in prose.SPLITS} == {
        'train': 0.9,
        'validation': 0.05,
        'test': 0.05,
    }


def test_splits_share_no_paragraph_and_little_else(splits):
    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}

    paragraphs = [p for records in splits.values() for record in records for p in record['text'].split('\n\n')]
    assert len({' '.join(paragraph.split()) for paragraph in paragraphs}) == len(paragraphs)
    found = {split: set().union(*(runs(record['text']) for record in records)) for split, records in splits.items()}
    for split, other in itertools.permutations(prose.SPLITS, 2):
        if split != 'train':
            assert len(found[split] & found[other]) < 0.1 * len(found[split])
            assert all(len(runs(r['text']) & found[other]) < 0.5 * len(runs(r['text'])) for r in splits[split])


def test_a_document_is_what_the_module_says(tmp_path):
    text = 'Sentences that are long enough to be told from a heading, whatever they may say, are kept as prose here.'
    path = tmp_path / 'module.py'
    path.write_text(
        f'"""{text} First."""\n\nclass A:\n    """{text} Second.\n\n    >>> 1 + 1\n    """\n\n'
        f'    def f(self):\n        """{text} Third.\n\n        Args:\n          x: {text}\n        """\n\n'
        f'def g():\n    """{text} Fourth."""\n' + f'# """{text}"""\n' * 30,
        encoding='utf-8',
    )
    found = prose._docstrings(path)
    assert [found.count(f'{text} {word}.') for word in ('First', 'Second', 'Third', 'Fourth')] == [1] * 4
    paragraphs = [paragraph for paragraph in prose._PARAGRAPHS.split(found) if prose._is_prose(paragraph)]
    assert paragraphs == [f'{text} {word}.' for word in ('First', 'Second', 'Third', 'Fourth')]


@pytest.mark.parametrize('index', [-1, 10**6])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match=f'document {index} of'):
        prose.Prose('test')[index]


def test_any_integer_is_an_index():
    assert prose.Prose('test')[np.int64(3)]['key'] == list(prose.Prose('test'))[3]['key']


def test_unknown_split():
    with pytest.raises(ValueError, match=r"'dev' of prose; known: train, validation, test"):
        prose.Prose('dev')


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'docstrings of skimage.*pip install scikit-image'):
        prose.package_folder('skimage')


@pytest.mark.slow
def test_the_same_in_another_process_which_imports_no_package():
    program = (
        'import sys; from combiner.data.text import prose; print(prose.fingerprint()); '
        'assert not {"scipy", "sklearn", "skimage", "matplotlib"} & set(sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == prose.fingerprint()
