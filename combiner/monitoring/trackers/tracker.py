"""The contract of a tracker, and trackers by name.

WORKDIR/metrics.jsonl is the truth; a tracker shows a copy of it. A new one is a subclass of `Tracker` in one file,
which `--tracker=mylab.tracker:Mine` uses; a file in this folder gives it a name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from combiner import named, paths


class Run(NamedTuple):
    """What a tracker knows of a run.

    Attributes:
        workdir: of the run; what an earlier command has left is read from here.
        folder: local folder for the files of the tracker: the workdir itself, or for one in a cloud store an empty
            folder that is copied there.
        step: from which the run continues.
        config: of the run, nested.
        commit: of the code; None outside of a checkout.
    """

    workdir: paths.AnyPath
    folder: Path
    step: int
    config: dict[str, Any]
    commit: str | None = None


class Tracker:
    """Shows the curves of one run; the first process makes one when training starts.

    All methods are called in one thread that is not the training's (see `background.Background`): they may take their
    time, and an error in them ends only the tracker, with a warning.
    """

    @classmethod
    def check(cls) -> None:
        """Raises ValueError, with the way out, if the tracker cannot work here; called before a workdir is touched."""

    @classmethod
    def view(cls, workdir: paths.AnyPath) -> str:
        """Returns the command, or address, that shows the curves of a run; '' if there is none."""
        del workdir
        return ''

    def __init__(self, run: Run) -> None:
        del run

    def log(self, step: int, values: dict[str, float]) -> None:
        """Takes one line of metrics.jsonl.

        The lines up to the step from which a run continues come first, again at every start. So a tracker either
        begins anew, or leaves out the steps that it has.
        """
        raise NotImplementedError

    def flush(self) -> None:
        """Writes what is held back; called before each checkpoint."""

    def close(self) -> None:
        """Ends the tracker; called once, when training ends or stops."""


_REGISTRY = named.Registry('tracker', Tracker, f'{Tracker.__module__}:Tracker')


def register(name: str) -> Callable[[type[Tracker]], type[Tracker]]:
    """Returns a class decorator that registers a tracker as `name`."""
    return _REGISTRY.register(name)


def names() -> list[str]:
    """Returns the registered names."""
    return sorted(_REGISTRY)


def resolve(name: str) -> type[Tracker]:
    """Returns the class of a tracker: a registered name, or a dotted path such as `mylab.tracker:Mine`.

    Raises:
        ValueError: the name is unknown, or the path does not lead to a subclass of `Tracker`.
    """
    return _REGISTRY.resolve(name)


def parse(text: str) -> dict[str, type[Tracker]]:
    """Returns the trackers of `NAME,NAME`, by name, in this order; none for ''.

    They are checked in the first process, which alone writes.

    Raises:
        ValueError: see `resolve` and `Tracker.check`.
    """
    found = _resolve_all(text)
    for tracker in found.values() if jax.process_index() == 0 else ():
        tracker.check()
    return found


def views(text: str, workdir: paths.AnyPath) -> list[str]:
    """Returns the commands, or addresses, that show the curves of a run in the trackers of `NAME,NAME`."""
    return [found for tracker in _resolve_all(text).values() if (found := tracker.view(workdir))]


def _resolve_all(text: str) -> dict[str, type[Tracker]]:
    return {name: resolve(name) for name in map(str.strip, text.split(',')) if name}
