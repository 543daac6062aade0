"""Trains a model from a config.

    python -m combiner.train --config configs/photos.py:attention=combiner_fixed --workdir DIR [--config.X.Y=…]

The same command again continues where the run stopped, however it stopped; on a CPU to bitwise the same parameters.
A second one while the first runs is refused (see `combiner.run_lock`).
Ctrl-C and SIGTERM save the current step, then exit with status 130 and 143; a second one stops at once. The
first non-finite loss, gradient or parameter stops the run with status 1, and is never saved.
"""

import functools
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from absl import flags
from clu import parameter_overview
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_flags

from combiner import checkpoint, cli, evaluate, metrics, optim, paths, provenance, run_config, run_lock, sharding
from combiner.data import pipeline
from combiner.data.task import Task


class State(struct.PyTreeNode):
    """All that a step changes or depends on besides its batch.

    Attributes:
        step: updates made so far.
        params: float32 parameters.
        opt_state: of optax.
        ema: moving average of the parameters, or None.
        collections: the model's other variables; {} for most models.
        rng: raw key data, as checkpoints hold plain arrays; constant: each step folds its number into it.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    collections: Any
    rng: Any


def initial_state(model: nn.Module, optimizer: optax.GradientTransformation, config: Any, tokens: Any) -> State:
    """The state before the first step; parameters are boxed with their logical axes."""
    key, rng = jax.random.split(jax.random.key(config.seed))
    collections = dict(model.init(key, tokens))
    params = collections.pop('params')
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=params if config.optimizer.ema_decay else None,
        collections=collections,
        rng=jax.random.key_data(rng),
    )


def weighted_sums(
    params: Any, collections: Any, batch: dict[str, jax.Array], key: jax.Array, model: nn.Module, count_hits: bool
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    """(nats, (sums, collections)): a batch's sum of weight · nats, all its sums, the model's updated collections."""
    logits, updated = model.apply(
        {'params': params, **collections},
        **evaluate.inputs(batch),
        deterministic=False,
        rngs={'dropout': key},
        mutable=list(collections),
    )
    sums = evaluate.batch_sums(logits, batch, count_hits)
    return sums['nats'], (sums, dict(updated))


def summed_gradients(
    params: Any,
    collections: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    model: nn.Module,
    count_hits: bool,
    parts: int,
) -> tuple[dict[str, jax.Array], Any, Any]:
    """(sums, gradients, collections) of a batch: sums, taken over `parts` micro-batches one after the other.

    Sums, not means, so that the number of parts changes neither loss nor gradient, whatever the weights.
    """
    gradient = jax.grad(weighted_sums, has_aux=True)
    if parts == 1:
        gradients, (sums, collections) = gradient(params, collections, batch, key, model, count_hits)
        return sums, gradients, collections

    def add(carry: Any, micro: tuple[Any, dict[str, jax.Array]]) -> tuple[Any, dict[str, jax.Array]]:
        gradients, collections = carry
        index, batch = micro
        key_of_part = jax.random.fold_in(key, index)
        extra, (sums, collections) = gradient(params, collections, batch, key_of_part, model, count_hits)
        return (jax.tree.map(jnp.add, gradients, extra), collections), sums

    def split(x: jax.Array) -> jax.Array:
        # Example i goes to micro-batch i mod parts, so that each micro-batch stays spread over all devices.
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, sharding.BATCH_AXES))

    start = (jax.tree.map(jnp.zeros_like, params), collections)
    (gradients, collections), sums = jax.lax.scan(add, start, (jnp.arange(parts), jax.tree.map(split, batch)))
    return jax.tree.map(jnp.sum, sums), gradients, collections


def train_step(
    state: State,
    batch: dict[str, jax.Array],
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    count_hits: bool,
    accumulation: int,
    ema_decay: float,
) -> tuple[State, Any]:
    """One update from one batch: a pure function, the same on any mesh up to the order of sums.

    A batch in which no target counts (all weights are zero) has no mean loss: it changes nothing but the step's number.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    sums, gradients, collections = summed_gradients(
        state.params, state.collections, batch, key, model, count_hits, accumulation
    )
    empty = sums['targets'] == 0
    gradients = jax.tree.map(lambda g: g / jnp.where(empty, 1, sums['targets']), gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    number = optim.updates_made(state.opt_state, state.step)
    ema = None if state.ema is None else optim.average(state.ema, params, ema_decay, number)
    new = state.replace(params=params, opt_state=opt_state, ema=ema, collections=collections)
    new = jax.tree.map(lambda new, old: jnp.where(empty, old, new), new, state)
    norms = optax.tree.norm(gradients), optax.tree.norm(new.params)
    return new.replace(step=state.step + 1), metrics.train_metrics(sums, *norms, rate(number))


def step_of(
    config: Any, task: Task, model: nn.Module, optimizer: optax.GradientTransformation
) -> Callable[[State, dict[str, jax.Array]], tuple[State, Any]]:
    """`train_step` with all that a config says of it."""
    return functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        rate=optim.schedule(config.optimizer, config.steps),
        count_hits='accuracy' in task.metrics,
        accumulation=config.optimizer.accumulation,
        ema_decay=config.optimizer.ema_decay,
    )


def check_numbers(config: Any, mesh: Mesh) -> None:
    """Raises ValueError for counts below 1, or a batch that does not split over mesh and micro-batches."""
    counts = {f'run.{name}': value for name, value in config.run.items()}
    counts |= {'steps': config.steps, 'data.batch_size': config.data.batch_size}
    counts |= {'optimizer.accumulation': config.optimizer.accumulation}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f'config.{name}={value} must be at least 1')
    parts = sharding.batch_parts(mesh)
    if config.data.batch_size % (parts * config.optimizer.accumulation):
        raise ValueError(
            f'config.data.batch_size={config.data.batch_size} must be a multiple of '
            f'{parts} (mesh data x fsdp) x {config.optimizer.accumulation} (optimizer.accumulation)'
        )


def check_finite(step: int, measured: Any) -> None:
    """Checks a step's metrics.

    Raises:
        FloatingPointError: loss, gradient or parameters are not finite; says at which step, with the values.
    """
    values = metrics.summarize(measured, ())
    names = ('loss_nats', 'gradient_norm', 'parameter_norm')
    found = {name: values[name] for name in names if name in values}  # without targets there is no loss
    if not all(map(math.isfinite, found.values())):
        found = ', '.join(f'{name} {value:g}' for name, value in found.items())
        raise FloatingPointError(
            f'training diverged at step {step}: {found}; the last checkpoint is from before. '
            'Lower optimizer.learning_rate, lengthen warmup_steps or set clip_norm, in a new --workdir'
        )


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Gives a function that returns the number of the first Ctrl-C or SIGTERM since, or 0.

    Several processes must stop at the same step; there Orbax's preemption service, which jax.distributed
    starts, decides instead.
    """
    if jax.process_count() > 1:
        yield lambda: 0
        return
    received = []
    signals = (signal.SIGINT, signal.SIGTERM)

    def handle(number: int, _: Any) -> None:
        received.append(number)
        for each in signals:
            signal.signal(each, previous[each])

    previous = {each: signal.getsignal(each) for each in signals}
    for each in signals:
        signal.signal(each, handle)
    try:
        yield lambda: received[0] if received else 0
    finally:
        for each in signals:
            signal.signal(each, previous[each])


def train(config: Any, workdir: str | os.PathLike[str], devices: Sequence[Any] | None = None) -> State:
    """Trains to config.steps, from the newest checkpoint in `workdir` if any; returns the final state.

    The mesh is made of `devices`, by default all there are.

    Raises:
        ValueError: anything wrong in the config, or a workdir that holds another run, or in which a training runs.
        OSError: the disk is full; what is there stays whole.
        FloatingPointError: a loss, gradient or parameter is not finite.
        SystemExit: with 130 or 143, after Ctrl-C or SIGTERM and a save.
    """
    config, workdir = paths.with_data_dir(config), paths.local(workdir, 'workdir')
    run = config.run
    task = evaluate.task_of(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    check_numbers(config, mesh)
    model = evaluate.model_of(config, task)
    optimizer = optim.optimizer(config.optimizer, config.steps)
    batches = pipeline.train_batches(
        task,
        batch_size=config.data.batch_size,
        seed=config.seed,
        data_dir=config.data.data_dir,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

    with sharding.use(mesh), stop_signals() as stopped, ExitStack() as stack:
        # The state: shapes first, so that it is made, or restored, right where it belongs.
        tokens = evaluate.blank_tokens(task, mesh)
        initialize = functools.partial(initial_state, model, optimizer, config, tokens)
        target = sharding.place(jax.eval_shape(initialize), mesh)
        placement = jax.tree.map(lambda leaf: leaf.sharding, target)
        check_lock = stack.enter_context(run_lock.locked(workdir, stopped))
        run_config.claim(workdir, config, target)
        data_dir = config.data.data_dir
        checkpoints = checkpoint.Checkpoints(
            workdir,
            pipeline.fingerprint(task, 'train', data_dir),
            validated_on=pipeline.examples_evaluated(task, 'validation', limit=run.eval_examples, data_dir=data_dir),
        )
        iterator = iter(batches)
        state = checkpoints.restore(target, iterator)
        if state is None:
            state = jax.jit(lambda: nn.meta.unbox(initialize()), out_shardings=placement)()
        start = int(state.step)
        provenance.claim(workdir, provenance.fingerprints(task, config.data.data_dir))

        replicated = NamedSharding(mesh, PartitionSpec())
        step_function = jax.jit(
            step_of(config, task, model, optimizer),
            in_shardings=(placement, sharding.batch_sharding(mesh)),
            out_shardings=(placement, replicated),
            donate_argnums=0,
        )
        eval_step = evaluate.make_eval_step(model, task)

        def validate(params: Any, collections: Any) -> dict[str, float]:
            """The values of a validation by name."""
            batches = evaluate.batches(task, 'validation', config, mesh, run.eval_examples)
            total = evaluate.over_batches(eval_step, {'params': params, **collections}, batches, mesh)
            return metrics.summarize(total, task.metrics, 'validation_')

        writer = metrics.Writer(workdir, start)
        progress = metrics.Progress(start, config.steps, config.data.batch_size * math.prod(task.input_shape))
        if jax.process_index() == 0:
            table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
            progress.say(f'{table}\n{task.dataset}; {mesh.size} {jax.default_backend()} devices; step {start}')

        kept = {'params': target.params, 'collections': target.collections}
        losses = checkpoints.validate_again(kept, lambda found: validate(**found).get('validation_loss_nats'))
        for step, old, new in losses:
            changed = 'on other examples than now' if new is None else f'on other examples; on those of now {new:.4f}'
            progress.say(f'checkpoint {step}: validation loss {old:.4f} was measured {changed}')

        window = None  # metrics of the steps since the last line
        told_of_empty = False

        def read(step: int, measured: Any) -> None:
            """Waits for a step's metrics; stops the run if they are not finite; writes every log_every."""
            nonlocal window, told_of_empty
            measured = metrics.to_host(measured)
            check_finite(step, measured)
            if measured.empty_batches.total and not told_of_empty:
                told_of_empty = True
                progress.say(f'step {step}: no target of the batch counts, so it changed nothing; see empty_batches')
            window = measured if window is None else window.merge(measured)
            progress.advance()
            if step % run.log_every == 0 or step == config.steps:
                values = metrics.summarize(window, task.metrics)
                values['tokens_per_second'] = progress.report(step, metrics.headline(values, task.metrics))
                writer.write(step, values)
                window = None

        pending = None
        try:
            for step in range(start + 1, config.steps + 1):
                state, measured = step_function(state, sharding.put_batch(next(iterator), mesh))
                if pending is not None:
                    read(*pending)  # of the step before, while the device works on this one
                pending = (step, measured)

                signal_number = stopped() or checkpoints.manager.reached_preemption(step) * signal.SIGTERM
                last = step == config.steps or signal_number
                evaluating = step % run.eval_every == 0 or step == config.steps
                if not (last or evaluating or step % run.checkpoint_every == 0):
                    continue
                read(*pending)  # nothing that is not known to be finite is validated or saved
                pending = None
                with progress.pause():
                    validation_loss = None
                    if evaluating:
                        values = validate(state.params, state.collections)
                        validation_loss = values.get('validation_loss_nats')
                        if validation_loss is not None and not math.isfinite(validation_loss):
                            raise FloatingPointError(f'validation_loss_nats {validation_loss} at step {step}')
                        writer.write(step, values)
                        figure = metrics.headline(values, task.metrics, 'validation_')
                        progress.say(f'step {step}: validation {figure}')
                    if last or step % run.checkpoint_every == 0:
                        check_lock()
                        checkpoints.save(step, state, iterator, validation_loss)
                if signal_number:
                    progress.say(f'stopped by signal {signal_number} after saving step {step}; run again to continue')
                    raise SystemExit(128 + signal_number)
        finally:
            progress.close()
            try:
                checkpoints.close()
            finally:
                writer.close()
    return state


def command() -> None:
    """The command line."""
    config = config_flags.DEFINE_config_file('config', None, 'Config file, with its arguments after a colon.')
    workdir = flags.DEFINE_string('workdir', None, 'Folder that keeps the run.', required=True)
    flags.mark_flag_as_required('config')

    def main() -> None:
        train(config.value, workdir.value)

    cli.run(main)


if __name__ == '__main__':
    command()
