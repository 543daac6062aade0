"""Atomic writes: a file is complete or absent, even if the process that writes it is killed."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

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


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, and so that it is complete even if the machine goes down afterwards."""
    with replacing(path) as temporary, temporary.open('w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sweep(directory: Path, seconds: float = _ABANDONED) -> None:
    """Removes the temporary files that killed processes left in a directory, by default after a day.

    Use 0 seconds only if no other process writes there.
    """
    for temporary in directory.glob(f'*{_MARK}*'):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            if time.time() - temporary.stat().st_mtime >= seconds:
                temporary.unlink()
