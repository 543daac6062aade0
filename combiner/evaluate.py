"""Evaluates a trained model on a whole split, or on `run.test_examples` of it, each example exactly once.

    python -m combiner.evaluate --workdir DIR [--split test] [--parameters latest|best|ema]
        [--examples N] [--data_dir DIR] [--out FILE] [--other_data]

Parameters: of the latest checkpoint, of the one with the lowest validation loss, or the latest moving
average.

Prints the figures of the task (for images bits/dim, beside it what PNG and lossless WebP need; for text those on the
stream of documents and those on each document by itself) and writes DIR/evaluation_SPLIT_PARAMETERS.json, or FILE.
Where that cannot be written the figures are printed all the same, and the status is 1. Data that are not those of the
training are refused; with --other_data their figures go to a file of their own, and so do those of --examples, so many
evenly spaced examples.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import tqdm
from absl import flags, logging
from jax.sharding import Mesh

from combiner import atomic, build, checkpoint, cli, metrics, paths, provenance, run_config, sharding, steps
from combiner.data import codecs
from combiner.data.indices import evenly_spaced
from combiner.data.task import SPLITS, Task, open_split

PARAMETERS = ('latest', 'best', 'ema')
# A codec at its strongest is slow.
MOST_IMAGES_FOR_CODECS = 2000


class Trained(NamedTuple):
    """A model with parameters, as evaluation and sampling need it."""

    config: Any
    task: Task
    model: nn.Module
    mesh: Mesh
    step: int
    variables: dict[str, Any]


def load(
    workdir: str | os.PathLike[str],
    parameters: str = 'latest',
    mesh: Mesh | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Trained:
    """The model of a run, on `mesh` (default: all devices, data-parallel, whatever mesh it was trained on).

    The config says where the data lie: in `data_dir`, by default where they lay in training.

    Raises:
        ValueError: unknown `parameters`, no run or no checkpoint there, or EMA asked of a run without.
    """
    if parameters not in PARAMETERS:
        raise ValueError(f'unknown parameters {parameters!r}; known: {", ".join(PARAMETERS)}')
    config = paths.with_data_dir(run_config.load(workdir), data_dir)
    if parameters == 'ema' and not config.optimizer.ema_decay:
        raise ValueError(f'{workdir} keeps no EMA (config.optimizer.ema_decay = 0); choose latest or best')
    checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
    mesh = mesh or sharding.make_mesh()
    task = build.task(config)
    model = build.model(config, task)
    with sharding.use(mesh):
        tokens = build.blank_tokens(task, mesh)
        variables = sharding.place(jax.eval_shape(model.init, jax.random.key(0), tokens), mesh)
    name = 'ema' if parameters == 'ema' else 'params'
    target = {name: variables.pop('params'), 'collections': variables}
    step, restored = checkpoints.restore_parameters(target, 'best' if parameters == 'best' else 'latest')
    checkpoints.close()
    return Trained(config, task, model, mesh, step, {'params': restored[name], **restored['collections']})


def measure(
    trained: Trained, split: str, limit: int | None = None, evaluations: Iterable[str | None] = (None,)
) -> dict[str | None, dict[str, Any]]:
    """Returns the figures of a model on a split, for each of these `evaluations` of its task.

    Returns:
        For each: the task's figures by name, loss_nats (per target), nats (in all), targets (tokens or classes that
        count), examples, of_examples (that the split has), context (what a prediction sees).

    Raises:
        ValueError: no target counts in what was read.
    """
    task, config, mesh = trained.task, trained.config, trained.mesh
    step = steps.make_eval_step(trained.model, task)
    found: dict[str | None, dict[str, Any]] = {}
    for name in evaluations:
        evaluated = task.evaluated(name)
        size = len(open_split(evaluated, split, config.data.data_dir))
        count = -(-len(evenly_spaced(size, limit)) // build.eval_batch_size(config, mesh))
        read = build.eval_batches(config, task, split, mesh, limit, name)
        with sharding.use(mesh), tqdm.tqdm(read, total=count, unit='batch', dynamic_ncols=True, disable=None) as bar:
            total = steps.evaluate_batches(step, trained.variables, bar, mesh)
        if not total.loss_nats.count:
            raise ValueError(
                f'no target counts in what was read of {task.name} ({split}): there is nothing to evaluate; '
                'choose another split, or read more of it (config.run.test_examples)'
            )
        found[name] = {
            **metrics.summarize(total, task.metrics),
            'nats': float(total.loss_nats.total),
            'targets': int(total.loss_nats.count),
            'examples': int(total.examples.total),
            'of_examples': size,
            'context': evaluated.context,
        }
    return found


def evaluate(
    workdir: str | os.PathLike[str],
    split: str = 'test',
    parameters: str = 'latest',
    *,
    examples: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    other_data: bool = False,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Evaluates a run on a split (see above) and writes WORKDIR/evaluation_SPLIT_PARAMETERS.json, or `out`.

    Where that cannot be written, it is said in the log: the figures are returned all the same.

    Args:
        workdir: the run's folder.
        split: what to evaluate on.
        parameters: one of `PARAMETERS`.
        examples: so many evenly spaced examples; None for run.test_examples of the run's config.
        data_dir: where data sets lie; None for where they lay in training.
        other_data: whether the split and the tokenizer may be others than at the training (see `provenance.check`).
        out: the file to write; None for the one in the workdir.

    Returns:
        task, dataset, split, parameters, step; metrics (the names of the figures, the one to report first); what
        `measure` returns; evaluations (for tasks that have several: the same of each, by name; the first is the one
        above); for language models of images, codecs_bits_per_dim: what codecs need on the same images (of many, on
        `codecs_images` evenly spaced ones).

    Raises:
        ValueError: as `load` and `provenance.check`, or an unknown split, or `examples` below 1, or no target counts.
    """
    path = None if out is None else paths.local(out, 'out')
    result, place = figures(workdir, split, parameters, examples=examples, data_dir=data_dir, other_data=other_data)
    try:
        write(result, path or place)
    except OSError as error:
        logging.error('%s', error)
    return result


def write(result: dict[str, Any], path: Path) -> None:
    """Writes a result as JSON, in the first process.

    Raises:
        OSError: that cannot be written.
    """
    if jax.process_index():
        return
    try:
        atomic.write_text(path, json.dumps(result, indent=2) + '\n')
    except OSError as error:
        raise paths.unwritable(path, error, 'the figures are only printed; --out names another file') from None


def figures(
    workdir: str | os.PathLike[str],
    split: str = 'test',
    parameters: str = 'latest',
    *,
    examples: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    other_data: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Returns what `evaluate` does, and the file in the workdir that is for it; writes nothing."""
    if split not in SPLITS:
        raise ValueError(f'unknown split {split!r}; known: {", ".join(SPLITS)}')
    trained = load(workdir, parameters, data_dir=data_dir)
    task, config = trained.task, trained.config
    ending = provenance.check(workdir, task, split, config.data.data_dir, other_data)
    ending += '' if examples is None else f'_{examples}_examples'
    limit = config.run.test_examples if examples is None else examples
    measured = measure(trained, split, limit, task.evaluations or (None,))
    result = {
        'task': task.name,
        'dataset': task.dataset,
        'metrics': list(task.metrics),
        'split': split,
        'parameters': parameters,
        'step': trained.step,
        **next(iter(measured.values())),
        **({'evaluations': measured} if task.evaluations else {}),
        **_codecs(task, split, config, limit),
    }
    return result, paths.local(workdir, 'workdir') / f'evaluation_{split}_{parameters}{ending}.json'


def _codecs(task: Task, split: str, config: Any, limit: int | None) -> dict[str, Any]:
    """What codecs need on the images that are evaluated; {} where there are none."""
    if len(task.shape) != 3 or task.head != 'language_model':
        return {}
    source = open_split(task, split, config.data.data_dir)
    evaluated = evenly_spaced(len(source), limit)
    chosen = evaluated[evenly_spaced(len(evaluated), MOST_IMAGES_FOR_CODECS)]
    needed = codecs.bits_per_dim(np.stack([source[int(i)]['image'] for i in chosen]))
    return {'codecs_bits_per_dim': needed, 'codecs_images': len(chosen)}


def report(result: dict[str, Any]) -> str:
    """The result as the lines that the command prints."""
    lines = [
        f'{result["dataset"]}, {result["split"]}: {_counts(result)}',
        f'{result["parameters"]} parameters (step {result["step"]:,}): {_figures(result, result["metrics"])}',
        f'  = {result["loss_nats"]:.4f} nats a target, {result["nats"]:,.0f} nats in all',
        f'  each target given {result["context"]}',
    ]
    for name, other in list(result.get('evaluations', {}).items())[1:]:
        lines += [
            f'evaluation={name}: {_figures(other, result["metrics"])}',
            f'  {_counts(other)}, each given {other["context"]}',
        ]
    if 'codecs_bits_per_dim' in result:
        lines.append(f'on {result["codecs_images"]:,} of these images, bits/dim:')
        lines += [f'  {name:<16} {value:.4f}' for name, value in result['codecs_bits_per_dim'].items()]
    return '\n'.join(lines)


def _figures(result: dict[str, Any], names: Iterable[str]) -> str:
    return ', '.join(metrics.headline(result, [name]) for name in names)


def _counts(result: dict[str, Any]) -> str:
    part = result['examples'] < result['of_examples']
    of = f' of {result["of_examples"]:,}' if part else ''
    return f'{result["examples"]:,}{of} examples{", evenly spaced" if part else ""}, {result["targets"]:,} targets'


def command() -> None:
    """The command line."""
    workdir = flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
    split = flags.DEFINE_enum('split', 'test', SPLITS, 'What to evaluate on.')
    parameters = flags.DEFINE_enum('parameters', 'latest', PARAMETERS, "Which of the run's parameters.")
    examples = flags.DEFINE_integer('examples', None, 'So many evenly spaced examples (default: run.test_examples).')
    data_dir = flags.DEFINE_string('data_dir', None, 'Where data sets lie; by default as in training.')
    out = flags.DEFINE_string('out', None, 'Where to write the figures as JSON; by default into the workdir.')
    other_data = flags.DEFINE_bool('other_data', False, 'Evaluate although the data are not those of the training.')

    def main() -> None:
        path = None if out.value is None else paths.local(out.value, 'out')
        result, place = figures(
            workdir.value,
            split.value,
            parameters.value,
            examples=examples.value,
            data_dir=data_dir.value,
            other_data=other_data.value,
        )
        try:
            print(report(result), flush=True)
        finally:  # also where nobody reads them any more
            try:
                write(result, path or place)
            except OSError as error:
                cli.fail(error.strerror or str(error), 1)

    cli.run(main)


if __name__ == '__main__':
    command()
