"""Metrics of a run in WORKDIR/metrics.jsonl, and in trackers."""

import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from combiner import atomic, paths
from combiner.monitoring import mirror
from combiner.monitoring.trackers.background import Background
from combiner.monitoring.trackers.tracker import Run, Tracker


class Writer:
    """A writer that appends to WORKDIR/metrics.jsonl (one object per line, with 'step') and passes lines to trackers.

    It removes the lines after `step`, from which the run continues, so that no step appears twice, and gives all that
    stay to the trackers. Only the first process writes.

    For a workdir in a cloud store, all files are written to a local folder and copied from it (see `mirror.Mirror`). If
    the lines of a checkpoint's steps are there before the checkpoint is (`flush`), a kill loses only lines of steps
    that are taken again.

    Args:
        workdir: the run's folder.
        step: from which the run continues.
        trackers: by name; see `trackers.tracker`.
        config: of the run, for trackers.
        commit: of the code, for trackers.

    Attributes:
        seconds: in steps, and in all, of the commands before.
        tokens_per_second: the last ones that were measured; 0.0 if none were.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        step: int,
        trackers: Mapping[str, type[Tracker]] | None = None,
        config: Mapping[str, Any] | None = None,
        commit: str | None = None,
    ) -> None:
        self._file = self._mirror = None
        self._trackers: list[Background] = []
        self.seconds, self.tokens_per_second = (0.0, 0.0), 0.0
        if jax.process_index():
            return
        run = paths.parse(workdir, 'workdir')
        path = run / 'metrics.jsonl'
        lines = _read(path) if path.exists() else []
        in_all = max((line.get('seconds_in_all', 0.0) for line in lines), default=0.0)
        lines = [line for line in lines if line['step'] <= step]
        self.seconds = max((line.get('seconds_in_steps', 0.0) for line in lines), default=0.0), in_all
        rates = [line['tokens_per_second'] for line in lines if line.get('tokens_per_second')]
        self.tokens_per_second = rates[-1] if rates else 0.0
        if isinstance(run, Path):
            folder = run
            folder.mkdir(parents=True, exist_ok=True)
        else:
            self._mirror = mirror.Mirror(run)
            folder = self._mirror.folder
        atomic.write_text(folder / 'metrics.jsonl', ''.join(f'{json.dumps(line)}\n' for line in lines))
        self._file = (folder / 'metrics.jsonl').open('a', encoding='utf-8', buffering=1)
        known = Run(run, folder, step, dict(config or {}), commit)
        self._trackers = [
            Background(name, functools.partial(tracker, known)) for name, tracker in (trackers or {}).items()
        ]
        for line in lines:
            self._show(line)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line to metrics.jsonl and gives it to the trackers."""
        if self._file is not None:
            line: dict[str, Any] = {'step': step, **values}
            self._file.write(json.dumps(line) + '\n')
            self._show(line)

    def flush(self) -> None:
        """Flushes the trackers; copies all files to the cloud store of the workdir, if it is in one.

        Raises:
            Exception: of the store, if it cannot be written.
        """
        for tracker in self._trackers:
            tracker.flush(wait=self._mirror is not None)
        if self._mirror is not None:
            self._mirror.copy()

    def close(self) -> None:
        """Closes the file and the trackers; raises as `flush`."""
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()
        if self._mirror is not None:
            self._mirror.close()

    def _show(self, line: dict[str, Any]) -> None:
        values = {name: value for name, value in line.items() if name != 'step'}
        for tracker in self._trackers:
            tracker.log(line['step'], values)


def _read(path: paths.AnyPath) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl, without damaged ones, such as one that a kill cut off."""
    found = []
    for text in paths.content(path).splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get('step'), (int, float)) and math.isfinite(line['step']):
            found.append(line)
    return found
