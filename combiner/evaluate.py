"""Evaluates a trained model on a whole split, each example exactly once.

    python -m combiner.evaluate --workdir DIR [--split test] [--parameters latest|best|ema]

Parameters: of the latest checkpoint, of the one with the lowest validation loss, or the latest moving
average.

Prints bits/dim, beside it what PNG and lossless WebP need on the same images, and writes
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

from combiner import checkpoint, cli, losses, metrics, models, sharding
from combiner.data import codecs, pipeline, tasks

PARAMETERS = ('latest', 'best', 'ema')


class Trained(NamedTuple):
    """A model with parameters, as evaluation and sampling need it."""

    config: Any
    task: tasks.Task
    model: nn.Module
    mesh: Mesh
    step: int
    variables: dict[str, Any]


def eval_step(variables: Any, batch: dict[str, jax.Array], *, model: nn.Module) -> Any:
    """Sums over one batch; tokens of weight 0 (padding) and examples made of them do not count."""
    weights = batch['weights']
    logits: Any = model.apply(variables, batch['tokens'], deterministic=True)
    nats = losses.token_nats(logits, batch['tokens'])
    return metrics.eval_metrics((nats * weights).sum(), weights.sum(), (weights > 0).any(axis=1).sum())


def make_eval_step(model: nn.Module) -> Any:
    """The compiled `eval_step`; arguments keep the shardings that they come with."""
    return jax.jit(functools.partial(eval_step, model=model))


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
    task: tasks.Task, split: str, config: Any, mesh: Mesh, limit: int | None = None
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
    task = tasks.get(config.task)
    model = models.build(task.head, task.vocab_size, task.shape, config.model.to_dict())
    with sharding.use(mesh):
        tokens = jnp.zeros((sharding.batch_parts(mesh), task.length), jnp.int32)
        variables = sharding.place(jax.eval_shape(model.init, jax.random.key(0), tokens), mesh)
    name = 'ema' if parameters == 'ema' else 'params'
    target = {name: variables.pop('params'), 'collections': variables}
    step, restored = checkpoints.restore_parameters(target, 'best' if parameters == 'best' else 'latest')
    checkpoints.close()
    return Trained(config, task, model, mesh, step, {'params': restored[name], **restored['collections']})


def evaluate(workdir: str | os.PathLike[str], split: str = 'test', parameters: str = 'latest') -> dict[str, Any]:
    """Evaluates a run on all of a split and writes WORKDIR/evaluation_SPLIT_PARAMETERS.json.

    Returns:
        loss_nats (per token), bits_per_dim, nats (in all), examples, tokens, step, split, parameters, task,
        dataset, metric (the figure to report) and, for images, codecs_bits_per_dim: what codecs need on the same
        images.

    Raises:
        ValueError: as `load`, or an unknown split.
    """
    if split not in tasks.SPLITS:
        raise ValueError(f'unknown split {split!r}; known: {", ".join(tasks.SPLITS)}')
    trained = load(workdir, parameters)
    task, config = trained.task, trained.config
    with sharding.use(trained.mesh):
        total = over_batches(
            make_eval_step(trained.model),
            trained.variables,
            batches(task, split, config, trained.mesh),
            trained.mesh,
        )
    result = {
        'task': task.name,
        'dataset': task.dataset,
        'metric': task.metric,
        'split': split,
        'parameters': parameters,
        'step': trained.step,
        **metrics.summarize(total),
        'nats': float(total.loss_nats.total),
        'tokens': int(total.loss_nats.count),
        'examples': int(total.examples.total),
    }
    if len(task.shape) == 3:
        source = tasks.open_split(task, split, config.data.data_dir)
        images = np.stack([source[i]['image'] for i in range(len(source))])
        result['codecs_bits_per_dim'] = codecs.bits_per_dim(images)
    if jax.process_index() == 0:
        path = Path(workdir) / f'evaluation_{split}_{parameters}.json'
        checkpoint.replace_file(path, json.dumps(result, indent=2) + '\n')
    return result


def report(result: dict[str, Any]) -> str:
    """The result as the lines that the command prints."""
    unit = result['metric'].replace('_per_', '/')
    lines = [
        f'{result["dataset"]}, {result["split"]}: {result["examples"]:,} examples, {result["tokens"]:,} tokens',
        f'{result["parameters"]} parameters (step {result["step"]:,}): {result[result["metric"]]:.4f} {unit}',
        f'  = {result["loss_nats"]:.4f} nats a token, {result["nats"]:,.0f} nats in all',
    ]
    if 'codecs_bits_per_dim' in result:
        lines.append(f'on the same images, {unit}:')
        lines += [f'  {name:<16} {value:.4f}' for name, value in result['codecs_bits_per_dim'].items()]
    return '\n'.join(lines)


def command() -> None:
    """The command line."""
    workdir = flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
    split = flags.DEFINE_enum('split', 'test', tasks.SPLITS, 'What to evaluate on.')
    parameters = flags.DEFINE_enum('parameters', 'latest', PARAMETERS, "Which of the run's parameters.")
    cli.run(lambda: print(report(evaluate(workdir.value, split.value, parameters.value))))


if __name__ == '__main__':
    command()
