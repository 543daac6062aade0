"""Windows of tokens over a token store, as random-access sources, and the size of their text.

A window is cut when it is read. All records have `before`: int32 [7], the tokens before the first token that counts,
padded with zeros; `text_size` needs them.
"""

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Int, Int32, Int64

from combiner.data.indices import checked
from combiner.data.text.token_store import TokenStore
from combiner.data.text.tokenizer import END_OF_DOCUMENT, PAD, Tokenizer

# Enough to find the character before a token: if all are single bytes, up to three belong to an incomplete character,
# and four to the character before it.
_BEFORE = 7
_DOCUMENTS = 1024  # documents per block in the index of windows


class TextSize(NamedTuple):
    """The number of whitespace-separated words and of UTF-8 bytes in a text."""

    words: int
    bytes: int


class Packed:
    """Windows of the stream of all documents in order; each starts `stride` tokens after the one before.

    A window may hold the end of one document, whole documents and the start of another, each document followed by its
    end token. With stride = length, the default, windows do not overlap. With a smaller stride they do, and only
    tokens that are in no earlier window count, as in `Cropped`: every token counts in exactly one window.

    Args:
        store: the tokens.
        length: tokens in a window; the last window may have fewer, padded with zeros.
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
        """Returns a window.

        Returns:
            `{'tokens': int32 [length], 'segments': int32 [length], 'first': int, 'count': int, 'before', 'key':
            'prose/train/token8192'}`. Segments number the documents in the window from 1; 0 is after the end of the
            stream. Tokens first..count - 1 count. The key has the index of the window's first token in the stream.

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
    """Windows of single documents, end token included; each starts `stride` tokens after the one before.

    With stride = length, the default, a document of n tokens has ceil(n / length) windows that do not overlap. With a
    smaller stride they overlap, and only tokens that are in no earlier window count. Then all tokens except those of a
    document's first window have at least length - stride tokens of context, for (length / stride) times the work.
    Every token counts in exactly one window; documents without tokens have no windows.

    The index takes 8 bytes per 1,024 documents; two binary searches find a window.

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
        """Returns a window.

        Returns:
            `{'tokens': int32 [length], 'first': int, 'count': int, 'before', 'key': 'prose/test/17/512'}`. Tokens
            first..count - 1 count; zeros follow. The key has the index of the document in its source and of the
            window's first token in the document.

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
        """Returns the number of windows of each document in the block that starts with document `first`."""
        tokens = np.diff(self._store.offsets[first : first + _DOCUMENTS + 1])
        return _window_count(tokens, self._length, self._stride)


def text_size(tokens: Int[np.ndarray, ' count'], before: Int[np.ndarray, ' before'], tokenizer: Tokenizer) -> TextSize:
    """Counts the words that start in a run of tokens, and the bytes of its text.

    Over consecutive runs, the counts add up to len(text.split()) and len(text.encode()) of the documents, for any cut:
    a word counts where its first character counts, and a character where its last byte is. The tokenizer's markers
    count as bytes, but, like ends of documents, they are not part of a word.

    Args:
        tokens: the tokens that count in a window, `tokens[first:count]`; padding has no words and bytes.
        before: the tokens before them, at least 7 or all; a window's record has them.
        tokenizer: the tokenizer of the store.
    """
    decoder = codecs.getincrementaldecoder('utf-8')(errors='ignore')  # `before` may start within a character
    ahead = decoder.decode(_joined(tokenizer.word_bytes, before))
    text = decoder.decode(_joined(tokenizer.word_bytes, tokens))
    continues = ahead and text and not ahead[-1].isspace() and not text[0].isspace()
    return TextSize(len(text.split()) - bool(continues), len(_joined(tokenizer.piece_bytes, tokens)))


def _checked_stride(length: int, stride: int | None) -> int:
    if length < 1:
        raise ValueError(f'length {length} of windows must be at least 1')
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f'stride {stride} does not lie in 1..{length}, the length of the windows')
    return stride


def _window_count(tokens: Any, length: int, stride: int) -> Any:
    """Returns the number of windows that cover this number of consecutive tokens; an integer or an array."""
    further = -(-np.maximum(tokens - length, 0) // stride)
    return (tokens > 0) * (1 + further)


def _joined(pieces: Sequence[bytes], tokens: Int[np.ndarray, ' count']) -> bytes:
    return b''.join([pieces[index] for index in tokens.tolist()])


def _before(store: TokenStore, begin: int, start: int) -> Int32[np.ndarray, '7']:
    tokens = store.read(max(begin, start - _BEFORE), start)
    return np.pad(tokens, (_BEFORE - len(tokens), 0), constant_values=PAD)


def _padded(values: Int32[np.ndarray, ' count'], length: int) -> Int32[np.ndarray, ' length']:
    return np.pad(values, (0, length - len(values)), constant_values=PAD)
