"""A local folder whose files are copied to a cloud store, for files that grow: a store cannot append to an object."""

import tempfile
import threading
from pathlib import Path

from absl import logging

from combiner import atomic, paths

# A copy is of the whole file. A learning curve of 10,000 lines has about 3 MB, and as much again in TensorBoard's file.
SECONDS = 60.0


class Mirror:
    """Copies the changed files of a local folder: every `SECONDS` in the background, at `copy` and at `close`.

    A copy that fails in the background gives a warning, and is tried again the next time.

    Args:
        remote: the folder in the store.

    Attributes:
        folder: the local folder, empty at first; `close` removes it.
    """

    def __init__(self, remote: paths.AnyPath):
        self._remote = remote
        self._temporary = tempfile.TemporaryDirectory(prefix='combiner-')
        self.folder = Path(self._temporary.name)
        self._copied: dict[Path, tuple[int, int]] = {}  # size and time of each file when it was copied
        self._copying = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._copy_regularly, name='mirror', daemon=True)
        self._thread.start()

    def copy(self) -> None:
        """Copies what has changed since the last copy.

        Raises:
            Exception: of the store, if it cannot be written.
        """
        with self._copying:
            for file in sorted(self.folder.rglob('*')):
                try:
                    status = file.stat()
                    state = status.st_size, status.st_mtime_ns
                    if atomic.is_temporary(file) or file.is_dir() or self._copied.get(file) == state:
                        continue
                    content = file.read_bytes()
                except FileNotFoundError:  # removed or renamed meanwhile
                    continue
                atomic.write_bytes(self._remote / file.relative_to(self.folder), content)
                self._copied[file] = state

    def close(self) -> None:
        """Copies a last time, and removes the local folder; raises as `copy`."""
        self._closed.set()
        self._thread.join()
        with self._temporary:
            self.copy()

    def _copy_regularly(self) -> None:
        while not self._closed.wait(SECONDS):
            try:
                self.copy()
            except Exception as error:  # of the store: many kinds
                logging.warning('%s could not be copied to %s (%s); trying again', self.folder, self._remote, error)
