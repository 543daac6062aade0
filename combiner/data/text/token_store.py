"""A split of a corpus as tokens: written once to disk as flat arrays, read through memory maps.

The files of a directory, in little-endian byte order:

- `plan.json`: the parameters; written first. `manifest.json`: parameters and results; written last.
- `tokens-00017.bin` for every shard of consecutive records: the ids of its documents, each followed by an end of
  document; uint16 if the vocabulary has at most 65,536 ids, else uint32.
- `documents-00017.bin`: three uint32 for every record of the shard: its number of tokens (with the end of document; 0
  for an empty record), UTF-8 bytes and words. A shard with this file is complete.
- `offsets.bin`: one int64 for every record, the start of its tokens, and one more for the end of the last record.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from grain.sources import RandomAccessDataSource
from jaxtyping import Int32

from combiner import atomic
from combiner.data.indices import evenly_spaced
from combiner.data.text.tokenizer import END_OF_DOCUMENT, Tokenizer

_OFFSET = np.dtype('<i8')
_COUNT = np.dtype('<u4')
_COUNTS = ('tokens', 'bytes', 'words')  # the columns of documents-*.bin
# Every shard is a file that stays open; a kill loses the work on one shard.
_MOST_SHARDS = 256
_LEAST_RECORDS = 4096
_BATCH_RECORDS = 1024
_BATCH_BYTES = 2**23
_RUN = 4096  # tokens of a run in a fingerprint; also the number of runs


class TokenStore:
    """A complete store, opened by `build` or by its directory; several threads may read it.

    Opening takes a few system calls per shard, for any size; pages are read when they are used.

    Attributes:
        name: name given to `build`, such as 'prose/test'.
        tokenizer: fingerprint of the tokenizer.
        source: fingerprint of the records, given to `build`.
        records: number of records; document i is the i-th of the source.
        empty: number of records without text, and so without tokens.
        tokens: number of tokens, ends of documents included.
        bytes: number of UTF-8 bytes of all texts.
        words: number of whitespace-separated words of all texts, without the tokenizer's markers.
        offsets: int64 [records + 1]; document i is the tokens offsets[i] to offsets[i + 1].

    Args:
        directory: folder of the store.
        tokenizer: expected fingerprint of the tokenizer; None for any.
        source: expected fingerprint of the records; None for any.

    Raises:
        FileNotFoundError: there is no complete store, or a file is missing.
        ValueError: the store has another fingerprint, or the size of a file differs from the manifest.
    """

    def __init__(self, directory: str | Path, tokenizer: str | None = None, source: str | None = None):
        directory = Path(directory)
        manifest = _read_json(directory / 'manifest.json')
        if manifest is None:
            raise FileNotFoundError(f'{directory} has no manifest.json: build the store, or continue its building')
        _expect(directory, manifest, tokenizer=tokenizer, source=source)
        self.name: str = manifest['name']
        self.tokenizer: str = manifest['tokenizer']
        self.source: str = manifest['source']
        self.records: int = manifest['records']
        self.empty: int = manifest['empty']
        self.tokens: int = manifest['tokens']
        self.bytes: int = manifest['bytes']
        self.words: int = manifest['words']
        self.offsets = _memory_map(directory / 'offsets.bin', _OFFSET, self.records + 1)
        dtype = np.dtype(manifest['dtype'])
        sizes = manifest['shard_tokens']
        self._shards = [_memory_map(_tokens_path(directory, index), dtype, size) for index, size in enumerate(sizes)]
        self._starts = np.cumsum([0, *sizes])

    def read(self, start: int, stop: int) -> Int32[np.ndarray, ' count']:
        """Returns a copy of the tokens start..stop - 1 of the stream of all documents in order.

        Raises:
            IndexError: the stream is shorter, or start > stop.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f'{self.name}: tokens {start}..{stop} of {self.tokens}')
        result = np.empty(stop - start, np.int32)
        shard = int(np.searchsorted(self._starts, start, 'right')) - 1
        done = 0
        while done < len(result):
            first = start + done - int(self._starts[shard])
            piece = self._shards[shard][first : first + len(result) - done]
            result[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1
        return result

    def fingerprint(self) -> str:
        """Returns 16 hexadecimal digits of a SHA-256 over the numbers of records and tokens, and the tokens.

        Above 16 million tokens, it uses 4,096 evenly spaced runs of 4,096 tokens.
        """
        digest = hashlib.sha256(json.dumps([self.records, self.tokens]).encode())
        for run in evenly_spaced(-(-self.tokens // _RUN), _RUN).tolist():
            digest.update(self.read(run * _RUN, min((run + 1) * _RUN, self.tokens)).tobytes())
        return digest.hexdigest()[:16]


def build(
    directory: str | Path,
    records: RandomAccessDataSource,
    tokenizer: Tokenizer,
    *,
    name: str,
    source: str,
    threads: int = 1,
    shard_records: int | None = None,
) -> TokenStore:
    """Tokenises all records into `directory`, unless the store is complete, and opens it.

    After a kill, the next call continues after the last complete shard. Several processes may build the same store at
    once: all write the same files, in any order. Memory holds one batch of 8 MB of text, for any size of the corpus. On
    a terminal it shows a progress bar.

    Args:
        directory: folder of the store; created if it is missing.
        records: a source of `{'text': str or UTF-8 bytes, 'key': str}`.
        tokenizer: converts texts to ids.
        name: of the store; the keys of its windows contain it.
        source: fingerprint of the records.
        threads: for the tokenizer.
        shard_records: records in a shard; the default gives at most 256 shards.

    Raises:
        ValueError: the directory holds a complete or incomplete store of other data; a text is not Unicode; there is
            no text; shard_records is less than 1.
    """
    if shard_records is not None and shard_records < 1:
        raise ValueError(f'shard_records {shard_records} is less than 1')
    directory = Path(directory)
    total = len(records)
    default = max(_LEAST_RECORDS, -(-total // _MOST_SHARDS))
    plan = {
        'name': name,
        'tokenizer': tokenizer.fingerprint,
        'source': source,
        'records': total,
        'shard_records': default if shard_records is None else shard_records,
        'dtype': '<u2' if tokenizer.vocab_size <= 2**16 else '<u4',
    }
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / 'manifest.json').exists():
        started = _read_json(directory / 'plan.json')
        if started is None:
            _write_json(directory / 'plan.json', plan)
        else:
            _expect(directory, started, **plan)
        _build_shards(directory, records, tokenizer, plan, threads)
        _write_manifest(directory, plan)
    return TokenStore(directory, tokenizer.fingerprint, source)


def _build_shards(
    directory: Path, records: RandomAccessDataSource, tokenizer: Tokenizer, plan: dict[str, Any], threads: int
) -> None:
    atomic.sweep(directory)
    with tqdm.tqdm(total=plan['records'], desc=plan['name'], unit='document', dynamic_ncols=True, disable=None) as bar:
        for shard in range(_shard_count(plan)):
            start = shard * plan['shard_records']
            stop = min(start + plan['shard_records'], plan['records'])
            if _documents_path(directory, shard).exists():
                bar.update(stop - start)
                continue
            # Renamed in the reverse order: the documents file, which marks the shard as complete, comes last.
            with (
                atomic.replacing(_documents_path(directory, shard)) as documents_path,
                atomic.replacing(_tokens_path(directory, shard)) as tokens_path,
                documents_path.open('wb') as documents,
                tokens_path.open('wb') as tokens,
            ):
                for texts, counts in _batches(records, tokenizer, start, stop):
                    for text, ids, count in zip(texts, tokenizer.encode(texts, threads), counts, strict=True):
                        if text:
                            tokens.write(np.append(ids, END_OF_DOCUMENT).astype(plan['dtype']).tobytes())
                            count[0] = len(ids) + 1
                    documents.write(np.array(counts, _COUNT).tobytes())
                    bar.update(len(texts))


def _batches(
    records: RandomAccessDataSource, tokenizer: Tokenizer, start: int, stop: int
) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Yields batches of texts, with [0, bytes, words] for each; large enough for the threads, small in memory."""
    texts, counts, held = [], [], 0
    for index in range(start, stop):
        text = text_of(records[index])
        size = len(text.encode())
        texts.append(text)
        counts.append([0, size, len(tokenizer.without_symbols(text).split())])
        held += size
        if len(texts) == _BATCH_RECORDS or held > _BATCH_BYTES:
            yield texts, counts
            texts, counts, held = [], [], 0
    if texts:
        yield texts, counts


def text_of(record: dict) -> str:
    """Returns a record's text as str.

    Raises:
        ValueError: its bytes are not UTF-8, or UTF-8 cannot encode its characters.
    """
    text = record['text']
    try:
        if isinstance(text, bytes):
            return text.decode()
        text.encode()
    except UnicodeError as error:
        raise ValueError(f'record {record["key"]!r} is not UTF-8 ({error}); prepare the data set again') from error
    return text


def _write_manifest(directory: Path, plan: dict[str, Any]) -> None:
    """Writes the offsets and the manifest, from the files of all shards, as other processes may have written some."""
    totals = dict.fromkeys(_COUNTS, 0)
    empty, shard_tokens, end = 0, [], 0
    with atomic.replacing(directory / 'offsets.bin') as temporary, temporary.open('wb') as file:
        file.write(np.zeros(1, _OFFSET).tobytes())
        for shard in range(_shard_count(plan)):
            counts = np.fromfile(_documents_path(directory, shard), _COUNT).reshape(-1, len(_COUNTS)).astype(_OFFSET)
            offsets = end + np.cumsum(counts[:, 0], dtype=_OFFSET)
            file.write(offsets.tobytes())
            end = int(offsets[-1])
            empty += int((counts[:, 0] == 0).sum())
            for name, total in zip(_COUNTS, counts.sum(0).tolist(), strict=True):
                totals[name] += total
            shard_tokens.append(int(counts[:, 0].sum()))
    if not totals['tokens']:
        raise ValueError(f'{plan["name"]} has no text in its {plan["records"]} records; prepare the data set again')
    _write_json(directory / 'manifest.json', plan | totals | {'empty': empty, 'shard_tokens': shard_tokens})


def _shard_count(plan: dict[str, Any]) -> int:
    return -(-plan['records'] // plan['shard_records'])


def _tokens_path(directory: Path, shard: int) -> Path:
    return directory / f'tokens-{shard:05d}.bin'


def _documents_path(directory: Path, shard: int) -> Path:
    return directory / f'documents-{shard:05d}.bin'


def _expect(directory: Path, found: dict[str, Any], **expected: Any) -> None:
    for name, value in expected.items():
        if value is not None and found[name] != value:
            raise ValueError(
                f'{directory} was built with {name} {found[name]!r}, not {value!r}; '
                'use another directory, or delete this one to build it again'
            )


def _memory_map(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    found = path.stat().st_size
    if found != size * dtype.itemsize:
        raise ValueError(
            f'{path} has {found} bytes, not the {size * dtype.itemsize} of the manifest; '
            'delete its directory to build it again'
        )
    return np.memmap(path, dtype, 'r') if size else np.empty(0, dtype)  # an empty file cannot be mapped


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f'{path} is damaged ({error}); delete its directory to build it again') from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic.write_text(path, json.dumps(content, indent=2) + '\n')
