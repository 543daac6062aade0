import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from combiner.data import tfds_sources
from combiner.data.text import corpora, prose
from combiner.data.text.corpora import Corpus, Documents
from combiner.data.text.tokenizer import Tokenizer

TEXTS = {
    split: [f'Document {index} of {split} says {word} more than once, {word}.' for index in range(count)]
    for split, count, word in (('train', 300, 'apple'), ('validation', 20, 'pear'), ('test', 10, 'quince'))
}


def small(texts=TEXTS, **arguments):
    def documents(split, data_dir):
        return [{'text': text, 'key': f'{split}/{index}'} for index, text in enumerate(texts[split])]

    return Corpus('small/en', documents, **arguments)


def test_a_corpus_becomes_a_tokenizer_and_stores(tmp_path):
    prepared = corpora.prepare(small(), 320, str(tmp_path))
    assert prepared.tokenizer.vocab_size == 320
    assert list(prepared.stores) == ['train', 'validation', 'test']
    for split, store in prepared.stores.items():
        assert store.name == f'small/en/{split}'
        text = prepared.tokenizer.decode(store.read(0, store.tokens))
        assert text == ''.join(TEXTS[split])
    folder = tmp_path / 'combiner_text/small/en/320'
    assert {path.name for path in folder.iterdir()} == {'tokenizer.model', 'tokenizer.json', *corpora.SPLITS}
    assert Tokenizer.load(folder / 'tokenizer.model').fingerprint == prepared.tokenizer.fingerprint


def test_the_tokenizer_is_of_the_training_split_only(tmp_path):
    other = TEXTS | {'validation': ['\u6570' * 50], 'test': ['\u5b66' * 50]}
    tokenizers = [
        corpora.prepare(small(texts), 320, str(tmp_path / name)).tokenizer
        for name, texts in (('a', TEXTS), ('b', other))
    ]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint


def test_what_is_there_is_used(tmp_path, monkeypatch):
    first = corpora.prepare(small(), 320, str(tmp_path))
    monkeypatch.setattr(Tokenizer, 'train', lambda *_: pytest.fail('trained again'))
    again = corpora.prepare(small(), 320, str(tmp_path))
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    np.testing.assert_array_equal(again.stores['test'].read(0, 9), first.stores['test'].read(0, 9))


def test_tokens_can_be_kept_elsewhere_than_the_data(tmp_path, monkeypatch):
    data, cache = tmp_path / 'data', tmp_path / 'cache'
    data.mkdir()
    monkeypatch.setenv('COMBINER_CACHE', str(cache))
    first = corpora.prepare(small(), 320, str(data))
    assert list(data.iterdir()) == []
    monkeypatch.setattr(Tokenizer, 'train', lambda *_: pytest.fail('trained again'))
    again = corpora.prepare(small(), 320, str(data))
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert (cache / 'combiner_text/small/en/320/tokenizer.model').exists()


@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC])
@pytest.mark.parametrize('step', ['mkdir', 'tokens'])
def test_data_that_cannot_be_written_name_the_way_out(step, number, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    if step == 'mkdir':
        monkeypatch.setattr(Path, 'mkdir', fail)
    else:
        monkeypatch.setattr(corpora.token_store, 'build', fail)
    with pytest.raises(OSError, match='set the environment variable COMBINER_CACHE') as caught:
        corpora.prepare(small(), 320, str(tmp_path))
    assert caught.value.errno == number
    assert str(tmp_path) in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('split', 'file'), [('train', r'tokenizer\.json has'), ('test', 'test was built with')])
def test_other_documents_are_refused(tmp_path, split, file):
    corpora.prepare(small(), 320, str(tmp_path))
    with pytest.raises(ValueError, match=rf'{file} .*delete'):
        corpora.prepare(small(TEXTS | {split: [*TEXTS[split], 'One more.']}), 320, str(tmp_path))


def test_another_tokenizer_is_refused(tmp_path):
    corpora.prepare(small(), 320, str(tmp_path))
    Tokenizer.train(TEXTS['train'], 310).save(tmp_path / 'combiner_text/small/en/320/tokenizer.model')
    with pytest.raises(ValueError, match=r'tokenizer\.json has .* to prepare it again'):
        corpora.prepare(small(), 320, str(tmp_path))


def test_an_interrupted_training_of_the_tokenizer_is_done_again(tmp_path):
    first = corpora.prepare(small(), 320, str(tmp_path))
    (tmp_path / 'combiner_text/small/en/320/tokenizer.json').unlink()
    assert corpora.prepare(small(), 320, str(tmp_path)).tokenizer.fingerprint == first.tokenizer.fingerprint


def test_a_corpus_too_small_for_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match=r'too small for vocab_size 32000; give at most \d+'):
        corpora.prepare(small(), data_dir=str(tmp_path))


def test_where_it_lies(monkeypatch):
    embedded = small(edition=lambda: '0123')
    assert corpora.folder(small(), 500, '/data') == Path('/data/combiner_text/small/en/500')
    assert corpora.folder(embedded, 500, '/data') == Path('/data/combiner_text/small/en-0123/500')
    monkeypatch.setenv('XDG_CACHE_HOME', '/cache')
    assert corpora.folder(embedded, 500, None) == Path('/cache/combiner/combiner_text/small/en-0123/500')
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', '/home/someone')
    assert corpora.folder(embedded, 500, None) == Path('/home/someone/.cache/combiner/combiner_text/small/en-0123/500')
    monkeypatch.setenv('TFDS_DATA_DIR', '/sets')
    assert corpora.folder(small(), 500, None) == Path('/sets/combiner_text/small/en/500')


def test_fingerprint_follows_the_number_and_the_texts():
    def of(texts):
        return corpora.fingerprint([{'text': text, 'key': ''} for text in texts])

    many = [f'text {index}' for index in range(10_000)]
    assert of(many) == of([text.encode() for text in many])
    assert len(bytes.fromhex(of(many))) == 8
    others = [of(many[:-1]), of(many[1:]), of(['x', *many[1:]]), of(['ab', 'c']), of(['a', 'bc']), of([])]
    assert len({of(many), *others}) == 7


@pytest.mark.parametrize('most', [0, 1, 1000, 33_000, 10**9])
def test_a_sample_is_evenly_spaced_and_no_larger(most):
    documents = [{'text': f'{index:05d}é' * 3, 'key': ''} for index in range(2000)]
    texts = list(corpora.sample(documents, most))
    assert sum(len(text.encode()) for text in texts) <= most
    numbers = [int(text[:5]) for text in texts]
    if most == 10**9:
        assert numbers == list(range(2000))
    if most == 33_000:
        assert len(numbers) > 1500
    if most == 1000:
        assert len(numbers) == 47
        assert set(np.diff(numbers)) <= {42, 43}


def test_a_sample_of_texts_of_uneven_length_stays_below():
    documents = [{'text': 'x' * (5000 if index % 8 == 1 else 10), 'key': ''} for index in range(2048)]
    texts = list(corpora.sample(documents, 20_000))
    assert 0 < sum(map(len, texts)) <= 20_000


def test_unknown_corpus():
    with pytest.raises(ValueError, match=r"'c5'; known: prose, wiki40b/en, pg19, c4/en"):
        corpora.get('c5')


def test_a_part_of_a_source():
    records = [{'book_text': str(index), 'book_id': 3, 'key': f'k{index}'} for index in range(10)]
    part = Documents(records, 'book_text', 4, 8)
    assert [part[index] for index in range(len(part))] == [{'text': str(i), 'key': f'k{i}'} for i in range(4, 8)]
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f'document {index} of 4'):
            part[index]


@pytest.mark.parametrize(('count', 'validation'), [(3, 1), (1000, 1), (12_345, 12)])
def test_c4_holds_out_the_end_of_its_training_split(monkeypatch, count, validation):
    splits = {'train': count, 'validation': 7}

    def open_tfds(name, split, data_dir):
        assert (name, data_dir) == ('c4/en', 'somewhere')
        return [{'text': b'x', 'url': b'', 'key': f'{split}/{index}'} for index in range(splits[split])]

    monkeypatch.setattr(tfds_sources, 'open_tfds', open_tfds)
    found = {
        split: [record['key'] for record in corpora.get('c4/en').documents(split, 'somewhere')]
        for split in corpora.SPLITS
    }
    assert found['test'] == [f'validation/{index}' for index in range(7)]
    assert found['train'] + found['validation'] == [f'train/{index}' for index in range(count)]
    assert len(found['validation']) == validation


def test_the_markers_of_wiki40b(tmp_path):
    article = (
        '\n_START_ARTICLE_\nFoxes\n_START_SECTION_\nLife\n_START_PARAGRAPH_\nA fox lives in its den._NEWLINE_It sleeps.'
    )
    corpus = small({split: [article] * 3 for split in TEXTS}, user_symbols=corpora.get('wiki40b/en').user_symbols)
    prepared = corpora.prepare(corpus, 296, str(tmp_path))
    store, tokenizer = prepared.stores['test'], prepared.tokenizer
    tokens = store.read(0, store.tokens).tolist()
    assert [tokens.count(4 + index) for index in range(4)] == [3, 3, 3, 3]
    assert tokenizer.decode(np.array(tokens)) == article * 3
    assert store.words == 3 * 10  # Foxes Life A fox lives in its den. It sleeps.


@pytest.mark.slow
def test_prose_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    prepared = corpora.prepare(corpora.get('prose'), 2000)
    (found,) = (tmp_path / 'combiner/combiner_text').iterdir()
    assert found.name == f'prose-{prose.fingerprint()}'
    words = {split: sum(len(r['text'].split()) for r in prose.Prose(split)) for split in corpora.SPLITS}
    assert {split: store.words for split, store in prepared.stores.items()} == words


@pytest.mark.slow
@pytest.mark.skipif(
    'COMBINER_KIT' not in os.environ,
    reason='needs prepared Wiki-40B and PG-19 (gigabytes, no part of this project): name their folder by COMBINER_KIT',
)
@pytest.mark.parametrize(('name', 'documents'), [('wiki40b/en', 504), ('pg19', 15)])
def test_prepared_data_sets(name, documents, tmp_path):
    kit = os.environ['COMBINER_KIT']
    corpus = corpora.get(name)
    here = dataclasses.replace(corpus, documents=lambda split, _: corpus.documents(split, kit))
    prepared = corpora.prepare(here, 4000, str(tmp_path))
    store = prepared.stores['test']
    assert store.records == documents
    source = corpus.documents('test', kit)
    whole = ''.join(source[index]['text'].decode() for index in range(documents))
    assert prepared.tokenizer.decode(store.read(0, store.tokens)) == whole
    assert json.loads((tmp_path / f'combiner_text/{name}/4000/tokenizer.json').read_text(encoding='utf-8'))
