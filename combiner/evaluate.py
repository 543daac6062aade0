"""Evaluates a trained model on a whole split, or on `run.test_examples` of it, each example exactly once.

    python -m combiner.evaluate --workdir DIR [--split test] [--parameters latest|best|ema]
        [--examples N] [--data_dir DIR] [--out FILE] [--other_data]

Parameters: of the latest checkpoint, of the one with the lowest validation loss, or the latest moving
average.

Prints the figures of the task and writes DIR/evaluation_SPLIT_PARAMETERS.json, or FILE. For images the figures are
bits/dim, with the bits/dim of PNG and lossless WebP; for text, one set on the stream of documents and one on each
document by itself. If the file cannot be written, the figures are printed nevertheless, and the status is 1. Data other
than in training are refused; with --other_data their figures go to a separate file. The figures of --examples, N
examples spread over the split, go to a separate file too. Several processes evaluate together (see
`combiner.run.processes`).
"""

import json
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import tqdm
from absl import flags, logging
from jax.sharding import Mesh

from combiner import atomic, build, cli, messages, metrics, paths, sharding, startup, steps
from combiner.data import codecs
from combiner.data.indices import spread
from combiner.data.pipeline import examples_evaluated
from combiner.data.task import SPLITS, Task, open_split
from combiner.run import agreement, checkpoint, processes, provenance, saved_config

PARAMETERS = ('latest', 'best', 'ema')
# A codec at its highest level is slow.
MOST_IMAGES_FOR_CODECS = 2000


class Trained(NamedTuple):
    """A model with its parameters, for evaluation and sampling."""

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
    """Loads the model of a run on `mesh` (default: all devices, data-parallel, whatever the mesh in training).

    Data are read from `data_dir`, by default from the folder used in training.

    Raises:
        ValueError: unknown `parameters`, no run or no checkpoint there, or EMA of a run without EMA.
    """
    if parameters not in PARAMETERS:
        raise ValueError(f'unknown parameters {parameters!r}; known: {", ".join(PARAMETERS)}')
    config = paths.with_data_dir(saved_config.load(workdir), data_dir)
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
        count), examples, of_examples (in the split), context (the inputs of a prediction).

    Raises:
        ValueError: no target counts in the examples.
    """
    task, config, mesh = trained.task, trained.config, trained.mesh
    step = steps.make_eval_step(trained.model, task)
    found: dict[str | None, dict[str, Any]] = {}
    for name in evaluations:
        evaluated = task.evaluated(name)
        size = len(open_split(evaluated, split, config.data.data_dir))
        examples = len(spread(size, limit))
        count = -(-examples // build.eval_batch_size(config, mesh))
        read = build.eval_batches(config, task, split, mesh, limit, name)
        timed = startup.Batches(read, logging.info)
        hidden = True if jax.process_index() else None  # None: unless on a terminal
        with sharding.use(mesh), tqdm.tqdm(timed, total=count, unit='batch', dynamic_ncols=True, disable=hidden) as bar:
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
            'examples': examples,
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

    If the file cannot be written, the log says so, and the figures are returned nevertheless.

    Args:
        workdir: the run's folder.
        split: the split to evaluate.
        parameters: one of `PARAMETERS`.
        examples: number of examples, spread over the split; None for run.test_examples of the run's config.
        data_dir: folder of the data sets; None for the one used in training.
        other_data: whether the split and the tokenizer may differ from training (see `provenance.check`).
        out: the file to write; None for the one in the workdir.

    Returns:
        task, dataset, split, parameters, step; limit (the most examples, or None for all); evaluated_on (which
        examples, see `pipeline.examples_evaluated`); metrics (the names of the figures, the one to report first); the
        result of `measure`; evaluations (for tasks that have several: the same of each, by name; the first is the one
        above); for language models of images, codecs_bits_per_dim: bits/dim of codecs on the same images (of many, on
        `codecs_images` of them).

    Raises:
        ValueError: as `load` and `provenance.check`, or an unknown split, or `examples` below 1, or no target counts.
    """
    path = None if out is None else paths.parse(out, 'out')
    result, place = figures(workdir, split, parameters, examples=examples, data_dir=data_dir, other_data=other_data)
    try:
        write(result, path or place)
    except OSError as error:
        logging.error('%s', error)
    return result


def write(result: dict[str, Any], path: paths.AnyPath) -> None:
    """Writes a result as JSON, in the first process.

    Raises:
        OSError: the file cannot be written.
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
) -> tuple[dict[str, Any], paths.AnyPath]:
    """Returns the result of `evaluate`, and its file in the workdir; writes nothing."""
    if split not in SPLITS:
        raise ValueError(f'unknown split {split!r}; known: {", ".join(SPLITS)}')
    trained = load(workdir, parameters, data_dir=data_dir)
    task, config = trained.task, trained.config
    ending = provenance.check(workdir, task, split, config.data.data_dir, other_data)
    ending += '' if examples is None else f'_{examples}_examples'
    limit = config.run.test_examples if examples is None else examples
    evaluated_on = examples_evaluated(task, split, limit=limit, data_dir=config.data.data_dir)
    if differ := agreement.difference(f'step {trained.step} on examples {evaluated_on}'):
        raise ValueError(
            f'the processes would not evaluate the same: process 0 has {differ.first}, process {differ.process} '
            f'{differ.other}; give all of them the same data, and repeat the command if a checkpoint came meanwhile'
        )
    show_start(trained, workdir, parameters)
    measured = measure(trained, split, limit, task.evaluations or (None,))
    result = {
        'task': task.name,
        'dataset': task.dataset,
        'metrics': list(task.metrics),
        'split': split,
        'parameters': parameters,
        'step': trained.step,
        'limit': limit,
        'evaluated_on': evaluated_on,
        **next(iter(measured.values())),
        **({'evaluations': measured} if task.evaluations else {}),
        **_codecs(task, split, config, limit),
    }
    return result, paths.parse(workdir, 'workdir') / f'evaluation_{split}_{parameters}{ending}.json'


def show_start(trained: Trained, workdir: str | os.PathLike[str], parameters: str) -> None:
    """Prints what a command has loaded, in the first process."""
    if jax.process_index() == 0:
        count = sum(leaf.size for leaf in jax.tree.leaves(trained.variables['params']))
        messages.heading(
            config=build.describe(trained.config, trained.task),
            data=build.describe_data(trained.config, trained.task),
            workdir=workdir,
            parameters=f'{count:,}, {parameters}, of step {trained.step:,}',
        )


def what_next(workdir: str, config: Any, data_dir: str | None = None) -> list[str]:
    """Returns what can be done after an evaluation, with the same data: commands to copy."""
    samples = build.task(config).head == 'language_model'
    same = ['--workdir', workdir, *([] if data_dir is None else ['--data_dir', data_dir])]
    return [
        messages.module_command('combiner.sample', *same) if samples else '',
        messages.module_command('combiner.evaluate', *same, '--parameters=best'),
        messages.module_command('combiner.export', *same, '--out', 'DIR'),
    ]


def _codecs(task: Task, split: str, config: Any, limit: int | None) -> dict[str, Any]:
    """Returns the bits/dim of codecs on the evaluated images; {} for other tasks."""
    if task.head != 'language_model' or len(task.shape) != 3 or task.shape[2] != 3 or task.vocab_size != 256:
        return {}
    source = open_split(task, split, config.data.data_dir)
    evaluated = spread(len(source), limit)
    chosen = evaluated[spread(len(evaluated), MOST_IMAGES_FOR_CODECS)]
    images = [task.transform(source[int(i)])['tokens'].reshape(task.shape) for i in chosen]
    needed = codecs.bits_per_dim(np.stack(images).astype(np.uint8))
    return {'codecs_bits_per_dim': needed, 'codecs_images': len(chosen)}


def report(result: dict[str, Any]) -> str:
    """Returns the result as the lines that the command prints."""
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
    return f'{result["examples"]:,}{of} examples{", spread over all" if part else ""}, {result["targets"]:,} targets'


def command() -> None:
    """Runs the command line."""
    workdir = flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
    split = flags.DEFINE_enum('split', 'test', SPLITS, 'What to evaluate on.')
    parameters = flags.DEFINE_enum('parameters', 'latest', PARAMETERS, "Which of the run's parameters.")
    examples = flags.DEFINE_integer('examples', None, 'So many, spread over the split (default: run.test_examples).')
    data_dir = flags.DEFINE_string('data_dir', None, 'Where data sets lie; by default as in training.')
    out = flags.DEFINE_string('out', None, 'Where to write the figures as JSON; by default into the workdir.')
    other_data = flags.DEFINE_bool('other_data', False, 'Evaluate although the data are not those of the training.')

    def main() -> None:
        path = None if out.value is None else paths.parse(out.value, 'out')
        result, place = figures(
            workdir.value,
            split.value,
            parameters.value,
            examples=examples.value,
            data_dir=data_dir.value,
            other_data=other_data.value,
        )
        try:
            if jax.process_index() == 0:
                print(report(result), flush=True)
        finally:  # also if the output was closed
            try:
                write(result, path or place)
            except OSError as error:
                cli.fail(error.strerror or str(error), 1)
        if jax.process_index() == 0:
            print(f'wrote {path or place}')
            messages.next_steps(*what_next(workdir.value, saved_config.load(workdir.value), data_dir.value))

    processes.run(main)


if __name__ == '__main__':
    command()
