"""Trains a model from a config.

    python -m combiner.train --config configs/photos.py:attention=combiner_fixed --workdir DIR [--config.X.Y=…]
        [--tracker tensorboard,wandb] [--profile FROM:TO]

The same command resumes a run after any interruption; on a CPU to bitwise the same parameters.
A second command is refused while the first runs (see `combiner.run.workdir_lock`).
Ctrl-C and SIGTERM save the current step, then exit with status 130 and 143; a second one stops at once. The
first non-finite loss, gradient or parameter stops the run with status 1, and is never saved.

Several processes train one model together (see `combiner.run.processes`). Then SIGTERM or Ctrl-C to any of them saves
the same step everywhere, and all exit with status 143; only a second Ctrl-C stops at once.
"""

import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import flax.linen as nn
import jax
from absl import flags
from clu import parameter_overview
from jax.sharding import Mesh
from ml_collections import config_flags

from combiner import build, messages, metrics, optim, paths, sharding, startup, steps
from combiner.data import pipeline
from combiner.data.task import Task
from combiner.monitoring import profiling, trackers
from combiner.monitoring.log import Log
from combiner.monitoring.profiling import Profile
from combiner.monitoring.writer import Writer
from combiner.run import checkpoint, processes, provenance, saved_config, warm_start, workdir_lock
from combiner.steps import State


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of the first Ctrl-C or SIGTERM received, or 0.

    Several processes must stop at the same step; there JAX's preemption service receives SIGTERM and decides instead.
    Ctrl-C becomes SIGTERM, and the function returns 0.
    """
    received = []
    alone = jax.process_count() == 1
    signals = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)

    def handle(number: int, _: Any) -> None:
        for each in signals:
            signal.signal(each, previous[each])
        if alone:
            received.append(number)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    previous = {each: signal.getsignal(each) for each in signals}
    for each in signals:
        signal.signal(each, handle)
    try:
        yield lambda: received[0] if received else 0
    finally:
        for each in signals:
            signal.signal(each, previous[each])


def open_checkpoints(workdir: paths.AnyPath, config: Any, task: Task) -> checkpoint.Checkpoints:
    """Opens the checkpoints of a run, with fingerprints of its training and validation examples."""
    data_dir, limit = config.data.data_dir, config.run.eval_examples
    return checkpoint.Checkpoints(
        workdir,
        pipeline.fingerprint(task, 'train', data_dir),
        validated_on=pipeline.examples_evaluated(task, 'validation', limit=limit, data_dir=data_dir),
    )


def restore_or_initialize(
    checkpoints: checkpoint.Checkpoints,
    target: State,
    iterator: Any,
    initialize: Callable[[], State],
    init_from: str | None = None,
) -> warm_start.Start:
    """Restores the newest checkpoint, and the position of the iterator; without one, makes the first state.

    Args:
        checkpoints: of the run.
        target: shapes and shardings of the state.
        iterator: over the training batches.
        initialize: returns the first state, boxed.
        init_from: workdir of a run whose backbone the first state gets; it is not read if there is a checkpoint.
    """
    state = checkpoints.restore(target, iterator)
    if state is not None:
        return warm_start.Start(state, {}, '')
    placement = jax.tree.map(lambda leaf: leaf.sharding, target)
    state = jax.jit(lambda: nn.meta.unbox(initialize()), out_shardings=placement)()
    return warm_start.load(init_from, state) if init_from else warm_start.Start(state, {}, '')


class Stepper:
    """Takes training steps: reads a batch, and compiles the step for the first.

    Args:
        step: of `steps.compile_step`.
        batches: iterator over the batches of this process.
        mesh: over which they are split.
        profile: traces some steps.
        log: of the run.
    """

    def __init__(self, step: Any, batches: Any, mesh: Mesh, profile: Profile, log: Log) -> None:
        self.step, self.batches, self.mesh, self.profile, self.log = step, batches, mesh, profile, log
        self.program: Any = None

    def __call__(self, state: State) -> tuple[State, Any]:
        """Returns the next state and the step's metrics, without waiting for them."""
        return self.profile.trace(lambda: self._take(state))

    def _take(self, state: State) -> tuple[State, Any]:
        if self.program is not None:
            return self.program(state, sharding.put_batch(next(self.batches), self.mesh))
        with startup.timing('data'):
            batch = sharding.put_batch(next(self.batches), self.mesh)
        self.program = self.step.lower(state, batch).compile()
        self.log.say(self.log.meter.describe(self.program))
        return self.program(state, batch)


def make_validate(config: Any, task: Task, model: nn.Module, mesh: Mesh) -> Callable[..., dict[str, float]]:
    """Returns a function of `params` and `collections` that returns the values of a validation by name."""
    eval_step = steps.make_eval_step(model, task)
    batches = build.eval_batches(config, task, 'validation', mesh, config.run.eval_examples)

    def validate(params: Any, collections: Any) -> dict[str, float]:
        total = steps.evaluate_batches(eval_step, {'params': params, **collections}, batches, mesh)
        return metrics.summarize(total, task.metrics, 'validation_')

    return validate


def update_validation_losses(
    checkpoints: checkpoint.Checkpoints, target: State, validate: Callable[..., dict[str, float]], log: Log
) -> None:
    """Validates again the checkpoints whose losses were measured on other examples, so that losses compare."""
    kept = {'params': target.params, 'collections': target.collections}
    losses = checkpoints.validate_again(kept, lambda found: validate(**found).get('validation_loss_nats'))
    for step, old, new in losses:
        changed = 'on other examples than now' if new is None else f'on other examples; on those of now {new:.4f}'
        log.say(f'checkpoint {step}: validation loss {old:.4f} was measured {changed}')


def run_steps(
    state: State,
    config: Any,
    *,
    take_step: Callable[[State], tuple[State, Any]],
    validate: Callable[..., dict[str, float]],
    save: Callable[[int, State, float | None], None],
    stop_signal: Callable[[int], int],
    log: Log,
) -> State:
    """Takes the remaining steps; validates and saves as the config says, and saves before it stops.

    Args:
        state: the first state.
        config: of the run.
        take_step: reads a batch and returns the next state and the step's metrics, without waiting for them.
        validate: see `make_validate`.
        save: saves the state of a step with its validation loss, None without validation.
        stop_signal: returns the signal to stop after this step, or 0.
        log: of the run.

    Raises:
        FloatingPointError: see `Log`.
        SystemExit: after a signal and a save, with 128 + its number.
    """
    pending = None
    for step in range(int(state.step) + 1, config.steps + 1):
        state, measured = take_step(state)
        if pending is not None:
            log.step(*pending)  # of the previous step, while the device computes this one
        pending = (step, measured)

        number = stop_signal(step)
        validating = step % config.run.eval_every == 0 or step == config.steps
        saving = step % config.run.checkpoint_every == 0 or step == config.steps or number
        if not (validating or saving):
            continue
        log.step(*pending)  # only a finite state is validated or saved
        pending = None
        if saving:
            log.line(step)  # first: its steps are not taken again
        with log.progress.pause():
            loss = log.validation(step, validate(state.params, state.collections)) if validating else None
            if saving:
                save(step, state, loss)
        if number:
            log.say(f'stopped by signal {number} after saving step {step}; the same command continues')
            raise SystemExit(128 + number)
    return state


def make_save(
    checkpoints: checkpoint.Checkpoints, iterator: Any, check_lock: Callable[[], None], log: Log
) -> Callable[[int, State, float | None], None]:
    """Returns a function that saves the state of a step with its validation loss, None without validation.

    Args:
        checkpoints: of the run.
        iterator: over the training batches.
        check_lock: raises ValueError if another training has taken over the workdir.
        log: of the run.
    """

    def save(step: int, state: State, validation_loss: float | None) -> None:
        check_lock()
        log.writer.flush()  # first: what a checkpoint includes is never measured again
        checkpoints.save(step, state, iterator, validation_loss)

    return save


def show_start(workdir: paths.AnyPath, config: Any, task: Task, state: State, log: Log, origin: str) -> None:
    """Prints what is trained, how far it is and how long it takes, and its parameters, in the first process."""
    if jax.process_index():
        return
    step, count = int(state.step), sum(leaf.size for leaf in jax.tree.leaves(state.params))
    messages.heading(
        config=build.describe(config, task),
        data=build.describe_data(config, task),
        workdir=f'{workdir}, from step {step:,} to {config.steps:,}',
        parameters=f'{count:,}',
        origin=origin,
        time=log.expected_time(step),
    )
    log.say(parameter_overview.get_parameter_overview(state.params, include_stats=False))


def train(
    config: Any,
    workdir: str | os.PathLike[str],
    devices: Sequence[Any] | None = None,
    profile: range = range(0),
    tracker: str = 'tensorboard',
) -> State:
    """Trains to config.steps, from the newest checkpoint in `workdir` if any; returns the final state.

    The mesh is made of `devices`, by default of all. The steps of `profile` are traced, into WORKDIR/profile. The names
    of trackers are separated by commas (see `combiner.monitoring.trackers`).

    Raises:
        ValueError: the config is invalid, a tracker cannot work, or the workdir holds another run or a running one.
        OSError: the disk is full; existing checkpoints stay complete.
        FloatingPointError: a loss, gradient or parameter is not finite.
        SystemExit: with 130 or 143, after Ctrl-C or SIGTERM and a save.
    """
    config, workdir = paths.with_data_dir(config), paths.parse(workdir, 'workdir')
    task = build.task(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    build.check_numbers(config, mesh)
    profiling.check(profile, config.steps, workdir)
    chosen = trackers.parse(tracker)
    model, optimizer = build.model(config, task), optim.optimizer(config.optimizer, config.steps)
    with startup.timing('data'):
        iterator = iter(build.train_batches(config, task, mesh))

    with sharding.use(mesh), stop_signals() as stopped, ExitStack() as stack:
        # Shapes first, so that the state is made, or restored, on its own devices.
        initialize = functools.partial(steps.initial_state, model, optimizer, config, build.blank_tokens(task, mesh))
        target = sharding.place(jax.eval_shape(initialize), mesh)
        warm_start.check(config.init_from, workdir, target)
        data = provenance.of_all_processes(task, config.data.data_dir)
        check_lock = stack.enter_context(workdir_lock.locked(workdir, stopped))
        saved_config.claim(workdir, config, target)
        checkpoints = open_checkpoints(workdir, config, task)
        state, lineage, origin = restore_or_initialize(checkpoints, target, iterator, initialize, config.init_from)
        provenance.claim(workdir, data | lineage)

        step_function = steps.compile_step(steps.make_train_step(config, task, model, optimizer), target, mesh)
        validate = make_validate(config, task, model, mesh)
        writer = Writer(workdir, int(state.step), chosen, config.to_dict(), provenance.commit())
        stack.callback(writer.close)  # the last of the four
        log = Log(config, task, mesh, int(state.step), writer)
        trace = Profile(profile, int(state.step), workdir / 'profile', log.say)
        show_start(workdir, config, task, state, log, origin)
        update_validation_losses(checkpoints, target, validate, log)
        stack.push(lambda _, error, __: checkpoints.close(abandon=processes.lost(error)))
        stack.callback(log.progress.close)
        stack.callback(trace.close)
        return run_steps(
            state,
            config,
            take_step=Stepper(step_function, iterator, mesh, trace, log),
            validate=validate,
            save=make_save(checkpoints, iterator, check_lock, log),
            stop_signal=lambda step: stopped() or checkpoints.manager.reached_preemption(step) * signal.SIGTERM,
            log=log,
        )


def what_next(workdir: str, config: Any, tracker: str) -> list[str]:
    """Returns what can be done after a training: commands to copy."""
    samples = build.task(config).head == 'language_model'
    return [
        messages.module_command('combiner.evaluate', '--workdir', workdir),
        messages.module_command('combiner.sample', '--workdir', workdir) if samples else '',
        *trackers.views(tracker, paths.parse(workdir, 'workdir')),
    ]


def command() -> None:
    """Runs the command line."""
    config = config_flags.DEFINE_config_file('config', None, 'Config file, with its arguments after a colon.')
    workdir = flags.DEFINE_string('workdir', None, 'Folder that keeps the run.', required=True)
    profile = flags.DEFINE_string('profile', '', 'FROM:TO: writes a trace of these steps to WORKDIR/profile.')
    known = f'{", ".join(trackers.names())} or package.module:Class'
    tracker = flags.DEFINE_string('tracker', 'tensorboard', f'What shows the curves, separated by commas: {known}.')
    flags.mark_flag_as_required('config')

    def main() -> None:
        try:
            train(config.value, workdir.value, profile=profiling.parse(profile.value), tracker=tracker.value)
        except SystemExit:
            if jax.process_index() == 0:
                messages.next_steps(messages.same_command())
            raise
        if jax.process_index() == 0:
            messages.next_steps(*what_next(workdir.value, config.value, tracker.value))

    processes.run(main, preemption=True)


if __name__ == '__main__':
    command()
