"""The table of corpora, and the preparation of a corpus: a tokenizer and token stores on disk.

    DATA_DIR/combiner_text/CORPUS/VOCAB/tokenizer.model, tokenizer.json, train/, validation/, test/

The text of an embedded corpus depends on installed packages. So CORPUS then contains a fingerprint
(prose-0123456789abcdef). Without DATA_DIR, its tokens go to $XDG_CACHE_HOME/combiner or ~/.cache/combiner.

If the environment variable COMBINER_CACHE names a folder, the tokenizers and tokens of all corpora go there, and
DATA_DIR may be read-only, or in a cloud store.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, SupportsIndex

from grain.sources import RandomAccessDataSource

from combiner import atomic, paths
from combiner.data import tfds_sources
from combiner.data.indices import checked, evenly_spaced
from combiner.data.task import SPLITS
from combiner.data.text import prose, token_store
from combiner.data.text.token_store import TokenStore
from combiner.data.text.tokenizer import VOCAB_SIZE, Tokenizer

CACHE = 'COMBINER_CACHE'  # environment variable: folder of tokenizers and tokens
TRAINING_TEXT_BYTES = 100_000_000  # maximum size of a tokenizer's training text
_MODEL = 'tokenizer.model'
_SAMPLED = 256  # records that represent a source
_HELD_OUT = 1000  # the validation split is one part of this many of c4/en's training split


@dataclass(frozen=True)
class Corpus:
    """A set of documents in the splits 'train', 'validation' and 'test'.

    Attributes:
        name: the key in `CORPORA`.
        documents: (split, data_dir) -> random-access source of `{'text': str or UTF-8 bytes, 'key': str}`.
        user_symbols: markup; each is one token and not part of a word, so that perplexity per word counts only words
            of the text.
        edition: returns the fingerprint of an embedded corpus, whose text depends on installed packages; None for a
            corpus in a data directory.
    """

    name: str
    documents: Callable[[str, str | None], RandomAccessDataSource]
    user_symbols: tuple[str, ...] = ()
    edition: Callable[[], str] | None = None


class Prepared(NamedTuple):
    """A corpus as tokens."""

    tokenizer: Tokenizer
    stores: dict[str, TokenStore]  # by split


class Documents:
    """Consecutive records of a source, with their text under `text`.

    Args:
        records: a source whose records have `key`.
        field: the field with the text, as str or bytes.
        start: index of the first record.
        stop: index after the last record; None for the end.
    """

    def __init__(self, records: RandomAccessDataSource, field: str = 'text', start: int = 0, stop: int | None = None):
        self._records = records
        self._field = field
        self._range = range(len(records))[start:stop]

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: SupportsIndex) -> dict:
        """Returns `{'text': str or bytes, 'key': str}`.

        Raises:
            IndexError: there is no such document.
        """
        index = checked(index, len(self), 'document')
        record = self._records[self._range[index]]
        return {'text': record[self._field], 'key': record['key']}


def _prose(split: str, data_dir: str | None) -> prose.Prose:
    del data_dir  # embedded
    return prose.Prose(split)


def _tfds(name: str, field: str = 'text') -> Callable[[str, str | None], Documents]:
    def documents(split: str, data_dir: str | None) -> Documents:
        return Documents(tfds_sources.open_tfds(name, split, data_dir), field)

    return documents


def _c4(split: str, data_dir: str | None) -> Documents:
    """Opens C4, which has two splits: our test is its validation, our validation the last 0.1 % of its training."""
    if split == 'test':
        return Documents(tfds_sources.open_tfds('c4/en', 'validation', data_dir))
    records = tfds_sources.open_tfds('c4/en', 'train', data_dir)
    border = len(records) - max(1, len(records) // _HELD_OUT)
    return Documents(records, stop=border) if split == 'train' else Documents(records, start=border)


# Guo et al. 2020. Each marker has its own line, whose line breaks belong to it.
_WIKI40B_SYMBOLS = ('\n_START_ARTICLE_\n', '\n_START_SECTION_\n', '\n_START_PARAGRAPH_\n', '_NEWLINE_')

CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus('prose', _prose, edition=prose.fingerprint),
        Corpus('wiki40b/en', _tfds('wiki40b/en'), user_symbols=_WIKI40B_SYMBOLS),
        Corpus('pg19', _tfds('pg19', 'book_text')),
        Corpus('c4/en', _c4),
    )
}


def get(name: str) -> Corpus:
    """Returns the corpus with this name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in CORPORA:
        raise ValueError(f'unknown corpus {name!r}; known: {", ".join(CORPORA)}')
    return CORPORA[name]


def prepare(corpus: Corpus, vocab_size: int = VOCAB_SIZE, data_dir: str | None = None, threads: int = 1) -> Prepared:
    """Trains a tokenizer on the training split, tokenises all splits, and opens them.

    Existing files are used, and interrupted work continues (see `token_store.build`). The tokenizer is trained on at
    most 100 MB of text: all documents, or documents that are evenly spaced over the split.

    Args:
        corpus: the corpus to prepare.
        vocab_size: of the tokenizer.
        data_dir: folder of the data sets and of the tokens; None for TFDS's default, or for an embedded corpus, a
            cache. If it is in a cloud store, the tokens need a folder of their own (see the module).
        threads: for the tokenizer.

    Raises:
        ValueError: existing files belong to other documents; the text is too small for vocab_size; a text is not
            Unicode.
        FileNotFoundError: the data set is missing.
        OSError: the tokens cannot be written, or the disk is full.
    """
    directory = folder(corpus, vocab_size, data_dir)
    sources = {split: corpus.documents(split, data_dir) for split in SPLITS}
    fingerprints = {split: fingerprint(source) for split, source in sources.items()}
    with _writing(directory, sources):
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer = _tokenizer(directory, corpus, vocab_size, sources['train'], fingerprints['train'])
        stores = {
            split: token_store.build(
                directory / split,
                source,
                tokenizer,
                name=f'{corpus.name}/{split}',
                source=fingerprints[split],
                threads=threads,
            )
            for split, source in sources.items()
        }
    return Prepared(tokenizer, stores)


@contextlib.contextmanager
def _writing(directory: Path, sources: dict[str, RandomAccessDataSource]) -> Iterator[None]:
    """Replaces errors of a full disk or a read-only folder by one line with the way out."""
    way_out = f'set the environment variable {CACHE} to a folder for tokenizers and tokens'
    try:
        yield
    except Exception as error:
        if paths.is_full(error):
            needed = sum(map(_token_bytes, sources.values()))
            raise paths.no_space(directory, 'tokens', needed, f'make room and start again, or {way_out}') from None
        if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise paths.unwritable(directory, error, way_out) from None
        raise


def _token_bytes(documents: RandomAccessDataSource) -> float:
    """Estimates the size of the tokens on disk, in bytes: half the size of the texts."""
    found = [len(_bytes(documents[index]['text'])) for index in evenly_spaced(len(documents), 16).tolist()]
    return len(documents) * sum(found) / max(1, len(found)) / 2


def folder(corpus: Corpus, vocab_size: int, data_dir: str | None) -> Path:
    """Returns the folder of a corpus's tokens; see the module's docstring."""
    if cache := os.environ.get(CACHE):
        root = paths.local(cache, CACHE)
    elif data_dir is not None:
        root = paths.parse(data_dir, 'data directory')
    elif corpus.edition:
        root = paths.cache_dir()
    else:
        root = paths.parse(tfds_sources.default_data_dir(), 'data directory')
    if not isinstance(root, Path):
        raise ValueError(
            f'tokens are read from memory-mapped files, which must be local, and {root} is a cloud path: set the '
            f'environment variable {CACHE} to a local folder for tokenizers and tokens, on every host'
        )
    name = f'{corpus.name}-{corpus.edition()}' if corpus.edition else corpus.name
    return root / 'combiner_text' / name / str(vocab_size)


def tokenizer_file(corpus: Corpus, vocab_size: int, data_dir: str | None) -> Path:
    """Returns the file of a tokenizer that `prepare` has trained; raises as `folder`."""
    return folder(corpus, vocab_size, data_dir) / _MODEL


def fingerprint(documents: RandomAccessDataSource) -> str:
    """Returns 16 digits of a SHA-256 over the number of documents and 256 evenly spaced documents."""
    digest = hashlib.sha256(json.dumps(len(documents)).encode())
    for index in evenly_spaced(len(documents), _SAMPLED).tolist():
        text = _bytes(documents[index]['text'])
        digest.update(len(text).to_bytes(8, 'little') + text)
    return digest.hexdigest()[:16]


def sample(documents: RandomAccessDataSource, most_bytes: int) -> Iterator[str]:
    """Yields the texts of evenly spaced documents: as many as `most_bytes` may hold, by the mean length of 256 of them.

    It ends before the first text that exceeds `most_bytes` in total.

    Raises:
        ValueError: a text is not UTF-8.
    """
    lengths = [len(_bytes(documents[index]['text'])) for index in evenly_spaced(len(documents), _SAMPLED).tolist()]
    count = int(most_bytes * len(lengths) / max(1, sum(lengths)))
    remaining = most_bytes
    for index in evenly_spaced(len(documents), count).tolist():
        record = documents[index]
        remaining -= len(_bytes(record['text']))
        if remaining < 0:
            return
        yield token_store.text_of(record)


def _tokenizer(
    directory: Path, corpus: Corpus, vocab_size: int, documents: RandomAccessDataSource, source: str
) -> Tokenizer:
    """Loads the tokenizer of the folder, or trains and saves it."""
    path, about = directory / _MODEL, directory / 'tokenizer.json'
    if not about.exists():  # it is written last
        tokenizer = Tokenizer.train(sample(documents, TRAINING_TEXT_BYTES), vocab_size, corpus.user_symbols)
        tokenizer.save(path)
        atomic.write_text(about, json.dumps({'tokenizer': tokenizer.fingerprint, 'source': source}) + '\n')
        return tokenizer
    tokenizer = Tokenizer.load(path)
    expected = {'tokenizer': tokenizer.fingerprint, 'source': source}
    try:
        found = json.loads(about.read_text(encoding='utf-8'))
    except ValueError as error:
        found = f'what is no JSON ({error})'
    if found != expected:
        raise ValueError(f'{about} has {found}, but expected {expected}; delete {directory} to prepare it again')
    return tokenizer


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode(errors='surrogatepass')
