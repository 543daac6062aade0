"""Atomic writes: a file is complete or absent, even if the process that writes it is killed.

A local file is written under another name and renamed. A cloud store has no such renaming and needs none: it shows an
object, or its new content, when the upload has ended, and never a part.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from fsspec.core import url_to_fs

from combiner.paths import AnyPath

_MARK = '.writing-'
_ABANDONED = 24 * 3600  # seconds without a write after which a temporary file counts as abandoned


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, and renames it to `path` when the block ends without an exception.

    Readers see the old file or the new one, never a part. If several processes write the same file at once, the last
    one wins. After an exception `path` is unchanged.
    """
    temporary = path.with_name(f'{path.name}{_MARK}{uuid.uuid4().hex}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: AnyPath, text: str) -> None:
    """Writes a text file; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Writes a file atomically, and so that it is complete even if the machine goes down afterwards."""
    if not isinstance(path, Path):
        path.write_bytes(content)
        return
    with replacing(path) as temporary, temporary.open('wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def move(path: AnyPath, to: AnyPath) -> None:
    """Renames a folder. In a cloud store its files are copied, then removed: a kill may leave both, but loses none."""
    if isinstance(path, Path):
        path.rename(to)
        return
    store, source = url_to_fs(os.fspath(path))
    store.mv(source, os.fspath(to), recursive=True)


def sweep(directory: Path, seconds: float = _ABANDONED) -> None:
    """Removes the temporary files that killed processes left in a directory, by default after a day.

    Use 0 seconds only if no other process writes there.
    """
    for temporary in directory.glob(f'*{_MARK}*'):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            if time.time() - temporary.stat().st_mtime >= seconds:
                temporary.unlink()
