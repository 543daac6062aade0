"""Checkpoints in a workdir, from which a run continues exactly.

    WORKDIR/config.json          the resolved config
    WORKDIR/checkpoints/STEP/    parameters, optimiser, EMA, model state, random key, position in the data, provenance
    WORKDIR/corrupt/STEP/        checkpoints that could not be read
    WORKDIR/running.json         the running training, if there is one (see `combiner.run.workdir_lock`)

The latest two checkpoints and the best one are kept. All files are JSON or arrays: nothing is unpickled or executed.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from combiner import atomic, paths
from combiner.run import agreement, corrupt, event_loops

T = TypeVar('T')

# Attempts to read while a running training removes steps.
_READ_ATTEMPTS = 20

# Keys of a checkpoint's metrics.
_LOSS, _EXAMPLES = 'validation_loss_nats', 'validated_on'


def _restore_args(target: Any, partial: bool = False) -> ocp.args.PyTreeRestore:
    """Returns arguments that restore each array with the sharding in `target`, whatever mesh it was saved from."""
    return ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial
    )


def saved_arrays(workdir: str | os.PathLike[str], step: int) -> Any:
    """Returns the tree of a checkpoint's arrays, with their shapes and types, without reading them."""
    path = paths.absolute(workdir, 'workdir') / 'checkpoints' / str(step) / 'state'
    with event_loops.waiting(), ocp.PyTreeCheckpointer() as reader:
        return reader.metadata(path).item_metadata.tree


def steps_of(workdir: str | os.PathLike[str]) -> set[int]:
    """Returns the steps of the checkpoints in a workdir."""
    return _steps_on_disk(paths.absolute(workdir, 'workdir') / 'checkpoints')


class Checkpoints:
    """The checkpoints of one workdir; `best` is the one with the lowest validation loss.

    Args:
        workdir: the run's folder.
        fingerprint: of the training data; checkpoints of other data are refused.
        read_only: for evaluation and sampling, while a training may be writing.
        validated_on: identifies the validation examples; only losses on the same examples are compared.

    Raises:
        ValueError: `read_only`, and there is no checkpoint or a validation loss cannot be read.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        fingerprint: str = '',
        read_only: bool = False,
        validated_on: str = '',
    ):
        folder = paths.parse(workdir, 'workdir')
        self.workdir: paths.AnyPath = folder.resolve() if isinstance(folder, Path) else folder
        self.directory = self.workdir / 'checkpoints'
        self.validated_on = validated_on
        self.provenance = {'data_fingerprint': fingerprint, 'processes': jax.process_count()}
        if read_only and not self.directory.is_dir():
            raise ValueError(f'{workdir} has no checkpoint yet; train first, or wait for the first one')
        self.read_only = read_only
        self._state_bytes = 0
        self._check_losses(read_only)
        options = ocp.CheckpointManagerOptions(
            # Orbax writes metrics to disk only when best_fn is set; with its max_to_keep it would delete the
            # latest step whenever the metric worsens. So policies define which steps stay.
            best_fn=_loss,
            best_mode='min',
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [
                    checkpoint_managers.LatestN(2),
                    checkpoint_managers.BestN(
                        get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
                    ),
                ]
            ),
            # A step is renamed before it is deleted, so that a kill leaves no partly deleted step in the list. In a
            # cloud store Orbax deletes at once: after a kill, the next save deletes the rest.
            todelete_subdir='deleted',
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self.manager = self._retry(lambda: ocp.CheckpointManager(self.directory, options=options))

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in order."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: Any, iterator: Any, validation_loss: float | None = None) -> None:
        """Saves in the background; after the call, the state may be donated and the iterator advanced.

        Raises:
            OSError: the disk is full, in this save or the one before; all complete checkpoints are still there.
        """
        self._wait_for_save()
        self._state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with event_loops.waiting(), self._writing():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    data=grain.checkpoint.CheckpointSave(iterator),
                    provenance=ocp.args.JsonSave(self.provenance),
                ),
                metrics=self._metrics(validation_loss),
            )

    def validate_again(
        self, target: Any, validate: Callable[[Any], float | None]
    ) -> Iterator[tuple[int, float, float | None]]:
        """Replaces validation losses that were measured on other examples than the current ones.

        Args:
            target: see `restore_parameters`.
            validate: returns the loss of restored parameters on the current examples; None if there is none.

        Yields:
            The step of a checkpoint, its old loss and its new loss; None if the checkpoint cannot be read.

        Raises:
            Exception: as `restore`.
        """
        for step in self.steps():
            measured = self.manager.metrics(step) or {}
            if _LOSS not in measured or measured.get(_EXAMPLES) == self.validated_on:
                continue
            loss, (restored, error) = None, self._read_part(step, target)
            if agreement.in_all(error is None):  # all processes validate together
                loss = validate(restored)
            else:
                why = corrupt.described(error)
                logging.warning('checkpoint %d cannot be read (%s): it cannot be the best', step, why)
            if jax.process_index() == 0:
                file = self.directory / str(step) / 'metrics' / 'metrics'
                atomic.write_text(file, json.dumps(self._metrics(loss)))
            multihost_utils.sync_global_devices('validation loss replaced')
            self.manager.reload()
            yield step, measured[_LOSS], loss

    def best_step(self) -> int | None:
        """Returns the step with the lowest validation loss; None if there is none.

        Losses that were measured on other examples than the newest loss do not count.
        """
        measured = {step: self.manager.metrics(step) or {} for step in self.steps()}
        measured = {step: values for step, values in measured.items() if _LOSS in values}
        if not measured:
            return None
        examples = measured[max(measured)].get(_EXAMPLES)
        comparable = {step: values[_LOSS] for step, values in measured.items() if values.get(_EXAMPLES) == examples}
        return min(comparable, key=lambda step: (comparable[step], -step))

    def _metrics(self, validation_loss: float | None) -> dict[str, Any]:
        return {} if validation_loss is None else {_LOSS: validation_loss, _EXAMPLES: self.validated_on}

    def restore(self, target: Any, iterator: Any) -> Any:
        """Restores the iterator and returns the state of the newest readable checkpoint; None if there is none.

        Newer checkpoints that are damaged for any process are moved to WORKDIR/corrupt, with a warning. The number of
        processes may differ from the one that saved.

        Args:
            target: the state as ShapeDtypeStructs with shardings.
            iterator: the training iterator.

        Raises:
            ValueError: the checkpoint was made with other data; or no checkpoint can be read (then none is moved); or
                another process sees other checkpoints.
            Exception: as it comes, if memory is short or a store is out of reach, which is no damage.
        """
        self._check_same_everywhere()
        unreadable: dict[int, Exception | None] = {}
        for step in reversed(self.steps()):
            restored, error = self._attempt(step, target, iterator)
            if error is not None and not corrupt.is_damage(error):
                raise error
            if agreement.in_all(error is None):  # all processes take the same step
                self._move_corrupt(unreadable, step)
                return restored
            unreadable[step] = error
        if unreadable:
            raise ValueError(
                f'no checkpoint in {self.directory} can be read (steps {", ".join(map(str, unreadable))}; '
                f'the newest: {corrupt.described(next(iter(unreadable.values())))}); '
                'restore them from a copy or choose another --workdir'
            )
        return None

    def _attempt(self, step: int, target: Any, iterator: Any) -> tuple[Any, Exception | None]:
        """Returns the state of a checkpoint and restores the iterator; or returns the error as the second value.

        Raises:
            ValueError: the checkpoint was made with other data.
        """
        try:
            found = self._read(step, provenance=ocp.args.JsonRestore())['provenance']
        except Exception as error:
            return None, error
        self._check(step, found)
        try:
            restored = self._read(step, state=_restore_args(target))
            iterator.set_state(self._position(step, found['processes']))
        except Exception as error:
            return None, error
        return restored['state'], None

    def _check_same_everywhere(self) -> None:
        """Raises ValueError unless the newest step is the same in all processes, which would else wait in vain."""
        newest = max(self.steps(), default=None)
        if differ := agreement.difference('none' if newest is None else f'step {newest}'):
            raise ValueError(
                f'the processes of this run see different checkpoints in {self.directory} (the newest: {differ.first} '
                f'for process 0, {differ.other} for process {differ.process}): its file system may show them late; '
                'repeat the command'
            )

    def restore_parameters(self, target: Any, which: str) -> tuple[int, Any]:
        """Returns the step and the part of its state that `target` names.

        If the latest checkpoint cannot be read, the one before is used, with a warning. If a running training removes
        the checkpoint meanwhile, the steps are listed again.

        Args:
            target: ShapeDtypeStructs with shardings, e.g. {'params': …, 'collections': …}.
            which: 'latest' or 'best'.

        Raises:
            ValueError: there is no checkpoint, none has a validation loss, or none can be read.
            Exception: as `restore`.
        """
        return self._retry(lambda: self._restore_parameters(target, which))

    def _restore_parameters(self, target: Any, which: str) -> tuple[int, Any]:
        steps = self._candidates(which)
        if not steps:
            missing = 'checkpoint with a validation loss' if self.steps() else 'checkpoint'
            raise ValueError(f'{self.workdir} has no {missing} yet; train first, or wait for the first one')
        for step in steps:
            restored, error = self._read_part(step, target)
            if error is None:
                return step, restored
            if not self._exists(step):
                raise error
            logging.warning('checkpoint %d of %s cannot be read (%s)', step, self.workdir, corrupt.described(error))
        raise ValueError(
            f'no suitable checkpoint of {self.workdir} can be read (steps {", ".join(map(str, steps))}); '
            'restore it from a copy, or continue the training'
        )

    def _read_part(self, step: int, target: Any) -> tuple[Any, Exception | None]:
        """Returns the part of a state that `target` names; or, as the second value, an error that can mean damage."""
        try:
            return self._read(step, state=_restore_args(target, partial=True))['state'], None
        except Exception as error:
            if not corrupt.is_damage(error):
                raise
            return None, error

    def _candidates(self, which: str) -> list[int]:
        """Returns the suitable steps, the preferred one first."""
        if which != 'best':
            return self.steps()[::-1]
        best = self.best_step()
        return [] if best is None else [best]

    def _exists(self, step: int) -> bool:
        return (self.directory / str(step)).is_dir()

    def _retry(self, read: Callable[[], T]) -> T:
        """Calls `read`; repeats it if it fails while a running training removes steps."""
        for _ in range(_READ_ATTEMPTS - 1):
            before = _steps_on_disk(self.directory)
            if hasattr(self, 'manager'):  # its list may contain steps that have been removed since
                before |= set(self.manager.all_steps())
            try:
                return read()
            except Exception:
                if not self.read_only or before <= _steps_on_disk(self.directory):
                    raise
                if hasattr(self, 'manager'):
                    self.manager.reload()
        return read()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        kept = ', '.join(map(str, sorted(_steps_on_disk(self.directory)))) or 'none'
        way_out = f'make room and repeat the command; it continues from the last complete checkpoint (steps: {kept})'
        return paths.full_disk_explained(self.directory, 'a checkpoint', self._state_bytes, way_out)

    def _read(self, step: int, **items: Any) -> Any:
        with event_loops.waiting():
            return self.manager.restore(step, args=ocp.args.Composite(**items))

    def close(self, abandon: bool = False) -> None:
        """Waits for the save in progress; raises OSError as `save`.

        Args:
            abandon: do not wait, because another process is gone and the save cannot end.
        """
        if abandon:
            return
        self._wait_for_save()
        self.manager.close()

    def _wait_for_save(self) -> None:
        """Waits for the save in progress, then deletes the steps that it replaced."""
        with event_loops.waiting(), self._writing():
            self.manager.wait_until_finished()
        if jax.process_index() == 0 and not self.read_only and isinstance(self.directory, Path):
            shutil.rmtree(self.directory / 'deleted', ignore_errors=True)

    def _check_losses(self, read_only: bool) -> None:
        """Moves validation losses that are not JSON to WORKDIR/corrupt; with them, Orbax's manager does not start."""
        for file in self.directory.glob('*/metrics/metrics') if jax.process_index() == 0 else ():
            try:
                json.loads(file.read_text(encoding='utf-8'))
            except FileNotFoundError:  # a training has removed the step meanwhile
                continue
            except ValueError:
                step = file.parent.parent.name
                if read_only:
                    raise ValueError(
                        f'the validation loss of checkpoint {step} of {self.workdir} cannot be read; '
                        'continue the training, which moves it to WORKDIR/corrupt'
                    ) from None
                moved = corrupt.set_aside(self.workdir, file.parent, f'{step}.metrics')
                logging.warning(
                    'the validation loss of checkpoint %s cannot be read: moved to %s; '
                    'the checkpoint stays, but cannot be the best',
                    step,
                    moved,
                )
        if not read_only:
            multihost_utils.sync_global_devices('validation losses checked')

    def _check(self, step: int, saved: dict[str, Any]) -> None:
        key = 'data_fingerprint'
        if saved[key] != self.provenance[key]:
            raise ValueError(
                f'checkpoint {step} of {self.workdir} has {key} {saved[key]!r}, this run {self.provenance[key]!r}; '
                'point config.data.data_dir at the data of this run, or choose another --workdir'
            )

    def _position(self, step: int, processes: int) -> dict[str, Any]:
        """Returns the position in the data that `processes` processes saved.

        Each has written its own file, all with the same content: a position counts global batches, so that it holds
        for any number of processes (see `combiner.data.pipeline.train_batches`).
        """
        file = self.directory / str(step) / 'data' / f'process_0-of-{processes}.json'
        return json.loads(file.read_text(encoding='utf-8'))

    def _move_corrupt(self, unreadable: dict[int, Exception | None], good: int) -> None:
        if not unreadable:
            return
        for step, error in unreadable.items() if jax.process_index() == 0 else ():
            moved = corrupt.set_aside(self.workdir, self.directory / str(step), str(step))
            logging.warning(
                'checkpoint %d cannot be read (%s): moved to %s; continuing from step %d',
                step,
                corrupt.described(error),
                moved,
                good,
            )
        multihost_utils.sync_global_devices('corrupt checkpoints set aside')
        self.manager.reload()


def _steps_on_disk(directory: paths.AnyPath) -> set[int]:
    """Returns the steps that have a folder now."""
    return {int(path.name) for path in directory.glob('*') if path.name.isdigit()}


def _loss(metrics: dict[str, float]) -> float:
    return metrics.get(_LOSS, math.inf)
