"""The contract of a tracker, and trackers by name.

WORKDIR/metrics.jsonl is the truth; a tracker shows a copy of it. A new one is a subclass of `Tracker` in one file,
which `--tracker=mylab.tracker:Mine` uses; a file in this folder gives it a name.
"""

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from combiner import paths

_REGISTRY: dict[str, type['Tracker']] = {}


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


def register(name: str) -> Callable[[type[Tracker]], type[Tracker]]:
    """Returns a class decorator that registers a tracker as `name`."""

    def add(tracker: type[Tracker]) -> type[Tracker]:
        if name in _REGISTRY:
            raise ValueError(f'the tracker {name!r} is registered already, as {_REGISTRY[name].__qualname__}')
        _REGISTRY[name] = tracker
        return tracker

    return add


def names() -> list[str]:
    """Returns the registered names."""
    return sorted(_REGISTRY)


def resolve(name: str) -> type[Tracker]:
    """Returns the class of a tracker: a registered name, or a dotted path such as `mylab.tracker:Mine`.

    Raises:
        ValueError: the name is unknown, or the path does not lead to a subclass of `Tracker`.
    """
    if ':' not in name:
        if name not in _REGISTRY:
            nearest = difflib.get_close_matches(name, _REGISTRY, 1)
            hint = f'did you mean {nearest[0]!r}? ' if nearest else ''
            raise ValueError(
                f'unknown tracker {name!r}; {hint}Known: {", ".join(names())}; or a path package.module:Class'
            )
        return _REGISTRY[name]
    module, _, attribute = name.partition(':')
    try:
        tracker = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: a malformed path
        raise ValueError(f'cannot import the tracker {name!r} ({error}); write package.module:Class') from error
    if not (isinstance(tracker, type) and issubclass(tracker, Tracker)):
        raise ValueError(f'{name!r} is no subclass of {Tracker.__module__}:Tracker; derive it from that class')
    return tracker


def parse(text: str) -> dict[str, type[Tracker]]:
    """Returns the trackers of `NAME,NAME`, by name, in this order; none for ''.

    Raises:
        ValueError: see `resolve` and `Tracker.check`.
    """
    found = _resolve_all(text)
    for tracker in found.values():
        tracker.check()
    return found


def views(text: str, workdir: paths.AnyPath) -> list[str]:
    """Returns the commands, or addresses, that show the curves of a run in the trackers of `NAME,NAME`."""
    return [found for tracker in _resolve_all(text).values() if (found := tracker.view(workdir))]


def _resolve_all(text: str) -> dict[str, type[Tracker]]:
    return {name: resolve(name) for name in map(str.strip, text.split(',')) if name}
