"""Language models and masked language models over text."""

import functools
import os
from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np
from grain.sources import RandomAccessDataSource
from jaxtyping import Int

from combiner.data.task import Example, Task
from combiner.data.text import corpora, masking, windows
from combiner.data.text.tokenizer import END_OF_DOCUMENT, MASK, PAD

DOCUMENTS = ('packed', 'joined', 'cropped')
# Tokens without text, as people see them.
_SIGNS = {PAD: '▯', END_OF_DOCUMENT: '⏎\n', MASK: '▒'}


class _Measured:
    """Windows whose records also tell the `words` and `bytes` that the tokens that count spell."""

    def __init__(self, source: windows.Cropped, tokenizer: Any):
        self._source = source
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> dict:
        record = self._source[index]
        counted = record['tokens'][record['first'] : record['count']]
        return record | windows.text_size(counted, record['before'], self._tokenizer)._asdict()


@functools.cache
def _prepared(corpus: str, vocab_size: int, data_dir: str | None) -> corpora.Prepared:
    return corpora.prepare(corpora.get(corpus), vocab_size, data_dir, threads=os.cpu_count() or 1)


def _open(
    split: str, data_dir: str | None, *, corpus: str, vocab_size: int, length: int, documents: str, stride: int
) -> RandomAccessDataSource:
    """Windows: to train on as `documents` says, to evaluate on of each document by itself, `stride` tokens apart."""
    prepared = _prepared(corpus, vocab_size, data_dir)
    if split != 'train':
        return _Measured(windows.Cropped(prepared.stores[split], length, stride or length), prepared.tokenizer)
    cut = windows.Cropped if documents == 'cropped' else windows.Packed
    return cut(prepared.stores[split], length)


def language_model_example(record: Mapping[str, Any], packed: bool) -> Example:
    """Every token is a target, but padding and what another window counts.

    Args:
        record: of `windows.Packed` or `windows.Cropped`, with `words` and `bytes` or without.
        packed: whether documents in a row are kept apart.
    """
    tokens = record['tokens']
    place = np.arange(len(tokens))
    if 'segments' in record:
        return {'tokens': tokens, 'targets': tokens, 'weights': (record['segments'] > 0).astype(np.float32)} | (
            {'segments': record['segments']} if packed else {}
        )
    counts = (place >= record['first']) & (place < record['count'])
    sizes = {name: np.array(record[name], np.float32) for name in ('words', 'bytes') if name in record}
    valid = place < record['count']
    return {'tokens': tokens, 'targets': tokens, 'weights': counts.astype(np.float32), 'valid': valid, **sizes}


def masked_example(record: Mapping[str, Any], packed: bool) -> Example:
    """As `language_model_example`; weights say which tokens may be masked: no ends of documents."""
    example = language_model_example(record, packed)
    weights = example['weights'] * (example['tokens'] != END_OF_DOCUMENT)
    return {name: value for name, value in example.items() if name not in ('words', 'bytes')} | {'weights': weights}


def mask(example: Example, generator: np.random.Generator, vocab_size: int) -> Example:
    """Masks tokens among those with weights; only these count then."""
    ordinary = range(MASK + 1, vocab_size)
    tokens, weights = masking.mask_tokens(
        example['tokens'], example['weights'] > 0, generator, mask_id=MASK, ordinary=ordinary
    )
    return example | {'tokens': tokens, 'weights': weights}


def _show(tokens: Int[np.ndarray, ' length'], data_dir: str | None, *, corpus: str, vocab_size: int) -> str:
    """Text with signs for the masks, the ends of documents, and the padding."""
    decode = _prepared(corpus, vocab_size, data_dir).tokenizer.decode
    places = np.flatnonzero(np.isin(tokens, list(_SIGNS)))
    pieces = (_SIGNS.get(int(run[0]), '') + decode(run) for run in np.split(tokens, places) if len(run))
    return ''.join(pieces).rstrip(_SIGNS[PAD])


def text_task(
    name: str,
    corpus: str,
    metrics: tuple[str, ...],
    masked: bool,
    *,
    length: int = 2048,
    vocab_size: int = 32_000,
    documents: str = 'joined',
    stride: int = 0,
) -> Task:
    """A language model, or a masked one, over a corpus; what follows `masked` are the task's options.

    Args:
        name: of the task.
        corpus: see `corpora.CORPORA`.
        metrics: see `Task`.
        masked: whether tokens are masked and told from both sides.
        length: tokens in a window.
        vocab_size: pieces that the tokenizer has.
        documents: how training lays them out: `joined` one after the other, each followed by its end, and cut every
            `length` tokens; `packed` the same, but no document sees another; `cropped` each in rows of its own.
        stride: how far apart windows start in evaluation; 0 for `length`: they do not overlap.

    Raises:
        ValueError: an option is out of its range.
    """
    if documents not in DOCUMENTS:
        raise ValueError(f'unknown documents={documents!r}; choose {", ".join(DOCUMENTS)}')
    if length < 2 or not 0 <= stride <= length:
        raise ValueError(f'length={length} must be at least 2, and stride={stride} in 0..{length}')
    layout = {'length': length, 'documents': documents, 'stride': stride}
    apart = f'{stride:,} tokens apart' if stride else 'that do not overlap'
    packed = documents == 'packed'

    return Task(
        name=name,
        dataset=f'{corpus}, SentencePiece {vocab_size:,}',
        source=functools.partial(_open, corpus=corpus, vocab_size=vocab_size, **layout),
        transform=functools.partial(masked_example if masked else language_model_example, packed=packed),
        vocab_size=vocab_size,
        shape=(length,),
        head='masked_language_model' if masked else 'language_model',
        metrics=metrics,
        packed=packed,
        randomise=functools.partial(mask, vocab_size=vocab_size) if masked else None,
        show=functools.partial(_show, corpus=corpus, vocab_size=vocab_size),
        context=f'{"both sides" if masked else "what is before it"} in windows of {length:,} tokens {apart}, '
        'of its own document',
    )


_BY_PIECE = ('perplexity', 'word_perplexity', 'bits_per_byte')
_BY_WORD = ('word_perplexity', 'perplexity', 'bits_per_byte')

TASKS = {
    'prose': functools.partial(text_task, 'prose', 'prose', _BY_PIECE, False),
    'prose_masked': functools.partial(text_task, 'prose_masked', 'prose', ('perplexity',), True),
    'wiki40b': functools.partial(text_task, 'wiki40b', 'wiki40b/en', _BY_PIECE, False),
    'pg19': functools.partial(text_task, 'pg19', 'pg19', _BY_WORD, False),
    'c4_masked': functools.partial(text_task, 'c4_masked', 'c4/en', ('perplexity',), True),
}
