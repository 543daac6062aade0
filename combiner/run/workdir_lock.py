"""The lock of a workdir: a running training locks WORKDIR/running.json and describes itself there.

The operating system releases the lock however a process ends, so a killed training never blocks its own machine.
Some network file systems lock only within one machine, or not at all. So the training also touches the file every
`BEAT_SECONDS`. If another machine's record is not touched for `PATIENCE_SECONDS`, a new training takes over. On a file
system without locks, a record of the same machine is valid as long as its process runs.

In a cloud store (`gs://…`) there are neither locks nor touching: the training writes its record again, with the time,
every `BEAT_SECONDS`, as long as the record is its own. All else is as on a file system without locks.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from combiner import atomic, paths
from combiner.run import processes

NAME = 'running.json'
BEAT_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
_TOKEN_CHARACTERS = 32
_SETTLE_SECONDS = 2.0  # without locks: time within which another training may still replace a new record


class RunLock:
    """The record of a running training; call `check` before writing files that only one training may write."""

    def __init__(
        self, path: paths.AnyPath, token: str, beat: Callable[[], Any], close: Callable[[], Any] = lambda: None
    ):
        self.token = token
        self._path, self._touch, self._close = path, beat, close
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name='run lock', daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises ValueError if another training has taken over the workdir because this one was suspended too long."""
        record = _read(self._path)
        if record is not None and record.get('token') != self.token:
            raise ValueError(
                f'{_describe(record)} has taken over {self._path.parent} while this process was suspended; '
                'this process stops and leaves the workdir to the other one'
            )

    def release(self) -> None:
        """Removes the record, if it is still the record of this training, and releases the lock."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # a cloud store has many kinds
            if (_read(self._path) or {}).get('token') == self.token:
                self._path.unlink()
        self._close()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # a missed beat is made good by the next one
                self._touch()


@contextlib.contextmanager
def locked(workdir: str | os.PathLike[str], interrupted: Callable[[], int] = lambda: 0) -> Iterator[Callable[[], None]]:
    """Keeps other trainings out of a workdir; yields `RunLock.check`.

    The processes of one `jax.distributed` run are one training: the first locks, and all of them end if it cannot, or
    if one of them does not see its record, as in a folder that each host has for itself.

    Args:
        workdir: the run's folder; created if it is missing.
        interrupted: returns the number of a signal that arrived, or 0.

    Raises:
        ValueError: another training runs there, or the workdir cannot be written or is not shared.
        SystemExit: interrupted while waiting to see whether another machine's training still runs.
    """
    lock, failure = None, None
    if jax.process_index() == 0:
        try:
            folder = paths.parse(workdir, 'workdir')
            local = isinstance(folder, Path)
            lock = _acquire(folder, interrupted) if local else _acquire_in_store(folder, interrupted)
        except (ValueError, SystemExit) as error:
            failure = error
    if jax.process_count() > 1:
        elsewhere = _failure_elsewhere(workdir, '' if lock is None else lock.token)
        failure = failure or elsewhere
    try:
        if failure is not None:
            raise failure
        yield (lambda: None) if lock is None else lock.check
    finally:
        if lock is not None:
            lock.release()


def _failure_elsewhere(workdir: str | os.PathLike[str], token: str) -> ValueError | None:
    """Returns the error of a process that has no lock or does not see it, the same in all processes.

    Args:
        workdir: the run's folder.
        token: of the lock of this process; '' if it has none.
    """
    sent = np.frombuffer(token.ljust(_TOKEN_CHARACTERS).encode(), np.uint8).astype(np.int32)
    token = bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8)).decode().strip()
    if not token:
        return ValueError(f'the first process could not start a training in {workdir}; see its error message')
    seen = np.asarray(multihost_utils.process_allgather(np.int32(_appears(workdir, token))))
    if seen.all():
        return None
    blind = ', '.join(map(str, np.flatnonzero(seen == 0)))
    return ValueError(
        f'process {blind} of this run does not see what process 0 writes to {workdir}; give a --workdir on a file '
        'system that all hosts share'
    )


def _appears(workdir: str | os.PathLike[str], token: str) -> bool:
    """Returns whether a record is, or appears within `PATIENCE_SECONDS`, as network file systems show files late."""
    until = time.monotonic() + PATIENCE_SECONDS
    try:
        path = paths.parse(workdir, 'workdir') / NAME
    except ValueError as error:
        logging.warning('%s', error)
        return False
    while (_read(path) or {}).get('token') != token:
        if time.monotonic() > until:
            return False
        time.sleep(min(1.0, PATIENCE_SECONDS / 10))
    return True


def _acquire(workdir: Path, interrupted: Callable[[], int]) -> RunLock:
    path = workdir / NAME
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file, locks = _lock(path)
    except OSError as error:
        raise ValueError(f'{workdir} cannot be written ({error}); choose another --workdir') from error
    try:
        if file is None:
            raise _refused(path, _read(path) or {})
        _take_over(path, locks, interrupted)
        token = _write(file)
        if not locks:
            _settle(path, token)
    except BaseException:
        if file is not None:
            file.close()
        raise
    return RunLock(path, token, lambda: os.utime(file.fileno()), file.close)


def _acquire_in_store(workdir: paths.AnyPath, interrupted: Callable[[], int]) -> RunLock:
    path, record = workdir / NAME, _record()

    def write() -> None:
        atomic.write_text(path, json.dumps(record | {'beat': time.time_ns()}, indent=2) + '\n')

    def beat() -> None:
        if (_read(path) or {}).get('token') == record['token']:
            write()

    with contextlib.suppress(FileNotFoundError):
        path.read_bytes()  # raises if the store does not answer, which `_read` takes for a missing record
    _take_over(path, False, interrupted)
    try:
        write()
    except OSError as error:
        raise ValueError(f'{workdir} cannot be written ({error}); choose another --workdir') from error
    _settle(path, record['token'])
    return RunLock(path, record['token'], beat)


def _take_over(path: paths.AnyPath, locks: bool, interrupted: Callable[[], int]) -> None:
    """Raises ValueError if the training of an earlier record still runs."""
    earlier = _read(path)
    if earlier is not None:
        if _runs(path, earlier, locks, interrupted):
            raise _refused(path, earlier)
        logging.warning('%s ended without releasing %s; this one takes over', _describe(earlier), path.parent)


def _settle(path: paths.AnyPath, token: str) -> None:
    """Raises ValueError if another training has replaced a new record, where there are no locks."""
    time.sleep(_SETTLE_SECONDS)
    if (_read(path) or {}).get('token') != token:
        raise _refused(path, _read(path) or {})


def _lock(path: Path) -> tuple[Any, bool]:
    """Returns the opened file (None if another process has locked it), and whether the file system has locks."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), 'r+', encoding='utf-8')
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None, True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                file.close()
                raise
            return file, False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file, True
        file.close()  # its holder removed it between opening and locking


def _record() -> dict[str, Any]:
    """Returns the record of this training, with a new token."""
    return {
        'host': platform.node(),
        'boot': _boot(),
        'pid': os.getpid(),
        'process_start': _process_start(os.getpid()),
        'started': datetime.now(UTC).isoformat(timespec='seconds'),
        'command': ' '.join(sys.argv),
        'token': uuid.uuid4().hex,
    }


def _write(file: Any) -> str:
    record = _record()
    file.seek(0)
    file.truncate()
    file.write(json.dumps(record, indent=2) + '\n')
    file.flush()
    os.fsync(file.fileno())
    return record['token']


def _read(path: paths.AnyPath) -> dict[str, Any] | None:
    """Returns the record; None if there is none, or if its process was killed before it was complete."""
    try:
        found = json.loads(paths.content(path))
    except Exception:  # a cloud store has many kinds
        return None
    return found if isinstance(found, dict) else None


def _runs(path: paths.AnyPath, record: dict[str, Any], locks: bool, interrupted: Callable[[], int]) -> bool:
    """Returns whether the training of a record still runs, although its lock was free or there are no locks."""
    if record.get('boot') == _boot() and record.get('host') == platform.node():
        return not locks and _process_start(record.get('pid', 0)) == record.get('process_start', '')
    logging.warning(
        '%s has not released %s; waiting up to %.0f s to see whether it still runs',
        _describe(record),
        path.parent,
        PATIENCE_SECONDS,
    )
    first, until = _touched(path), time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        if number := interrupted():
            raise SystemExit(128 + number)
        time.sleep(min(1.0, PATIENCE_SECONDS / 10))
        if _touched(path) != first:
            return True
    return False


def _touched(path: paths.AnyPath) -> int | None:
    """Returns when a file was last written or touched, in ns; opens it, as network file systems cache `stat`.

    In a cloud store it is the time in the record.
    """
    if not isinstance(path, Path):
        return (_read(path) or {}).get('beat')
    try:
        with path.open('rb') as file:
            return os.stat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _boot() -> str:
    """Returns an identifier of the current boot of this machine, on Linux; else ''."""
    try:
        return Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()
    except OSError:
        return ''


def _process_start(pid: int) -> str | None:
    """Returns when a process started, on Linux in ticks since boot; None if there is no such process."""
    try:
        return Path(f'/proc/{pid}/stat').read_text(encoding='utf-8', errors='replace').rpartition(')')[2].split()[19]
    except OSError:
        pass
    if Path('/proc/self/stat').exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 'unknown'


def _describe(record: dict[str, Any]) -> str:
    known = {'host': 'unknown', 'pid': 'unknown', 'started': 'unknown', 'command': 'unknown'} | record
    return (
        f'a training (process {known["pid"]} on {known["host"]}, started {known["started"]}, '
        f'command: {known["command"]})'
    )


def _refused(path: paths.AnyPath, record: dict[str, Any]) -> ValueError:
    together = processes.not_joined()
    return ValueError(
        f'{_describe(record)} runs in {path.parent}; wait until it ends or end it, or choose another --workdir '
        f'(if that process is certainly gone, delete {path}){f"; {together}" if together else ""}'
    )
