"""Windows of tokens over a token store, as random-access sources, and what text stands in them.

A window is cut when it is read. Records have, beside what the classes say, `before`: int32 [7], the tokens ahead of the
first one that counts, zeros where there are none; `text_size` needs them.
"""

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int, Int32, Int64

from combiner.data.indices import checked
from combiner.data.text.token_store import TokenStore
from combiner.data.text.tokenizer import END_OF_DOCUMENT, PAD, Tokenizer

# Enough to know the character ahead of a token: if all are single bytes, up to three are of a character that is not
# complete yet, and four are the one ahead of it.
_BEFORE = 7
_DOCUMENTS = 1024  # in a block of the index of windows


class TextSize(NamedTuple):
    """How many whitespace-separated words and UTF-8 bytes of text there are."""

    words: int
    bytes: int


class Packed:
    """Windows of the stream of all documents in order, each starting `stride` tokens behind the one before.

    A window holds the end of one document, whole ones and the start of another, each followed by its end of document.
    With stride = length, the default, windows do not overlap. With less they do, and only tokens that no earlier
    window has count, as in `Cropped`: every token counts in exactly one window.

    Args:
        store: the tokens.
        length: tokens in a window; the last window may have fewer, and zeros behind them.
        stride: 1..length; None for length.

    Raises:
        ValueError: the length or the stride is out of its range.
    """

    def __init__(self, store: TokenStore, length: int, stride: int | None = None):
        self._store = store
        self._length = length
        self._stride = _checked_stride(length, stride)

    def __len__(self) -> int:
        return int(_window_count(self._store.tokens, self._length, self._stride))

    def __getitem__(self, index: SupportsIndex) -> dict:
        """Cuts a window.

        Returns:
            `{'tokens': int32 [length], 'segments': int32 [length], 'first': int, 'count': int, 'before', 'key':
            'prose/train/token8192'}`. Segments number the documents in the window from 1; 0 is behind the end of the
            stream. Tokens first..count - 1 count. The key has the number of the window's first token in the stream.

        Raises:
            IndexError: there is no such window.
        """
        index = checked(index, len(self), 'window')
        start = index * self._stride
        tokens = self._store.read(start, min(start + self._length, self._store.tokens))
        segments = np.ones(len(tokens), np.int32)
        segments[1:] += np.cumsum(tokens[:-1] == END_OF_DOCUMENT, dtype=np.int32)
        first = self._length - self._stride if index else 0
        return {
            'tokens': _padded(tokens, self._length),
            'segments': _padded(segments, self._length),
            'first': first,
            'count': len(tokens),
            'before': _before(self._store, 0, start + first),
            'key': f'{self._store.name}/token{start}',
        }


class Cropped:
    """Windows of single documents, end of document included, each starting `stride` tokens behind the one before.

    With stride = length, the default, a document of n tokens gives ceil(n / length) windows that do not overlap. With
    less they overlap, and only tokens that no earlier window has count: all tokens but those of a document's first
    window then have at least length - stride tokens of context, for (length / stride) times the work. Every token
    counts in exactly one window; documents without tokens have none.

    The index is 8 bytes for every 1,024 documents; a window is found by two binary searches.

    Args:
        store: the tokens.
        length: tokens in a window.
        stride: 1..length; None for length.

    Raises:
        ValueError: the length or the stride is out of its range.
    """

    def __init__(self, store: TokenStore, length: int, stride: int | None = None):
        self._store = store
        self._length = length
        self._stride = _checked_stride(length, stride)
        blocks = range(0, store.records, _DOCUMENTS)  # as the offsets of all documents may not fit into memory
        self._ends = np.cumsum([self._windows(first).sum() for first in blocks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> dict:
        """Cuts a window.

        Returns:
            `{'tokens': int32 [length], 'first': int, 'count': int, 'before', 'key': 'prose/test/17/512'}`. Tokens
            first..count - 1 count; zeros follow the count. The key has the number of the document in its source and
            of the window's first token in the document.

        Raises:
            IndexError: there is no such window.
        """
        index = checked(index, len(self), 'window')
        block = int(np.searchsorted(self._ends, index, 'right'))
        windows = self._windows(block * _DOCUMENTS)
        ends = np.cumsum(windows) + (self._ends[block] - windows.sum())
        position = int(np.searchsorted(ends, index, 'right'))
        number = index - int(ends[position] - windows[position])  # of the window in its document
        document = block * _DOCUMENTS + position
        begin, end = self._store.offsets[document : document + 2].tolist()
        start = begin + number * self._stride
        tokens = self._store.read(start, min(start + self._length, end))
        first = self._length - self._stride if number else 0
        return {
            'tokens': _padded(tokens, self._length),
            'first': first,
            'count': len(tokens),
            'before': _before(self._store, begin, start + first),
            'key': f'{self._store.name}/{document}/{start - begin}',
        }

    def _windows(self, first: int) -> Int64[np.ndarray, ' documents']:
        """The number of windows of each document of the block that starts with the document `first`."""
        tokens = np.diff(self._store.offsets[first : first + _DOCUMENTS + 1])
        return _window_count(tokens, self._length, self._stride)


def text_size(tokens: Int[np.ndarray, ' count'], before: Int[np.ndarray, ' before'], tokenizer: Tokenizer) -> TextSize:
    """Measures the text in a run of tokens: the words that start there, and the bytes.

    Over consecutive runs these sum up to len(text.split()) and len(text.encode()) of the documents, wherever they are
    cut: a word counts where its first character does, and a character where its last byte is. The tokenizer's markers
    are bytes, but, as ends of documents, no part of any word.

    Args:
        tokens: those that count in a window, `tokens[first:count]`; padding counts nothing.
        before: the tokens ahead of them, at least 7 or all there are; a window's record has them.
        tokenizer: the one of the store.
    """
    decoder = codecs.getincrementaldecoder('utf-8')(errors='ignore')  # `before` may start within a character
    ahead = decoder.decode(_joined(tokenizer.word_bytes, before))
    text = decoder.decode(_joined(tokenizer.word_bytes, tokens))
    goes_on = ahead and text and not ahead[-1].isspace() and not text[0].isspace()
    return TextSize(len(text.split()) - bool(goes_on), len(_joined(tokenizer.piece_bytes, tokens)))


def _checked_stride(length: int, stride: int | None) -> int:
    if length < 1:
        raise ValueError(f'a window of length {length} has no tokens')
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f'stride {stride} does not lie in 1..{length}, the length of the windows')
    return stride


def _window_count(tokens: Any, length: int, stride: int) -> Any:
    """Counts the windows that cover so many tokens in a row; an integer or an array."""
    further = -(-np.maximum(tokens - length, 0) // stride)
    return (tokens > 0) * (1 + further)


def _joined(pieces: Sequence[bytes], tokens: Int[np.ndarray, ' count']) -> bytes:
    return b''.join([pieces[index] for index in tokens.tolist()])


def _before(store: TokenStore, begin: int, start: int) -> Int32[np.ndarray, '7']:
    tokens = store.read(max(begin, start - _BEFORE), start)
    return np.pad(tokens, (_BEFORE - len(tokens), 0), constant_values=PAD)


def _padded(values: Int32[np.ndarray, ' count'], length: int) -> Int32[np.ndarray, ' length']:
    return np.pad(values, (0, length - len(values)), constant_values=PAD)
