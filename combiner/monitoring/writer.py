"""Metrics of a run in WORKDIR/metrics.jsonl and TensorBoard."""

import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tensorboardX
from absl import logging

from combiner import atomic, paths
from combiner.monitoring import mirror


class Writer:
    """A writer that appends to WORKDIR/metrics.jsonl (one object per line, with 'step') and to WORKDIR/tensorboard.

    It removes the lines after `step`, from which the run continues, so that no step appears twice. It then writes
    TensorBoard's file again from metrics.jsonl, because a kill may have lost its last two minutes. Only the first
    process writes.

    For a workdir in a cloud store, both are written to a local folder and copied from it (see `mirror.Mirror`). If the
    lines of a checkpoint's steps are there before the checkpoint is (`flush`), a kill loses only lines of steps that
    are taken again.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int):
        self.file = self.board = self._mirror = None
        self.seconds = 0.0, 0.0  # in steps, and in all, of the commands before, as their last lines have them
        if jax.process_index():
            return
        run = paths.parse(workdir, 'workdir')
        path = run / 'metrics.jsonl'
        lines = paths.content(path).splitlines() if path.exists() else []
        in_all = max((_seconds(line, 'seconds_in_all') for line in lines), default=0.0)
        lines = [line for line in lines if _step(line) <= step]
        self.seconds = max((_seconds(line, 'seconds_in_steps') for line in lines), default=0.0), in_all
        if isinstance(run, Path):
            folder = run
            folder.mkdir(parents=True, exist_ok=True)
        else:
            self._mirror = mirror.Mirror(run)
            folder = self._mirror.folder
            (run / 'tensorboard').rmtree(missing_ok=True)
        atomic.write_text(folder / 'metrics.jsonl', ''.join(f'{line}\n' for line in lines))
        self.file = (folder / 'metrics.jsonl').open('a', encoding='utf-8', buffering=1)
        shutil.rmtree(folder / 'tensorboard', ignore_errors=True)
        self.board = tensorboardX.SummaryWriter(str(folder / 'tensorboard'))
        _ignore_write_errors(self.board)
        for line in lines:
            self._show(json.loads(line))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line to metrics.jsonl and one scalar per value to TensorBoard."""
        if self.file is not None:
            line: dict[str, Any] = {'step': step, **values}
            self.file.write(json.dumps(line) + '\n')
            self._show(line)

    def flush(self) -> None:
        """Copies both files to the cloud store of the workdir; does nothing for a local one, which has them already.

        Raises:
            Exception: of the store, if it cannot be written.
        """
        if self._mirror is not None and self.board is not None:
            self.board.flush()
            self._mirror.copy()

    def close(self) -> None:
        """Closes both files; raises as `flush`."""
        if self.file is not None and self.board is not None:
            self.file.close()
            self.board.close()
        if self._mirror is not None:
            self._mirror.close()

    def _show(self, line: dict[str, Any]) -> None:
        if self.board is not None:
            for name in line.keys() - {'step'}:
                self.board.add_scalar(name, line[name], line['step'])


def _ignore_write_errors(board: tensorboardX.SummaryWriter) -> None:
    """Turns write errors of TensorBoard's file, such as a full disk, into one warning.

    An error would end TensorBoard's writer thread, and training would wait for it forever.
    """
    writer: Any = board.file_writer  # its attributes are not in its types
    events = writer.event_writer._ev_writer
    failed = False

    def ignoring(write: Callable[..., Any], *args: Any) -> Any:
        nonlocal failed
        try:
            return write(*args)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            if not failed:
                logging.warning("TensorBoard's file ends here (%s); the next start writes it again", error)
            failed = True

    for name in ('write_event', 'flush', 'close'):
        setattr(events, name, functools.partial(ignoring, getattr(events, name)))


def _step(line: str) -> int | float:
    """Returns the step of a line of metrics.jsonl; infinity for a damaged line, such as one cut off by a kill."""
    try:
        return json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
        return math.inf


def _seconds(line: str, name: str) -> float:
    """Returns a value of a line of metrics.jsonl; 0.0 if it has none."""
    try:
        return float(json.loads(line)[name])
    except (ValueError, KeyError, TypeError):
        return 0.0
