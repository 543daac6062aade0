"""How long a command takes until its first step or batch is done, and what takes the time; said once, in one line."""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

T = TypeVar('T')

_began = 0.0  # when this process started, by time.perf_counter; 0.0 before `begin`
_seconds: dict[str, float] = {}
_compiling: list[tuple[float, float]] = []  # disjoint stretches in which JAX traced, lowered or compiled


def begin() -> None:
    """Starts to measure a command, whose modules are imported by now; without it, nothing is measured or said."""
    global _began
    _began = time.perf_counter() - _age_of_process()
    _seconds.clear()
    _seconds['import'] = time.perf_counter() - _began
    jax.monitoring.register_event_duration_secs_listener(_note_compiling)


def seconds() -> float | None:
    """Returns the seconds since the process of a command started; None if this is no command."""
    return time.perf_counter() - _began if _began else None


def _age_of_process() -> float:
    """Returns the seconds since this process started; 0.0 where the system does not say."""
    try:
        ticks = int(Path('/proc/self/stat').read_text(encoding='utf-8').rpartition(')')[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK')
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


def _note_compiling(event: str, duration_secs: float, **_: Any) -> None:
    """Adds a stretch of compiling; the ones within it, such as the trace of an inner function, become part of it."""
    if not event.startswith('/jax/core/compile/'):
        return
    end = time.perf_counter()
    while _compiling and _compiling[-1][0] >= end - duration_secs:
        _compiling.pop()
    _compiling.append((end - duration_secs, end))


def _compiled_since(start: float) -> float:
    return sum((end - max(begin, start) for begin, end in _compiling if end > start), 0.0)


@contextlib.contextmanager
def timing(name: str) -> Iterator[None]:
    """Adds the time within the block to what the line says of `name`, without that of compiling."""
    start = time.perf_counter()
    yield
    if not _seconds:  # no command, or the line is said
        return
    taken = time.perf_counter() - start - _compiled_since(start)
    _seconds[name] = _seconds.get(name, 0.0) + taken


def report(done: str) -> str | None:
    """Returns the line when something is done for the first time; None later, and if this is no command."""
    global _began
    if not _seconds:
        return None
    total = time.perf_counter() - _began
    parts = {**_seconds, 'compile': _compiled_since(_began)}
    _seconds.clear()
    parts['rest'] = max(total - sum(parts.values()), 0.0)
    listed = ', '.join(f'{name} {taken:.1f} s' for name, taken in parts.items())
    return f'{done} after {total:.1f} s: {listed}'


class Batches(Iterable[T]):
    """Batches that count the wait for the first one as data, and say the line when it is used.

    Args:
        batches: to read, as often as these are read.
        say: prints a line.
    """

    def __init__(self, batches: Iterable[T], say: Callable[[str], Any]) -> None:
        self.batches, self.say = batches, say

    def __iter__(self) -> Iterator[T]:
        iterator = iter(self.batches)
        with timing('data'):
            first = list(itertools.islice(iterator, 1))
        for batch in first:
            yield batch
            if line := report('first batch'):
                self.say(line)
        yield from iterator
