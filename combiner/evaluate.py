"""Evaluates a trained model on a whole split, or on `run.test_examples` of it, each example exactly once.

    python -m combiner.evaluate --workdir DIR [--split test] [--parameters latest|best|ema]

Parameters: of the latest checkpoint, of the one with the lowest validation loss, or the latest moving
average.

Prints the figures of the task (for images bits/dim, beside it what PNG and lossless WebP need) and writes
DIR/evaluation_SPLIT_PARAMETERS.json.
"""

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from combiner import atomic, checkpoint, cli, losses, metrics, models, sharding
from combiner.data import codecs, pipeline, tasks
from combiner.data.indices import evenly_spaced
from combiner.data.task import SPLITS, Task, open_split

PARAMETERS = ('latest', 'best', 'ema')
# A codec at its strongest takes some 10 ms an image.
MOST_IMAGES_FOR_CODECS = 2000


class Trained(NamedTuple):
    """A model with parameters, as evaluation and sampling need it."""

    config: Any
    task: Task
    model: nn.Module
    mesh: Mesh
    step: int
    variables: dict[str, Any]


def task_of(config: Any) -> Task:
    """The task of a config.

    Raises:
        ValueError: the task or one of its options is unknown, or has a bad value.
    """
    return tasks.make(config.task, **config.data.options)


def model_of(config: Any, task: Task) -> nn.Module:
    """The model of a config; errors as `models.build`."""
    config = config.model.to_dict()
    return models.build(task.head, task.vocab_size, task.shape, config, task.classes, packed=task.packed)


def blank_tokens(task: Task, mesh: Mesh) -> jax.Array:
    """Tokens for shapes: of the smallest batch that the mesh divides."""
    return jnp.zeros((sharding.batch_parts(mesh), *task.input_shape), jnp.int32)


def inputs(batch: dict[str, jax.Array]) -> dict[str, Any]:
    """The part of a batch that a model reads: its arguments."""
    return {name: batch[name] for name in ('tokens', 'valid', 'segments') if name in batch}


def batch_sums(logits: Any, batch: dict[str, jax.Array], count_hits: bool) -> dict[str, jax.Array]:
    """Sums over one batch: weight · nats, weights ('targets'), and where asked weight · hits.

    Padding, of weight 0, counts nowhere.
    """
    weights = batch['weights']
    sums = {'nats': (losses.target_nats(logits, batch['targets']) * weights).sum(), 'targets': weights.sum()}
    return sums | ({'hits': (losses.hits(logits, batch['targets']) * weights).sum()} if count_hits else {})


def eval_step(variables: Any, batch: dict[str, jax.Array], *, model: nn.Module, count_hits: bool) -> Any:
    """Sums over one batch; besides those of `batch_sums` the examples, and the words and bytes where they are told."""
    logits: Any = model.apply(variables, **inputs(batch), deterministic=True)
    weights = batch['weights'].reshape(len(batch['weights']), -1)
    sums = batch_sums(logits, batch, count_hits) | {'examples': (weights > 0).any(axis=1).sum()}
    return metrics.eval_metrics(sums | {name: batch[name].sum() for name in ('words', 'bytes') if name in batch})


def make_eval_step(model: nn.Module, task: Task) -> Any:
    """The compiled `eval_step`; arguments keep the shardings that they come with."""
    return jax.jit(functools.partial(eval_step, model=model, count_hits='accuracy' in task.metrics))


def over_batches(step: Any, variables: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh) -> Any:
    """Metrics of all batches together, on the host; call within `sharding.use(mesh)`."""
    total = None
    for batch in batches:
        part = metrics.to_host(step(variables, sharding.put_batch(batch, mesh)))
        total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError('nothing to evaluate: the split has no examples')
    return total


def batches(
    task: Task, split: str, config: Any, mesh: Mesh, limit: int | None = None
) -> Iterable[dict[str, np.ndarray]]:
    """The evaluation batches of this process, of run.eval_batch_size rounded up to what the mesh divides."""
    parts = sharding.batch_parts(mesh)
    return pipeline.eval_batches(
        task,
        split,
        batch_size=-(-config.run.eval_batch_size // parts) * parts,
        limit=limit,
        data_dir=config.data.data_dir,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def load(workdir: str | os.PathLike[str], parameters: str = 'latest', mesh: Mesh | None = None) -> Trained:
    """The model of a run, on `mesh` (default: all devices, data-parallel, whatever mesh it was trained on).

    Raises:
        ValueError: unknown `parameters`, no run or no checkpoint there, or EMA asked of a run without.
    """
    if parameters not in PARAMETERS:
        raise ValueError(f'unknown parameters {parameters!r}; known: {", ".join(PARAMETERS)}')
    config = checkpoint.load_config(workdir)
    if parameters == 'ema' and not config.optimizer.ema_decay:
        raise ValueError(f'{workdir} keeps no EMA (config.optimizer.ema_decay = 0); choose latest or best')
    checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
    mesh = mesh or sharding.make_mesh()
    task = task_of(config)
    model = model_of(config, task)
    with sharding.use(mesh):
        tokens = blank_tokens(task, mesh)
        variables = sharding.place(jax.eval_shape(model.init, jax.random.key(0), tokens), mesh)
    name = 'ema' if parameters == 'ema' else 'params'
    target = {name: variables.pop('params'), 'collections': variables}
    step, restored = checkpoints.restore_parameters(target, 'best' if parameters == 'best' else 'latest')
    checkpoints.close()
    return Trained(config, task, model, mesh, step, {'params': restored[name], **restored['collections']})


def evaluate(workdir: str | os.PathLike[str], split: str = 'test', parameters: str = 'latest') -> dict[str, Any]:
    """Evaluates a run on a split (see above) and writes WORKDIR/evaluation_SPLIT_PARAMETERS.json.

    Returns:
        task, dataset, split, parameters, step; metrics (the names of the figures, the one to report first), each
        figure by its name; loss_nats (per target), nats (in all), targets (tokens or classes that count), examples;
        context (what a prediction sees); for language models of images, codecs_bits_per_dim: what codecs need on
        the same images (of many, on `codecs_images` evenly spaced ones).

    Raises:
        ValueError: as `load`, an unknown split, or no target in it counts.
    """
    if split not in SPLITS:
        raise ValueError(f'unknown split {split!r}; known: {", ".join(SPLITS)}')
    trained = load(workdir, parameters)
    task, config = trained.task, trained.config
    with sharding.use(trained.mesh):
        total = over_batches(
            make_eval_step(trained.model, task),
            trained.variables,
            batches(task, split, config, trained.mesh, config.run.test_examples),
            trained.mesh,
        )
    if not total.loss_nats.count:
        raise ValueError(
            f'no target counts in what was read of {task.name} ({split}): there is nothing to evaluate; '
            'choose another split, or read more of it (config.run.test_examples)'
        )
    result = {
        'task': task.name,
        'dataset': task.dataset,
        'metrics': list(task.metrics),
        'context': task.context,
        'split': split,
        'parameters': parameters,
        'step': trained.step,
        **metrics.summarize(total, task.metrics),
        'nats': float(total.loss_nats.total),
        'targets': int(total.loss_nats.count),
        'examples': int(total.examples.total),
    }
    if len(task.shape) == 3 and task.head == 'language_model':
        source = open_split(task, split, config.data.data_dir)
        evaluated = evenly_spaced(len(source), config.run.test_examples)
        chosen = evaluated[evenly_spaced(len(evaluated), MOST_IMAGES_FOR_CODECS)]
        result['codecs_bits_per_dim'] = codecs.bits_per_dim(np.stack([source[int(i)]['image'] for i in chosen]))
        result['codecs_images'] = len(chosen)
    if jax.process_index() == 0:
        path = Path(workdir) / f'evaluation_{split}_{parameters}.json'
        atomic.write_text(path, json.dumps(result, indent=2) + '\n')
    return result


def report(result: dict[str, Any]) -> str:
    """The result as the lines that the command prints."""
    figures = ', '.join(metrics.headline(result, [name]) for name in result['metrics'])
    lines = [
        f'{result["dataset"]}, {result["split"]}: {result["examples"]:,} examples, {result["targets"]:,} targets',
        f'{result["parameters"]} parameters (step {result["step"]:,}): {figures}',
        f'  = {result["loss_nats"]:.4f} nats a target, {result["nats"]:,.0f} nats in all',
        f'  each target given {result["context"]}',
    ]
    if 'codecs_bits_per_dim' in result:
        lines.append(f'on {result["codecs_images"]:,} of these images, bits/dim:')
        lines += [f'  {name:<16} {value:.4f}' for name, value in result['codecs_bits_per_dim'].items()]
    return '\n'.join(lines)


def command() -> None:
    """The command line."""
    workdir = flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
    split = flags.DEFINE_enum('split', 'test', SPLITS, 'What to evaluate on.')
    parameters = flags.DEFINE_enum('parameters', 'latest', PARAMETERS, "Which of the run's parameters.")
    cli.run(lambda: print(report(evaluate(workdir.value, split.value, parameters.value))))


if __name__ == '__main__':
    command()
