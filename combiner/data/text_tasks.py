"""Language models and masked language models over text."""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from grain.sources import RandomAccessDataSource
from jaxtyping import Int

from combiner.data.task import Evaluation, Example, Task
from combiner.data.text import corpora, masking, windows
from combiner.data.text.tokenizer import END_OF_DOCUMENT, MASK, PAD

DOCUMENTS = ('packed', 'joined', 'cropped')
EVALUATIONS = ('stream', 'documents')
# Signs for tokens without text.
_SIGNS = {PAD: '▯', END_OF_DOCUMENT: '⏎\n', MASK: '▒'}


class _Measured:
    """Windows for evaluation: their records also have the number of `words` and `bytes` in the tokens that count."""

    def __init__(self, source: windows.Cropped | windows.Packed, tokenizer: Any):
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
    split: str,
    data_dir: str | None,
    *,
    corpus: str,
    vocab_size: int,
    length: int,
    documents: str,
    evaluation: Evaluation,
) -> RandomAccessDataSource:
    """Opens windows: for `train` as training reads them, for the other splits as the evaluation reads them."""
    if split != 'train':
        return evaluation.source(split, data_dir)
    cut = windows.Cropped if documents == 'cropped' else windows.Packed
    return cut(_prepared(corpus, vocab_size, data_dir).stores[split], length)


def _open_evaluation(
    split: str, data_dir: str | None, *, corpus: str, vocab_size: int, length: int, evaluation: str, stride: int
) -> RandomAccessDataSource:
    """Opens windows for evaluation, `stride` tokens apart: of the stream of documents, or of single documents."""
    prepared = _prepared(corpus, vocab_size, data_dir)
    cut = windows.Packed if evaluation == 'stream' else windows.Cropped
    return _Measured(cut(prepared.stores[split], length, stride), prepared.tokenizer)


def _evaluations(
    first: str, *, corpus: str, vocab_size: int, length: int, documents: str, stride: int, masked: bool
) -> dict[str, Evaluation]:
    """Returns both evaluations, the `first` one first."""
    apart = f'{stride:,} tokens apart' if stride else 'that do not overlap'
    visible = f'{"both sides" if masked else "what is before it"} in windows of {length:,} tokens {apart}'
    stream = 'of its own document in the stream of documents' if documents == 'packed' else 'of the stream of documents'
    context = {'stream': f'{visible}, {stream}', 'documents': f'{visible}, of its own document'}
    opened = functools.partial(
        _open_evaluation, corpus=corpus, vocab_size=vocab_size, length=length, stride=stride or length
    )
    return {
        name: Evaluation(functools.partial(opened, evaluation=name), context[name])
        for name in sorted(EVALUATIONS, key=lambda name: name != first)
    }


def language_model_example(record: Mapping[str, Any], packed: bool) -> Example:
    """Returns an example in which every token is a target, except padding and tokens that another window counts.

    Args:
        record: of `windows.Packed` or `windows.Cropped`, with or without `words` and `bytes`.
        packed: whether documents in a row do not attend to each other.
    """
    tokens = record['tokens']
    position = np.arange(len(tokens))
    counts = (position >= record['first']) & (position < record['count'])
    sizes = {name: np.array(record[name], np.float32) for name in ('words', 'bytes') if name in record}
    example = {'tokens': tokens, 'targets': tokens, 'weights': counts.astype(np.float32), **sizes}
    of_stream = 'segments' in record
    if packed and of_stream:
        example['segments'] = record['segments']
    elif sizes or not of_stream:
        # Not for training on the stream: only its last window has padding, of weight 0.
        example['valid'] = position < record['count']
    return example


def masked_example(record: Mapping[str, Any], packed: bool) -> Example:
    """Works as `language_model_example`; weights mark the tokens that may be masked: all but ends of documents."""
    example = language_model_example(record, packed)
    weights = example['weights'] * (example['tokens'] != END_OF_DOCUMENT)
    return {name: value for name, value in example.items() if name not in ('words', 'bytes')} | {'weights': weights}


def mask(example: Example, generator: np.random.Generator, vocab_size: int) -> Example:
    """Masks some of the tokens with weights; afterwards only the chosen tokens have weights."""
    ordinary = range(MASK + 1, vocab_size)
    tokens, weights = masking.mask_tokens(
        example['tokens'], example['weights'] > 0, generator, mask_id=MASK, ordinary=ordinary
    )
    return example | {'tokens': tokens, 'weights': weights}


def _identity(split: str, data_dir: str | None, *, corpus: str, vocab_size: int) -> dict[str, str]:
    prepared = _prepared(corpus, vocab_size, data_dir)
    return {'tokenizer': prepared.tokenizer.fingerprint, f'{split}_tokens': prepared.stores[split].fingerprint()}


def _tokenizer(data_dir: str | None, *, corpus: str, vocab_size: int) -> Path:
    return corpora.tokenizer_file(corpora.get(corpus), vocab_size, data_dir)


def _show(tokens: Int[np.ndarray, ' length'], data_dir: str | None, *, corpus: str, vocab_size: int) -> str:
    """Decodes tokens to text, with signs for masks, ends of documents and padding."""
    decode = _prepared(corpus, vocab_size, data_dir).tokenizer.decode
    signs = np.flatnonzero(np.isin(tokens, list(_SIGNS)))
    pieces = (_SIGNS.get(int(run[0]), '') + decode(run) for run in np.split(tokens, signs) if len(run))
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
    evaluation: str = 'documents',
) -> Task:
    """Returns a (masked) language model task over a corpus; the arguments after `masked` are the task's options.

    Args:
        name: of the task.
        corpus: see `corpora.CORPORA`.
        metrics: see `Task`.
        masked: whether tokens are masked and predicted from both sides.
        length: tokens in a window.
        vocab_size: number of ids of the tokenizer.
        documents: layout of documents in training: `joined` puts one after the other, each followed by its end token,
            and cuts every `length` tokens; `packed` does the same, but documents do not attend to each other;
            `cropped` gives each document its own rows.
        stride: distance of the starts of windows in evaluation, in tokens; 0 for `length`: no overlap.
        evaluation: the source of the windows of validation and of the main results: the `stream` of all documents, as
            in `joined` training, or single `documents`.

    Raises:
        ValueError: an option is out of its range.
    """
    if documents not in DOCUMENTS:
        raise ValueError(f'unknown documents={documents!r}; choose {", ".join(DOCUMENTS)}')
    if length < 2 or not 0 <= stride <= length:
        raise ValueError(f'length={length} must be at least 2, and stride={stride} in 0..{length}')
    if evaluation not in EVALUATIONS:
        raise ValueError(f'unknown evaluation={evaluation!r}; choose {" or ".join(EVALUATIONS)}')
    layout = {'corpus': corpus, 'vocab_size': vocab_size, 'length': length, 'documents': documents}
    evaluations = _evaluations(evaluation, **layout, stride=stride, masked=masked)
    packed = documents == 'packed'

    return Task(
        name=name,
        dataset=f'{corpus}, SentencePiece {vocab_size:,}',
        source=functools.partial(_open, **layout, evaluation=evaluations[evaluation]),
        transform=functools.partial(masked_example if masked else language_model_example, packed=packed),
        vocab_size=vocab_size,
        shape=(length,),
        head='masked_language_model' if masked else 'language_model',
        metrics=metrics,
        packed=packed,
        randomise=functools.partial(mask, vocab_size=vocab_size) if masked else None,
        show=functools.partial(_show, corpus=corpus, vocab_size=vocab_size),
        tokenizer=functools.partial(_tokenizer, corpus=corpus, vocab_size=vocab_size),
        context=evaluations[evaluation].context,
        evaluations=evaluations,
        identity=functools.partial(_identity, corpus=corpus, vocab_size=vocab_size),
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
