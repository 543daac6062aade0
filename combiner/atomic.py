"""Files that are whole or not there, whenever the process that writes them is killed."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

_MARK = '.writing-'
_ABANDONED = 24 * 3600  # seconds without a write after which nobody is behind a temporary file any more


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it to `path` when the block ends well.

    Readers see the old file or the new one, never a part; of several processes that write the same file at
    once, the last one to end wins. An exception leaves `path` as it was.
    """
    temporary = path.with_name(f'{path.name}{_MARK}{uuid.uuid4().hex}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is whole even after the machine, not the process alone, went down."""
    with replacing(path) as temporary, temporary.open('w', encoding='utf-8') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sweep(directory: Path, seconds: float = _ABANDONED) -> None:
    """Removes the temporary files in a directory that killed processes left there, by default a day or more ago.

    Who knows that nobody else writes there gives 0 seconds.
    """
    for temporary in directory.glob(f'*{_MARK}*'):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - temporary.stat().st_mtime >= seconds:
                temporary.unlink()
