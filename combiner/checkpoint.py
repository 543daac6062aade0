"""Everything that a workdir keeps of a run: its config, and checkpoints from which it continues exactly.

    WORKDIR/config.json          the resolved config
    WORKDIR/checkpoints/STEP/    parameters, optimiser, EMA, model state, random key, place in the data, provenance
    WORKDIR/corrupt/STEP/        checkpoints that could not be read, set aside
    WORKDIR/running.json         who trains, while a training runs (see `combiner.run_lock`)

The latest two and the best are kept. All of it is JSON and arrays: nothing is ever unpickled or executed.
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

from combiner import atomic, event_loops, paths

T = TypeVar('T')

# How often a reader lists the steps anew, as a training that saves has removed the one that was being read.
_READ_ATTEMPTS = 20

# What a checkpoint keeps of its validation.
_LOSS, _EXAMPLES = 'validation_loss_nats', 'validated_on'


def _restore_args(target: Any, partial: bool = False) -> ocp.args.PyTreeRestore:
    """Each array restored onto the sharding that `target` gives it, whatever mesh it was saved from."""
    return ocp.args.PyTreeRestore(
        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial
    )


class Checkpoints:
    """The checkpoints of one workdir; `best` is the one with the lowest validation loss.

    Args:
        workdir: the run's folder.
        fingerprint: of the training data; a checkpoint made with other data is refused.
        read_only: for evaluation and sampling, while a training may be writing.
        validated_on: identifies the examples of validation losses: only losses on the same examples are compared.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        fingerprint: str = '',
        read_only: bool = False,
        validated_on: str = '',
    ):
        self.workdir = paths.local(workdir, 'workdir').resolve()
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
            # latest step whenever the metric worsens, so what stays is said by policies.
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
            # A step is renamed before it is deleted: killed in between, no half a step stays listed.
            todelete_subdir='deleted',
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
        )
        self.manager = self._listed_anew(lambda: ocp.CheckpointManager(self.directory, options=options))

    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order."""
        return sorted(self.manager.all_steps())

    def save(self, step: int, state: Any, iterator: Any, validation_loss: float | None = None) -> None:
        """Saves in the background; the state may be donated and the iterator advanced once this returns.

        Raises:
            OSError: the disk is full, as this call or the one before it found; all whole checkpoints are still there.
        """
        self._wait_for_save()
        self._state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        with event_loops.finishing(), self._writing():
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
        """Replaces the losses that were measured on other examples than those of now.

        Args:
            target: see `restore_parameters`.
            validate: the loss of restored parameters on the examples of now, None if there is none.

        Yields:
            The step of a checkpoint, its old loss and its new one; None where it cannot be read any more.
        """
        for step in self.steps():
            measured = self.manager.metrics(step) or {}
            if _LOSS not in measured or measured.get(_EXAMPLES) == self.validated_on:
                continue
            loss = None
            try:
                restored = self._read(step, state=_restore_args(target, partial=True))['state']
            except Exception as error:  # a damaged file shows as any of a dozen exceptions
                logging.warning('checkpoint %d cannot be read (%s): it cannot be the best', step, _first_line(error))
            else:
                loss = validate(restored)
            if jax.process_index() == 0:
                file = self.directory / str(step) / 'metrics' / 'metrics'
                atomic.write_text(file, json.dumps(self._metrics(loss)))
            multihost_utils.sync_global_devices('validation loss replaced')
            self.manager.reload()
            yield step, measured[_LOSS], loss

    def best_step(self) -> int | None:
        """The step of the lowest validation loss; None if there is none.

        Where some losses were measured on other examples than the newest, those do not count.
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
        """The state of the newest checkpoint that can be read, or None if there is none; moves the iterator too.

        Newer ones that cannot be read are moved to WORKDIR/corrupt, with a warning.

        Args:
            target: the state as ShapeDtypeStructs with shardings.
            iterator: the training iterator.

        Raises:
            ValueError: the checkpoint was made with other data or by another number of processes; or there are
                checkpoints and none can be read (then none is moved).
        """
        unreadable: dict[int, Exception] = {}
        for step in reversed(self.steps()):
            try:
                found = self._read(step, provenance=ocp.args.JsonRestore())
            except Exception as error:  # a damaged file shows as any of a dozen exceptions
                unreadable[step] = error
                continue
            self._check(step, found['provenance'])
            try:
                restored = self._read(
                    step, state=_restore_args(target), data=grain.checkpoint.CheckpointRestore(iterator)
                )
            except Exception as error:
                unreadable[step] = error
                continue
            self._set_aside(unreadable, step)
            return restored['state']
        if unreadable:
            raise ValueError(
                f'no checkpoint in {self.directory} can be read (steps {", ".join(map(str, unreadable))}; '
                f'the newest: {_first_line(next(iter(unreadable.values())))}); '
                'restore them from a copy or choose another --workdir'
            )
        return None

    def restore_parameters(self, target: Any, which: str) -> tuple[int, Any]:
        """The step, and only what `target` asks for, e.g. {'params': …, 'collections': …}; which: 'latest' or 'best'.

        A latest checkpoint that cannot be read gives way to the one before it, with a warning. Where a training has
        removed it meanwhile, the steps are listed anew: what counts is the latest, or best, one then.

        Raises:
            ValueError: no checkpoint, none with a validation loss, or it cannot be read.
        """
        return self._listed_anew(lambda: self._restore_parameters(target, which))

    def _restore_parameters(self, target: Any, which: str) -> tuple[int, Any]:
        steps = self._candidates(which)
        if not steps:
            missing = 'checkpoint with a validation loss' if self.steps() else 'checkpoint'
            raise ValueError(f'{self.workdir} has no {missing} yet; train first, or wait for the first one')
        for step in steps:
            try:
                return step, self._read(step, state=_restore_args(target, partial=True))['state']
            except Exception as error:  # a damaged file shows as any of a dozen exceptions
                if not self._is_there(step):
                    raise
                logging.warning('checkpoint %d of %s cannot be read (%s)', step, self.workdir, _first_line(error))
        raise ValueError(
            f'no checkpoint of {self.workdir} that would do can be read (steps {", ".join(map(str, steps))}); '
            'restore it from a copy, or continue the training'
        )

    def _candidates(self, which: str) -> list[int]:
        """The steps that would do, best first."""
        if which != 'best':
            return self.steps()[::-1]
        best = self.best_step()
        return [] if best is None else [best]

    def _is_there(self, step: int) -> bool:
        return (self.directory / str(step)).is_dir()

    def _listed_anew(self, read: Callable[[], T]) -> T:
        """Reads; again where it fails and steps that were known before are gone, as a training goes on saving."""
        for _ in range(_READ_ATTEMPTS - 1):
            before = _numbers(self.directory)
            if hasattr(self, 'manager'):  # which may know of steps that went since it listed them
                before |= set(self.manager.all_steps())
            try:
                return read()
            except Exception:
                if not self.read_only or before <= _numbers(self.directory):
                    raise
                if hasattr(self, 'manager'):
                    self.manager.reload()
        return read()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        kept = ', '.join(map(str, sorted(_numbers(self.directory)))) or 'none'
        way_out = f'make room and start the same command again, which continues from the last whole step (kept: {kept})'
        return paths.full_disk_explained(self.directory, 'a checkpoint', self._state_bytes, way_out)

    def _read(self, step: int, **items: Any) -> Any:
        with event_loops.finishing():
            return self.manager.restore(step, args=ocp.args.Composite(**items))

    def close(self) -> None:
        """Waits for the save in progress; as `save` where the disk is full."""
        self._wait_for_save()
        self.manager.close()

    def _wait_for_save(self) -> None:
        """Waits for the save in progress, then frees the disk of the steps that it replaced."""
        with event_loops.finishing(), self._writing():
            self.manager.wait_until_finished()
        if jax.process_index() == 0 and not self.read_only:
            shutil.rmtree(self.directory / 'deleted', ignore_errors=True)

    def _check_losses(self, read_only: bool) -> None:
        """Sets aside a validation loss that is not JSON: on one, Orbax's manager would not even start."""
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
                        'continue the training, which sets it aside'
                    ) from None
                place = self._place_for(f'{step}.metrics')
                file.parent.rename(place)
                logging.warning(
                    'the validation loss of checkpoint %s cannot be read: moved to %s; '
                    'the checkpoint stays, but cannot be the best',
                    step,
                    place,
                )
        if not read_only:
            multihost_utils.sync_global_devices('validation losses checked')

    def _place_for(self, name: str) -> Path:
        """A path in WORKDIR/corrupt that is not taken: what was set aside earlier is evidence too."""
        place = self.workdir / 'corrupt' / name
        place.parent.mkdir(exist_ok=True)
        while place.exists():
            place = place.with_name(place.name + '+')
        return place

    def _check(self, step: int, saved: dict[str, Any]) -> None:
        for key, remedy in (
            (
                'data_fingerprint',
                'point config.data.data_dir at the data of this run, or choose another --workdir',
            ),
            ('processes', 'continue with as many processes as before: each has its place in the data'),
        ):
            if saved[key] != self.provenance[key]:
                raise ValueError(
                    f'checkpoint {step} of {self.workdir} has {key} {saved[key]!r}, '
                    f'this run {self.provenance[key]!r}; {remedy}'
                )

    def _set_aside(self, unreadable: dict[int, Exception], good: int) -> None:
        if not unreadable:
            return
        for step, error in unreadable.items() if jax.process_index() == 0 else ():
            place = self._place_for(str(step))
            (self.directory / str(step)).rename(place)
            logging.warning(
                'checkpoint %d cannot be read (%s): moved to %s; continuing from step %d',
                step,
                _first_line(error),
                place,
                good,
            )
        multihost_utils.sync_global_devices('corrupt checkpoints set aside')
        self.manager.reload()


def _numbers(directory: Path) -> set[int]:
    """The steps whose folders are there now."""
    return {int(path.name) for path in directory.glob('*') if path.name.isdigit()}


def _loss(metrics: dict[str, float]) -> float:
    return metrics.get(_LOSS, math.inf)


def _first_line(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}' if str(error) else repr(error)
