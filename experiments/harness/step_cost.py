"""The cost of a row: training steps of configs, compiled and timed in turn in one process.

The method is that of `experiments.harness.timing`. All states are held at once, so that nothing but steps lies between
two measurements.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax

from combiner import build, optim, sharding, steps
from combiner.aot import programs
from experiments.harness import errors, timing


class Step:
    """The compiled training step of a config on one device, with its state and one batch that every step reads.

    Attributes:
        tokens: in a batch.
        state: after the last step.
        compile_seconds: time to compile.
        memory_mb: state, batch and all temporaries of a step, as XLA plans them.
    """

    def __init__(self, config: Any) -> None:
        task = build.task(config)
        model, optimizer = build.model(config, task), optim.optimizer(config.optimizer, config.steps)
        batch = next(iter(build.train_batches(config, task)))
        self.tokens = batch['tokens'].size
        self._mesh = sharding.make_mesh(devices=jax.devices()[:1])
        with sharding.use(self._mesh):
            tokens = build.blank_tokens(task, self._mesh)
            make = functools.partial(steps.initial_state, model, optimizer, config, tokens)
            self.state = jax.jit(lambda: nn.meta.unbox(make()))()
            self._batch = sharding.put_batch(batch, self._mesh)
            step = steps.make_train_step(config, task, model, optimizer)
            began = time.perf_counter()
            self._program = jax.jit(step, donate_argnums=0).lower(self.state, self._batch).compile()
            self.compile_seconds = time.perf_counter() - began
        self.memory_mb = programs.memory(self._program)['total_bytes'] / 1e6

    def __call__(self) -> float:
        """Takes a step; returns its seconds."""
        began = time.perf_counter()
        with sharding.use(self._mesh):
            self.state, measured = self._program(self.state, self._batch)
            jax.block_until_ready((self.state, measured))
        return time.perf_counter() - began


@contextlib.contextmanager
def _noting_errors(found: dict[Any, Any], name: Any) -> Iterator[None]:
    """Notes an error, such as of too little memory, in one line: the other rows are measured all the same."""
    try:
        yield
    except Exception as error:
        found[name] = f'{type(error).__name__}: {errors.lines(error)[0]}'


def time_interleaved(configs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, dict[str, float] | str]:
    """Returns the cost of a step of each config, or the error in one line.

    Args:
        configs: functions that return a config, by name.
        rounds: how often all steps are taken in turn.

    Returns:
        By name seconds_per_step (the median), memory_mb and compile_seconds.
    """
    timed: dict[Any, Step] = {}
    found: dict[Any, Any] = {}
    for name, make in configs.items():
        with _noting_errors(found, name):
            timed[name] = Step(make())
    for name in list(timed):  # with all states held: memory may run out now
        with _noting_errors(found, name):
            timed[name]()
        if name in found:
            del timed[name]
    for name, seconds in timing.medians(timed, rounds).items():
        step = timed[name]
        found[name] = {
            'seconds_per_step': seconds,
            'memory_mb': step.memory_mb,
            'compile_seconds': step.compile_seconds,
        }
    return {name: found[name] for name in configs}
