import io
import sys
from pydoc_data import topics

import numpy as np
import pytest
import sentencepiece

from combiner.data.text import tokenizer as tk

SYMBOLS = ('\n_START_ARTICLE_\n', '_NEWLINE_', '_NEWLINE_2', 'a,"b"')
TEXTS = [
    *(topics.topics[name] for name in ('assert', 'class', 'compound', 'naming')),
    '\n_START_ARTICLE_\nFox\n_START_PARAGRAPH_\nA fox is like a dog._NEWLINE_Dogs bark; foxes do, at times.',
    'café naïve Straße → ∑ 数学 \U0001f600',
]
STRANGE = [
    '',
    ' ',
    '    ',
    '\n',
    '\t\ttabs\tand\ttabs\t',
    'line\r\nline\rline\n\n\n',
    ' leading and trailing ',
    'runs   of     spaces      ',
    '\0NUL\0\0 in\0the middle',
    '\u2581',
    'a\u2581b \u2581\u2581 c\u2581',
    '\u2585 reserved by the trainer \u2585',
    '\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 astral \U0010ffff',
    '\ufffd\ufeff\u00a0\u3000\u2028\u0085\u200b',
    'e\u0301 \u00e9 \ufb01 \u2460 \uff21 \u1e9b\u0323',  # what normalisation would change
    '<pad><unknown><end><mask><unk><s></s><0x0A><0xE2>',
    '_NEWLINE__NEWLINE_2_NEWLIN \n_START_ARTICLE_\n_START_ARTICLE_',
    '\x01\x1c\x7f\x80',
    '数学' * 50,
    'x' * 10_000,
]


@pytest.fixture(scope='module')
def model():
    return tk.Tokenizer.train(TEXTS, 600, SYMBOLS)


def random_text(rng: np.random.Generator) -> str:
    """Characters of all planes among many that mean something to SentencePiece or to the markers."""
    often = [' ', '  ', '\u2581', '\n', '\t', '\0', 'the', 'fox', '_NEWLINE_', '_', '<0x41>', '\u00e9', '\u2585']
    pieces = []
    for _ in range(rng.integers(0, 60)):
        if rng.random() < 0.7:
            pieces.append(often[rng.integers(len(often))])
        else:
            point = int(rng.integers(sys.maxunicode + 1))
            pieces.append(chr(point) if not 0xD800 <= point < 0xE000 else '?')
    return ''.join(pieces)


@pytest.mark.parametrize('text', STRANGE, ids=range(len(STRANGE)))
def test_every_text_comes_back(model, text):
    (ids,) = model.encode([text])
    assert ids.dtype == np.int32
    assert model.decode(ids) == text
    assert b''.join(model.piece_bytes[index] for index in ids) == text.encode()
    assert not set(ids.tolist()) & {tk.PAD, tk.UNKNOWN, tk.END_OF_DOCUMENT, tk.MASK}


def test_every_random_text_comes_back(model):
    texts = [random_text(np.random.default_rng([0, index])) for index in range(2000)]
    for text, ids in zip(texts, model.encode(texts, threads=2), strict=True):
        assert model.decode(ids) == text, ascii(text)


def test_every_character_comes_back(model):
    points = [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]
    text = ''.join(map(chr, points))
    assert model.decode(model.encode([text])[0]) == text


def test_texts_do_not_depend_on_their_neighbours(model):
    together = model.encode([*STRANGE, *TEXTS], threads=2)
    for text, ids in zip([*STRANGE, *TEXTS], together, strict=True):
        np.testing.assert_array_equal(ids, model.encode([text])[0])
    assert model.encode([]) == []


def test_the_first_ids_and_the_markers(model):
    assert (tk.PAD, tk.UNKNOWN, tk.END_OF_DOCUMENT, tk.MASK) == (0, 1, 2, 3)
    assert model.piece_bytes[:4] == (b'',) * 4
    assert model.vocab_size == len(model.piece_bytes) == 600
    assert all(model.piece_bytes[4:])
    assert model.user_symbols == SYMBOLS
    assert model.piece_bytes[4:8] == tuple(symbol.encode() for symbol in SYMBOLS)
    assert model.piece_bytes[8:264] == tuple(bytes([byte]) for byte in range(256))
    text = 'x'.join(SYMBOLS)
    marked = [index for index in model.encode([text])[0] if 4 <= index < 8]
    assert marked == [4, 5, 6, 7]
    assert model.without_symbols(text) == ' x x x '


def test_words_are_pieces_and_no_piece_spans_two(model):
    assert b' statement' in model.piece_bytes
    assert not [piece for piece in model.piece_bytes if b' ' in piece.strip(b' ') and piece.decode() not in SYMBOLS]


def test_training_is_deterministic_and_distinguishes_texts(model, tmp_path):
    again = tk.Tokenizer.train(iter(TEXTS), 600, SYMBOLS)
    assert again.fingerprint == model.fingerprint
    assert len(bytes.fromhex(model.fingerprint)) == 8
    assert tk.Tokenizer.train([*TEXTS, 'more'], 600, SYMBOLS).fingerprint != model.fingerprint


def test_saved_and_loaded(model, tmp_path):
    model.save(tmp_path / 'tokenizer.model')
    loaded = tk.Tokenizer.load(tmp_path / 'tokenizer.model')
    assert [path.name for path in tmp_path.iterdir()] == ['tokenizer.model']
    assert (loaded.fingerprint, loaded.user_symbols) == (model.fingerprint, model.user_symbols)
    np.testing.assert_array_equal(loaded.encode(TEXTS)[0], model.encode(TEXTS)[0])


def test_long_lines_are_cut_and_not_dropped():
    words = ' '.join(f'paragraph{index % 7}' for index in range(3000))
    assert len(words) > 2 * tk._SENTENCE_BYTES
    sentences = list(tk._sentences(words))
    assert ''.join(sentences) == words
    assert all(sentence.startswith(('paragraph', ' paragraph')) for sentence in sentences)
    assert max(len(sentence.encode()) for sentence in sentences) <= tk._SENTENCE_BYTES
    assert any(b'paragraph' in piece for piece in tk.Tokenizer.train([words], 275).piece_bytes)
    unbroken = list(tk._sentences('数' * 3000))
    assert set(''.join(unbroken)) == {'数'}
    assert max(len(sentence.encode()) for sentence in unbroken) <= tk._SENTENCE_BYTES


def test_a_text_too_small_says_which_size_works():
    with pytest.raises(ValueError, match=r'vocab_size 5000; give at most \d+') as error:
        tk.Tokenizer.train(TEXTS, 5000)
    largest = int(str(error.value).rpartition(' ')[2])
    assert tk.Tokenizer.train(TEXTS, largest).vocab_size == largest
    with pytest.raises(ValueError, match=f'give at most {largest}'):
        tk.Tokenizer.train(TEXTS, largest + 1)


def test_a_size_too_small_says_which_size_works():
    with pytest.raises(ValueError, match=r'vocab_size 200 is too small for all characters; give at least \d+') as error:
        tk.Tokenizer.train(TEXTS, 200)
    smallest = int(str(error.value).rpartition(' ')[2])
    assert tk.Tokenizer.train(TEXTS, smallest).vocab_size == smallest


@pytest.mark.parametrize('texts', [[], ['', '\n\n', '\0']])
def test_no_text(texts):
    with pytest.raises(ValueError, match='no text to train'):
        tk.Tokenizer.train(texts)


@pytest.mark.parametrize('symbol', ['', 'a b', '\u2581', 'a\0', '<mask>', '<0x0A>'])
def test_what_cannot_be_a_symbol(symbol):
    with pytest.raises(ValueError, match='cannot be a symbol'):
        tk.Tokenizer.train(TEXTS, 600, [symbol])


def test_a_symbol_twice():
    with pytest.raises(ValueError, match='must be different'):
        tk.Tokenizer.train(TEXTS, 600, ['<br>', '<br>'])


def test_half_of_a_surrogate_pair(model):
    with pytest.raises(ValueError, match=r"can't encode character '\\ud800' in position 1"):
        model.encode(['fine', 'a\ud800'])


@pytest.mark.parametrize('index', [-1, 600])
def test_ids_out_of_range(model, index):
    with pytest.raises(ValueError, match=rf'0\.\.599, got .*{index}'):
        model.decode(np.array([5, index]))


def test_bytes_that_are_no_character_are_replaced(model):
    ids = model.encode(['\U0001f600'])[0]
    assert model.decode(ids[:2]) == '\ufffd'


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        tk.Tokenizer.load(tmp_path / 'tokenizer.model')
    (tmp_path / 'tokenizer.model').write_bytes(b'something else')
    with pytest.raises(ValueError, match=r'tokenizer\.model: not a SentencePiece model'):
        tk.Tokenizer.load(tmp_path / 'tokenizer.model')


def test_a_model_that_normalises_is_refused():
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=600, byte_fallback=True, minloglevel=2
    )
    with pytest.raises(ValueError, match='not lossless'):
        tk.Tokenizer(file.getvalue())
