"""Times what saving costs a training: `python scripts/bench.py saving`.

Stretches of training steps with one save at their start and without one are timed in turn in one process. A save is
written in the background, so that it costs the steps twice: they wait for the call, and on a CPU they share the cores
with the writing. The cost of a save is the difference of the two stretches; the share is this cost over the time of the
steps from one save to the next, as the config has it.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from combiner import build, cli, messages, paths
from combiner.run import checkpoint
from experiments.harness import step_cost
from experiments.harness.run import parse_config
from experiments.harness.timing import environment, write_json

CONFIGS = ['configs/photos.py', 'configs/text.py']
HEAD = (
    '| config | state, MB | step, ms | the call, ms | a save costs, ms | saves every | share of the steps |',
    '|---|---|---|---|---|---|---|',
)


def timed(step: step_cost.Step, count: int, save: Any = None) -> float:
    """Returns the seconds of `count` steps, after `save` if it is given."""
    began = time.perf_counter()
    if save is not None:
        save()
    for _ in range(count):
        step()
    return time.perf_counter() - began


def measure(name: str, config: Any, rounds: int, folder: Path) -> dict[str, Any]:
    """Returns one row; the checkpoints lie in `folder`."""
    step = step_cost.Step(config)
    iterator = iter(build.train_batches(config, build.task(config)))
    checkpoints = checkpoint.Checkpoints(folder)
    calls, number = [], 0

    def save() -> None:
        nonlocal number
        number += 1
        began = time.perf_counter()
        checkpoints.save(number, step.state, iterator)
        calls.append(time.perf_counter() - began)

    for _ in range(2):  # compiles; the second deletes nothing yet, the third does
        step()
        began = time.perf_counter()
        save()
        checkpoints.manager.wait_until_finished()
        writing = time.perf_counter() - began
    seconds = statistics.median(step() for _ in range(5))
    count = max(5, math.ceil(3 * writing / seconds))  # the background work ends within the stretch
    calls.clear()
    with_save, without = [], []
    for _ in range(rounds):
        without.append(timed(step, count))
        with_save.append(timed(step, count, save))
    checkpoints.close()
    seconds = statistics.median(without) / count
    cost = statistics.median(a - b for a, b in zip(with_save, without, strict=True))
    every = config.run.checkpoint_every
    return {
        'config': name,
        'state_mb': round(sum(leaf.nbytes for leaf in jax.tree.leaves(step.state)) / 1e6, 1),
        'seconds_per_step': seconds,
        'call_seconds': statistics.median(calls),
        'cost_seconds': cost,
        'checkpoint_every': every,
        'share': cost / (every * seconds),
    }


def line(row: dict[str, Any]) -> str:
    """Returns a row of the printed table."""
    milliseconds = (f'{1e3 * row[f"{name}"]:,.0f}' for name in ('seconds_per_step', 'call_seconds', 'cost_seconds'))
    every = f'{row["checkpoint_every"]:,} steps'
    return f'| `{row["config"]}` | {row["state_mb"]} | {" | ".join(milliseconds)} | {every} | {row["share"]:.2%} |'


@cli.guarded
def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog='scripts/bench.py saving', description=__doc__)
    parser.add_argument('configs', nargs='*', default=CONFIGS, help=f'config files (default: {" ".join(CONFIGS)})')
    parser.add_argument('--rounds', type=int, default=9, help='of the two stretches (default: %(default)s)')
    parser.add_argument('--workdir', type=paths.argument, help='on the disk to measure (default: a temporary folder)')
    parser.add_argument('--out', type=paths.argument, help='write JSON there')
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    messages.heading(device=environment()['device'], configs=', '.join(options.configs))
    print('', *HEAD, sep='\n')
    for name in options.configs:
        with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
            rows.append(measure(name, parse_config(['--config', name]), options.rounds, Path(folder)))
        print(line(rows[-1]), flush=True)
    if options.out:
        write_json(options.out, {**environment(), 'rows': rows})
