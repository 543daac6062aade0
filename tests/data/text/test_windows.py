import itertools
from pydoc_data import topics

import numpy as np
import pytest

from combiner.data.text import prose, token_store, windows
from combiner.data.text.token_store import TokenStore
from combiner.data.text.tokenizer import END_OF_DOCUMENT, Tokenizer
from combiner.data.text.windows import Cropped, Packed, text_size


class Stored(TokenStore):
    """Documents of given numbers of tokens, ends included; tokens count up from 10."""

    def __init__(self, lengths):
        self.name = 'numbers'
        self.records = len(lengths)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.tokens = int(self.offsets[-1])
        self.stream = np.arange(10, 10 + self.tokens, dtype=np.int32)
        self.stream[self.offsets[1:][np.asarray(lengths) > 0] - 1] = END_OF_DOCUMENT

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.tokens
        return self.stream[start:stop].copy()

    def documents(self):
        return [self.stream[start:stop] for start, stop in itertools.pairwise(self.offsets)]


RANDOM = np.random.default_rng(0).integers(2, 12, 1200) * np.random.default_rng(1).integers(0, 2, 1200)
LENGTHS = {
    'one': [5],
    'exact': [8, 16, 24, 8],
    'mixed': [1, 0, 0, 9, 8, 7, 0, 31, 1, 17],
    'empty ends': [0, 0, 10, 0],
    'block': [0] * 1023 + [4, 0, 20],
    'many': RANDOM.tolist(),
}
of_lengths = pytest.mark.parametrize('lengths', LENGTHS.values(), ids=LENGTHS.keys())


@of_lengths
@pytest.mark.parametrize('length', [1, 7, 8, 1000])
def test_packed_windows_are_the_stream_cut(lengths, length):
    store = Stored(lengths)
    packed = list(Packed(store, length))
    assert len(packed) == len(Packed(store, length)) == -(-store.tokens // length)
    tokens = np.concatenate([record['tokens'] for record in packed])
    np.testing.assert_array_equal(tokens[: store.tokens], store.stream)
    assert not tokens[store.tokens :].any()
    numbers = np.repeat(np.arange(len(lengths)), lengths)  # of each token's document, empty ones left out
    for index, record in enumerate(packed):
        assert record['tokens'].dtype == record['segments'].dtype == np.int32
        assert record['key'] == f'numbers/token{index * length}'
        here = numbers[index * length : (index + 1) * length]
        expected = np.unique(here, return_inverse=True)[1] + 1
        np.testing.assert_array_equal(record['segments'], np.pad(expected, (0, length - len(here))))


@of_lengths
@pytest.mark.parametrize('length', [1, 7, 8, 1000])
def test_cropped_windows_are_each_document_cut(lengths, length):
    store = Stored(lengths)
    found = list(Cropped(store, length))
    assert len(found) == len(Cropped(store, length))
    expected = [
        (f'numbers/{number}/{start}', document[start : start + length])
        for number, document in enumerate(store.documents())
        for start in range(0, len(document), length)
    ]
    assert [record['key'] for record in found] == [key for key, _ in expected]
    for record, (_, tokens) in zip(found, expected, strict=True):
        assert (record['first'], record['count']) == (0, len(tokens))
        assert record['tokens'].dtype == np.int32
        np.testing.assert_array_equal(record['tokens'], np.pad(tokens, (0, length - len(tokens))))


@of_lengths
@pytest.mark.parametrize(('length', 'stride'), [(8, 1), (8, 3), (8, 7), (20, 10), (9, 8)])
def test_overlapping_windows_of_the_stream_count_every_token_once_with_context(lengths, length, stride):
    store = Stored(lengths)
    found = list(Packed(store, length, stride))
    assert len(found) == len(Packed(store, length, stride))
    counted = [record['tokens'][record['first'] : record['count']] for record in found]
    np.testing.assert_array_equal(np.concatenate(counted), store.stream)
    assert all(map(len, counted))
    for number, record in enumerate(found):
        start = number * stride
        np.testing.assert_array_equal(record['tokens'][: record['count']], store.stream[start : start + length])
        assert record['first'] == (length - stride if number else 0)
        assert ((record['segments'] > 0) == (np.arange(length) < record['count'])).all()


@of_lengths
@pytest.mark.parametrize(('length', 'stride'), [(8, 1), (8, 3), (8, 7), (20, 10), (9, 8)])
def test_overlapping_windows_count_every_token_once_with_context(lengths, length, stride):
    store = Stored(lengths)
    found = list(Cropped(store, length, stride))
    counted = [record['tokens'][record['first'] : record['count']] for record in found]
    np.testing.assert_array_equal(np.concatenate(counted), store.stream)
    assert all(map(len, counted))
    documents = store.documents()
    for record in found:
        _, number, start = record['key'].split('/')
        document, start = documents[int(number)], int(start)
        assert start % stride == 0
        np.testing.assert_array_equal(record['tokens'][: record['count']], document[start : start + length])
        assert record['first'] == (length - stride if start else 0)
    assert len({record['key'] for record in found}) == len(found)


@of_lengths
@pytest.mark.parametrize('source', [lambda s: Packed(s, 5), lambda s: Cropped(s, 5), lambda s: Cropped(s, 20, 3)])
def test_before_is_what_comes_ahead_of_what_counts(lengths, source):
    store = Stored(lengths)
    cut = source(store)
    for record in cut:
        first = int(record.get('first', 0))
        assert record['before'].shape == (7,)
        assert record['before'].dtype == np.int32
        if isinstance(cut, Packed):
            begin, start = 0, int(record['key'].removeprefix('numbers/token'))
        else:
            _, number, offset = record['key'].split('/')
            begin = int(store.offsets[int(number)])
            start = begin + int(offset) + first
        expected = store.stream[max(begin, start - 7) : start]
        np.testing.assert_array_equal(record['before'], np.pad(expected, (7 - len(expected), 0)))


@pytest.mark.parametrize('source', [Packed(Stored([3, 5, 9]), 4), Cropped(Stored([3, 5, 9]), 4)])
def test_index(source):
    assert source[np.int64(1)]['key'] == source[1]['key']
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f'window {index} of {len(source)}'):
            source[index]


def test_bad_lengths():
    with pytest.raises(ValueError, match='length 0 of windows must be at least 1'):
        Packed(Stored([3]), 0)
    for stride in (0, 9, -1):
        with pytest.raises(ValueError, match=rf'stride {stride} does not lie in 1\.\.8'):
            Cropped(Stored([3]), 8, stride)


def sizes(source, tokenizer):
    """Sums over windows of words and bytes."""
    found = [
        text_size(record['tokens'][record.get('first', 0) : record.get('count')], record['before'], tokenizer)
        for record in source
    ]
    return tuple(np.sum(found, axis=0))


STRANGE = [
    'word',
    ' leading and  trailing \n',
    '\u3000\u3000wide\u3000spaces\u3000\u2003between\u2028words\x85and\x1clines\xa0',
    '\U0001f600 \U0001f600\U0001f468 \u2581 a\u2581b',
    '',
    '   ',
    'x<br>y <br> z<br><br>',
    'joined',
]


@pytest.fixture(scope='module')
def tokenizer():
    return Tokenizer.train([topics.topics['assert'], topics.topics['class']], 500, ['<br>'])


@pytest.mark.parametrize('length', [1, 2, 3, 5, 100])
def test_words_and_bytes_of_windows_sum_up_to_those_of_strange_texts(tokenizer, tmp_path, length):
    records = [{'text': text, 'key': str(index)} for index, text in enumerate(STRANGE)]
    store = token_store.build(tmp_path, records, tokenizer, name='strange', source='')
    whole = (
        sum(len(text.replace('<br>', ' ').split()) for text in STRANGE),
        sum(len(text.encode()) for text in STRANGE),
    )
    assert (store.words, store.bytes) == whole
    for source in (Packed(store, length), Cropped(store, length), Cropped(store, length, max(1, length // 2))):
        assert sizes(source, tokenizer) == whole


@pytest.mark.parametrize('seed', range(5))
def test_words_and_bytes_at_any_cuts_of_random_texts(tokenizer, seed):
    rng = np.random.default_rng(seed)
    characters = [' ', '\u3000', '\x85', '\n', 'a', 'the', '\u00e9', '\U0001f600', '\u2028', '<br>', '\u2581']
    text = ''.join(rng.choice(characters, 300))
    tokens = tokenizer.encode([text])[0]
    cuts = [0, *sorted(rng.integers(0, len(tokens), 200)), len(tokens)]
    found = [
        text_size(tokens[start:stop], tokens[max(0, start - 7) : start], tokenizer)
        for start, stop in itertools.pairwise(cuts)
    ]
    assert sum(size.words for size in found) == len(text.replace('<br>', ' ').split())
    assert sum(size.bytes for size in found) == len(text.encode())


@pytest.mark.xdist_group('prose')
def test_words_and_bytes_of_windows_sum_up_to_those_of_prose(tmp_path):
    records = prose.Prose('test')
    tokenizer = Tokenizer.train([record['text'] for record in records][:8], 500)
    store = token_store.build(tmp_path, records, tokenizer, name='prose/test', source='')
    texts = [record['text'] for record in records]
    whole = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    for source in (Cropped(store, 7), Cropped(store, 64, 50), Packed(store, 128)):
        assert sizes(source, tokenizer) == whole
    by_document = [0] * len(texts)
    for record in Cropped(store, 64):
        size = text_size(record['tokens'][: record['count']], record['before'], tokenizer)
        by_document[int(record['key'].split('/')[2])] += size.words
    assert by_document == [len(text.split()) for text in texts]


def test_the_index_is_small():
    source = Cropped(Stored([20] * 100_000), 8)
    assert source._ends.nbytes <= 8 * 100
    assert windows._DOCUMENTS == 1024
    assert len(source) == 300_000
    assert source[299_999]['key'] == 'numbers/99999/16'
