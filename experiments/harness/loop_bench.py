"""Times the training loop against its bare steps: `python scripts/bench.py loop`.

The loop is that of `combiner.train`: it reads batches, waits for the metrics of each step, checks and logs them. It
neither validates nor saves, which the config schedules. The bare steps are the same compiled program on one batch that
lies on the device. Both run in turn in one process. The overhead is the median over rounds of the ratio of their times,
once by the clock and once in CPU time of all threads, which on a CPU depends less on what else the machine does.
"""

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from combiner import build, cli, messages, optim, paths, sharding, steps, train
from combiner.monitoring import trackers
from combiner.monitoring.log import Log
from combiner.monitoring.profiling import Profile
from combiner.monitoring.writer import Writer
from experiments.harness.run import parse_config
from experiments.harness.timing import environment, write_json

QUICKSTART = 'configs/photos.py'
WAYS = ('bare', 'loop')
CLOCKS = ('', 'cpu_')


class Steps:
    """Steps of a config, bare or in the loop; every call continues from the one before."""

    def __init__(self, config: Any, workdir: Path, count: int) -> None:
        self.config, self.count = config, count
        self.task = build.task(config)
        self.mesh = sharding.make_mesh(**config.mesh)
        model, optimizer = build.model(config, self.task), optim.optimizer(config.optimizer, config.steps)
        self.batches = iter(build.train_batches(config, self.task))
        with sharding.use(self.mesh):
            tokens = build.blank_tokens(self.task, self.mesh)
            initialize = functools.partial(steps.initial_state, model, optimizer, config, tokens)
            target = sharding.place(jax.eval_shape(initialize), self.mesh)
            placed = jax.tree.map(lambda leaf: leaf.sharding, target)
            make = jax.jit(lambda: nn.meta.unbox(initialize()), out_shardings=placed)
            self.states = {name: make() for name in WAYS}
            self.batch = sharding.put_batch(next(self.batches), self.mesh)
            step = steps.compile_step(steps.make_train_step(config, self.task, model, optimizer), target, self.mesh)
            self.log = Log(config, self.task, self.mesh, 0, Writer(workdir, 0, trackers.parse('tensorboard')))
            self.log.progress.silent = True
            none = Profile(range(0), 0, workdir, self.log.say)
            self.stepper = train.Stepper(step, self.batches, self.mesh, none, self.log)
            self.program = step.lower(self.states['bare'], self.batch).compile()

    def bare(self) -> tuple[float, float]:
        """Takes bare steps; returns the seconds of one, by the clock and of CPU time."""
        state = self.states['bare']
        began = _clocks()
        with sharding.use(self.mesh):
            for _ in range(self.count):
                state, measured = self.program(state, self.batch)
            jax.block_until_ready((state, measured))
        self.states['bare'] = state
        return self._seconds_since(began)

    def loop(self) -> tuple[float, float]:
        """Takes as many steps in the loop; returns the seconds of one, as `bare`."""
        state = self.states['loop']
        config = self.config.copy_and_resolve_references()
        config.steps = int(state.step) + self.count
        config.run.eval_every = config.run.checkpoint_every = self.config.steps
        began = _clocks()
        with sharding.use(self.mesh):
            state = train.run_steps(
                state,
                config,
                take_step=self.stepper,
                validate=lambda params, collections: {},
                save=lambda step, state, loss: None,
                stop_signal=lambda step: 0,
                log=self.log,
            )
            jax.block_until_ready(state)
        self.states['loop'] = state
        return self._seconds_since(began)

    def _seconds_since(self, began: tuple[float, float]) -> tuple[float, float]:
        clock, cpu = (after - before for before, after in zip(began, _clocks(), strict=True))
        return clock / self.count, cpu / self.count


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def measure(config: Any, count: int, rounds: int) -> dict[str, float]:
    """Returns the median milliseconds of a step, bare and in the loop, and the overhead as a share of the bare step."""
    with tempfile.TemporaryDirectory() as folder:
        timed = Steps(config, Path(folder), count)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        for number in range(rounds + 1):
            for name in WAYS:
                taken = getattr(timed, name)()
                if number:  # the first round compiles
                    seconds[name].append(taken)
        timed.log.writer.close()
    found = {}
    for index, clock in enumerate(CLOCKS):
        bare, loop = ([each[index] for each in seconds[name]] for name in WAYS)
        found |= {f'bare_{clock}ms': 1e3 * statistics.median(bare), f'loop_{clock}ms': 1e3 * statistics.median(loop)}
        found[f'{clock}overhead'] = statistics.median(b / a for a, b in zip(bare, loop, strict=True)) - 1
    return found


@cli.guarded
def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog='scripts/bench.py loop', description=__doc__)
    parser.add_argument('config', nargs='?', default=QUICKSTART, help='config file (default: %(default)s)')
    parser.add_argument('--data_dir', type=paths.argument, help='folder of prepared data sets')
    parser.add_argument('--steps', type=int, default=8, help='of each round (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=15, help='default: %(default)s')
    parser.add_argument('--out', type=paths.argument, help='write JSON there')
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.rounds < 1:
        parser.error(f'--steps={options.steps} and --rounds={options.rounds} must be at least 1')
    config = paths.with_data_dir(parse_config(['--config', options.config]), options.data_dir)
    messages.heading(device=environment()['device'], config=options.config)
    found = {'config': options.config, 'steps': options.steps, 'rounds': options.rounds}
    found |= measure(config, options.steps, options.rounds)
    print(
        f'{options.config}: {found["bare_ms"]:.2f} ms a bare step, {found["loop_ms"]:.2f} ms in the loop; '
        f'overhead {found["overhead"]:+.1%}, in CPU time {found["cpu_overhead"]:+.1%}'
    )
    if options.out:
        write_json(options.out, {**environment(), **found})
