"""Lossless subword tokens: a SentencePiece unigram model (Kudo 2018) with a fallback to bytes.

Ids in order: padding, unknown (which no text produces), end of document, mask, the markers of the corpus, the 256
bytes, and the learned pieces. SentencePiece writes a space as U+2581 in its pieces; so a U+2581 of the text is
encoded as its three bytes, and nothing is lost.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int, Int32

from combiner import atomic

PAD, UNKNOWN, END_OF_DOCUMENT, MASK = range(4)
VOCAB_SIZE = 32_000

_CONTROL = ('<pad>', '<unknown>', '<end>', '<mask>')
_BYTES = tuple(f'<0x{byte:02X}>' for byte in range(256))
_SPACE = '\u2581'
# SentencePiece sums the results of its threads in their order: another number gives another model.
_TRAINING_THREADS = 4
_SENTENCE_BYTES = 4096  # SentencePiece silently drops longer ones
# Ends of sentences: line breaks, and characters that the trainer reserves for itself.
_BREAK = re.compile('[\0\t\n\r\u2581\u2585]+')


class Tokenizer:
    """A tokenizer of text to ids and back; create one by `train` or `load`.

    Attributes:
        fingerprint: the first 16 hexadecimal digits of the SHA-256 of the model.
        vocab_size: ids are 0..vocab_size - 1.
        user_symbols: the markers; each is one id, anywhere in a text.
        piece_bytes: the UTF-8 bytes of every id, b'' for the first four; joined, the bytes of a text's ids are the
            text. The ids of single bytes may be parts of a character.
        word_bytes: the same, but a space for the end of document and the markers, which separate words.

    Args:
        model: a model of `train`, as bytes.

    Raises:
        ValueError: the bytes are not such a model.
    """

    def __init__(self, model: bytes):
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            pieces = [self._processor.id_to_piece(index) for index in range(self._processor.vocab_size())]
            first_byte = pieces.index(_BYTES[0])
        except (RuntimeError, ValueError) as error:
            raise ValueError('not a SentencePiece model with a fallback to bytes; train the tokenizer again') from error
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        self.vocab_size = len(pieces)
        self.user_symbols = tuple(pieces[len(_CONTROL) : first_byte])
        learned = pieces[first_byte + len(_BYTES) :]
        self.piece_bytes = (
            *[b''] * len(_CONTROL),
            *(symbol.encode() for symbol in self.user_symbols),
            *(bytes([byte]) for byte in range(256)),
            *(piece.replace(_SPACE, ' ').encode() for piece in learned),
        )
        symbols = range(len(_CONTROL), first_byte)
        self.word_bytes = tuple(
            b' ' if index == END_OF_DOCUMENT or index in symbols else piece
            for index, piece in enumerate(self.piece_bytes)
        )
        self._space = np.array([first_byte + byte for byte in _SPACE.encode()], np.int32)
        longest_first = sorted(self.user_symbols, key=len, reverse=True)
        self._markers = re.compile('|'.join(map(re.escape, longest_first))) if longest_first else None
        probe = f' a  b\n\t{_SPACE}\u00e9 '
        if tuple(pieces[: len(_CONTROL)]) != _CONTROL or self.decode(self.encode([probe])[0]) != probe:
            raise ValueError('this SentencePiece model is not lossless, or has other control symbols; train it again')

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = VOCAB_SIZE, user_symbols: Sequence[str] = ()) -> 'Tokenizer':
        """Trains on all lines of the texts; the same texts in the same order give the same model.

        Time and memory grow with the text: give a part of a large corpus. Lines over 4,096 bytes are cut at a space.

        Args:
            texts: documents, of the training split only.
            vocab_size: number of ids, control symbols, markers and bytes (260 without markers) included.
            user_symbols: markup that is never cut into smaller pieces.

        Raises:
            ValueError: there is no text; the text is too small for vocab_size, or vocab_size too small for the text's
                characters (the message has a size that works); or a symbol is not allowed.
        """
        _check_symbols(user_symbols)
        sentences = (sentence for text in texts for sentence in _sentences(text))
        first = next(sentences, None)
        if first is None:
            raise ValueError('there is no text to train a tokenizer on; give documents with text')
        file = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.chain([first], sentences),
                model_writer=file,
                model_type='unigram',
                vocab_size=vocab_size,
                pad_id=PAD,
                unk_id=UNKNOWN,
                eos_id=END_OF_DOCUMENT,
                bos_id=-1,
                pad_piece=_CONTROL[PAD],
                unk_piece=_CONTROL[UNKNOWN],
                eos_piece=_CONTROL[END_OF_DOCUMENT],
                control_symbols=[_CONTROL[MASK]],
                user_defined_symbols=list(user_symbols),
                byte_fallback=True,
                normalization_rule_name='identity',
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=_SENTENCE_BYTES,
                train_extremely_large_corpus=True,  # 64-bit indices: no limit of text, the same pieces
                num_threads=_TRAINING_THREADS,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise _explained(error, vocab_size) from error
        return cls(file.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> 'Tokenizer':
        """Reads a saved model.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not such a model.
        """
        try:
            return cls(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error

    def save(self, path: str | Path) -> None:
        """Writes the model, atomically."""
        with atomic.replacing(Path(path)) as temporary:
            temporary.write_bytes(self._model)

    def encode(self, texts: Sequence[str], threads: int = 1) -> list[Int32[np.ndarray, ' tokens']]:
        """Converts each text to ids, without an end of document; `decode` inverts it exactly.

        Args:
            texts: any valid Unicode.
            threads: number of texts that are processed at once.

        Raises:
            ValueError: a text has half of a surrogate pair, which UTF-8 cannot encode.
        """
        parts = [part for text in texts for part in text.split(_SPACE)]
        try:
            runs = iter(self._processor.encode(parts, return_type='numpy', num_threads=threads))
        except TypeError:
            for text in texts:
                text.encode()  # raises a ValueError that names the character
            raise
        encoded = []
        for text in texts:
            spaces = text.count(_SPACE)
            run = next(runs)
            if spaces:
                rest = itertools.islice(runs, spaces)
                run = np.concatenate([run, *itertools.chain.from_iterable((self._space, part) for part in rest)])
            encoded.append(run)
        return encoded

    def decode(self, ids: Int[np.ndarray, ' tokens']) -> str:
        """Converts ids to text; bytes that are not UTF-8, which a model may sample, become U+FFFD.

        Raises:
            ValueError: an id is not in 0..vocab_size - 1.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f'ids must be in 0..{self.vocab_size - 1}, got {ids.min()}..{ids.max()}')
        return b''.join([self.piece_bytes[index] for index in ids.tolist()]).decode(errors='replace')

    def without_symbols(self, text: str) -> str:
        """Replaces each of `user_symbols` by a space, so that only words remain."""
        return self._markers.sub(' ', text) if self._markers else text


def _sentences(text: str) -> Iterator[str]:
    for line in _BREAK.split(text):
        rest = line.encode()
        while len(rest) > _SENTENCE_BYTES:
            cut = rest.rfind(b' ', 1, _SENTENCE_BYTES)
            cut = cut if cut > 0 else _SENTENCE_BYTES
            yield rest[:cut].decode(errors='ignore')
            # Drops the rest of a character that was cut in two.
            rest = rest[cut:].lstrip(bytes(range(0x80, 0xC0)))
        if rest:
            yield rest.decode()


def _check_symbols(symbols: Sequence[str]) -> None:
    for symbol in symbols:
        if not symbol or set(symbol) & {' ', _SPACE, '\0'} or symbol in (*_CONTROL, *_BYTES):
            raise ValueError(f'{symbol!r} cannot be a symbol: it is empty, reserved, or has a space, U+2581 or NUL')
    if len(set(symbols)) < len(symbols):
        raise ValueError(f'symbols must be different, got {list(symbols)}')


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    """Returns a readable error for the trainer's error about vocab_size, with a size that works."""
    if largest := re.search(r'value <= (\d+)', str(error)):
        return ValueError(f'the text is too small for vocab_size {vocab_size}; give at most {largest[1]}')
    if smallest := re.search(r'required_chars\. \d+ vs (\d+)', str(error)):
        return ValueError(f'vocab_size {vocab_size} is too small for all characters; give at least {smallest[1]}')
    return error
