"""Atomic writes: a file is complete or absent, even if the process that writes it is killed.

A local file is written under another name and renamed. A cloud store has no such renaming and needs none: it shows an
object, or its new content, when the upload has ended, and never a part.
"""

import contextlib
import glob
import os
import shutil
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


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `path`, and renames it to `path` when the block ends without an exception.

    The files are complete even if the machine goes down afterwards. After an exception `path` is unchanged. Folders
    that killed processes left are removed after a day.

    Raises:
        OSError: `path` exists and is not an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, name=path.name)
    temporary = path.with_name(f'{path.name}{_MARK}{uuid.uuid4().hex}')
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            with file.open('rb') as written:
                os.fsync(written.fileno())
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_temporary(path: Path) -> bool:
    """Returns whether a path is one of `replacing`."""
    return _MARK in path.name


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


def sweep(directory: Path, seconds: float = _ABANDONED, name: str | None = None) -> None:
    """Removes the temporary files and folders that killed processes left in a directory.

    Args:
        directory: where they are.
        seconds: without a write after which they count as abandoned; 0 only if no other process writes there.
        name: of the file or folder that was written; None for any.
    """
    for temporary in directory.glob(f'{"*" if name is None else glob.escape(name)}{_MARK}*'):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            if time.time() - temporary.stat().st_mtime >= seconds:
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
