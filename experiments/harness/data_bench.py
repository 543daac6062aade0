"""Times the input pipeline and the model that reads from it, each alone: `python scripts/bench.py data`."""

import argparse
import statistics
import time
from typing import Any

from combiner import build, cli, messages, paths
from experiments.harness import step_cost
from experiments.harness.run import parse_config
from experiments.harness.timing import environment, write_json

CONFIGS = ['configs/photos.py:size=32', 'configs/text.py', 'configs/text.py:task=mlm']
HEAD = ('| task | length | pipeline, tokens/s | model, tokens/s | |', '|---|---|---|---|---|')


def pipeline_rate(config: Any, seconds: float) -> float:
    """Returns the tokens per second of a pipeline that is only read, after its first two batches."""
    batches = iter(build.train_batches(config, build.task(config)))
    for _ in range(2):
        next(batches)
    tokens, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        tokens += next(batches)['tokens'].size
    return tokens / (time.perf_counter() - started)


def model_rate(config: Any, count: int) -> float:
    """Returns the tokens per second of training steps on one batch: the median of `count`, after the first."""
    step = step_cost.Step(config)
    step()
    return step.tokens / statistics.median(step() for _ in range(count))


def measure(config: Any, seconds: float, count: int) -> dict[str, Any]:
    """Returns one row: the rates of the config's pipeline and of its model."""
    fed, used = pipeline_rate(config, seconds), model_rate(config, count)
    row: dict[str, Any] = {'task': config.task, 'length': build.task(config).length}
    row |= {'pipeline_tokens_per_second': round(fed), 'model_tokens_per_second': round(used)}
    return row | {'times': round(fed / used, 1)}


def line(row: dict[str, Any]) -> str:
    """Returns a row of the printed table."""
    rates = (f'{row[f"{name}_tokens_per_second"]:,}' for name in ('pipeline', 'model'))
    return f'| `{row["task"]}` | {row["length"]:,} | {" | ".join(rates)} | {row["times"]:,}× |'


@cli.guarded
def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog='scripts/bench.py data', description=__doc__)
    parser.add_argument('configs', nargs='*', default=CONFIGS, help=f'config files (default: {" ".join(CONFIGS)})')
    parser.add_argument('--data_dir', type=paths.argument, help='folder of prepared data sets')
    parser.add_argument('--layers', type=int, default=6)
    parser.add_argument('--width', type=int, default=512)
    parser.add_argument('--seconds', type=float, default=5, help='of reading each pipeline')
    parser.add_argument('--steps', type=int, default=3, help='of each model')
    parser.add_argument('--out', type=paths.argument, help='write JSON there')
    options = parser.parse_args(arguments)
    messages.heading(device=environment()['device'], configs=', '.join(options.configs))
    print(*HEAD, sep='\n')
    rows = []
    for path in options.configs:
        config = paths.with_data_dir(parse_config(['--config', path]), options.data_dir)
        config.model.update(layers=options.layers, width=options.width, heads=max(1, options.width // 64))
        config.model.qkv_width = None
        rows.append({'config': path, **measure(config, options.seconds, options.steps)})
        print(line(rows[-1]), flush=True)
        if options.out:
            write_json(options.out, {**environment(), 'rows': rows})
