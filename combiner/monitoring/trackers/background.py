"""A tracker in a thread of its own: it neither stops nor slows the training."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

from absl import logging

from combiner.monitoring.trackers.tracker import Tracker

PATIENCE_SECONDS = 60.0  # that a training waits for a tracker, in all


class Background:
    """Calls the methods of a tracker in a thread, in their order.

    The first error, or a wait that is too long, gives one warning and ends the tracker; metrics.jsonl, which is written
    before, has everything.

    Args:
        name: of the tracker.
        make: makes the tracker; called in the thread.
    """

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._calls: queue.SimpleQueue[tuple[str, tuple[Any, ...], threading.Event]] = queue.SimpleQueue()
        self._ended = self._hangs = False
        # A daemon, so that a tracker that hangs does not keep the process.
        threading.Thread(target=self._work, args=(make,), name=f'tracker {name}', daemon=True).start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Calls `log` of the tracker; returns at once."""
        self._call('log', step, values)

    def flush(self, wait: bool = False) -> None:
        """Calls `flush` of the tracker; returns at once, or when it has ended."""
        self._finish(self._call('flush'), wait)

    def close(self) -> None:
        """Calls `close` of the tracker; returns when it has ended."""
        self._finish(self._call('close'), wait=True)

    def _call(self, method: str, *arguments: Any) -> threading.Event:
        done = threading.Event()
        self._calls.put((method, arguments, done))
        return done

    def _finish(self, done: threading.Event, wait: bool) -> None:
        if wait and not self._hangs and not done.wait(PATIENCE_SECONDS):
            self._hangs = True
            self._end(f'it took longer than {PATIENCE_SECONDS:.0f} s')

    def _work(self, make: Callable[[], Tracker]) -> None:
        tracker, method = self._attempt(make), ''
        while method != 'close':
            method, arguments, done = self._calls.get()
            if not self._ended:
                self._attempt(getattr(tracker, method), *arguments)
            elif tracker is not None:  # frees what it holds
                with contextlib.suppress(Exception):
                    tracker.close()
                tracker = None
            done.set()

    def _attempt(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # of the network, of a disk, of another library: any kind
            lines = str(error).strip().splitlines() or ['']
            self._end(f'{type(error).__name__}: {lines[0][:300]}')
            return None

    def _end(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            logging.warning(
                'the tracker %s ends here (%s); metrics.jsonl goes on, and the next start of the run shows it again',
                self.name,
                reason,
            )
