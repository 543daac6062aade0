"""TensorBoard: files in WORKDIR/tensorboard."""

import functools
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorboardX

from combiner import paths
from combiner.monitoring.trackers.tracker import Run, Tracker, register


@register('tensorboard')
class TensorBoard(Tracker):
    """Writes one scalar per value; at each start the file is written anew, as a kill may have lost its last minutes."""

    @classmethod
    def view(cls, workdir: paths.AnyPath) -> str:
        """Returns the command that shows the curves; the package tensorboard is not installed with this one."""
        return shlex.join(['tensorboard', '--logdir', str(workdir / 'tensorboard')])

    def __init__(self, run: Run) -> None:
        earlier = run.workdir / 'tensorboard'
        if isinstance(earlier, Path):
            shutil.rmtree(earlier, ignore_errors=True)
        else:
            earlier.rmtree(missing_ok=True)
        self._board = tensorboardX.SummaryWriter(str(run.folder / 'tensorboard'))
        self._error: Exception | None = None
        self._catch_errors()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds one scalar per value."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._check()

    def flush(self) -> None:
        """Writes the file."""
        self._board.flush()
        self._check()

    def close(self) -> None:
        """Closes the file."""
        self._board.close()
        self._check()

    def _catch_errors(self) -> None:
        """Keeps an error of the file, such as a full disk, for the next call.

        Otherwise it would end TensorBoard's own thread, for which `add_scalar` and `flush` would wait forever.
        """
        writer: Any = self._board.file_writer  # its attributes are not in its types
        events = writer.event_writer._ev_writer

        def catching(write: Callable[..., Any], *args: Any) -> Any:
            try:
                return write(*args)
            except (OSError, ValueError) as error:  # ValueError: it is closed
                self._error = self._error or error

        for name in ('write_event', 'flush', 'close'):
            setattr(events, name, functools.partial(catching, getattr(events, name)))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
