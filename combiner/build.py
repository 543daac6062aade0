"""Builds the task, the model and the batches of a config, for training and evaluation alike."""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from combiner import models, sharding
from combiner.data import pipeline, tasks
from combiner.data.task import Task


def task(config: Any) -> Task:
    """Builds the task of a config.

    Raises:
        ValueError: the task or one of its options is unknown, or an option has a bad value.
    """
    return tasks.make(config.task, **config.data.options)


def model(config: Any, task: Task) -> nn.Module:
    """Builds the model of a config; raises as `models.build`."""
    settings = config.model.to_dict()
    return models.build(task.head, task.vocab_size, task.shape, settings, task.classes, packed=task.packed)


def check_numbers(config: Any, mesh: Mesh) -> None:
    """Refuses counts below 1, and a batch that does not split over mesh and micro-batches.

    Raises:
        ValueError: a number is out of range, or does not divide.
    """
    counts = {f'run.{name}': value for name, value in config.run.items()}
    counts |= {'steps': config.steps, 'data.batch_size': config.data.batch_size}
    counts |= {'optimizer.accumulation': config.optimizer.accumulation}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f'config.{name}={value} must be at least 1')
    parts, micro_batches = sharding.batch_parts(mesh), config.optimizer.accumulation
    divisor = parts * micro_batches
    if config.data.batch_size % divisor:
        suitable = -(-config.data.batch_size // divisor) * divisor
        fewer_parts = (
            ', or split the batch over fewer devices: --config.mesh.model=N (heads) and --config.mesh.context=N '
            '(positions) use N of them otherwise; CUDA_VISIBLE_DEVICES=0 leaves one GPU, JAX_PLATFORMS=cpu none'
        )
        raise ValueError(
            f'config.data.batch_size={config.data.batch_size} must be a multiple of '
            f'{parts} (mesh data x fsdp) x {micro_batches} (optimizer.accumulation): give '
            f'--config.data.batch_size={suitable}' + fewer_parts * (parts > 1)
        )


def describe(config: Any, task: Task) -> str:
    """Returns one line on the model of a config, and on what a training step reads."""
    model, attention = config.model, config.model.attention.to_dict()
    hyper = ''.join(f'+{name}={value}' for name, value in attention.items() if name != 'name' and value is not None)
    layers = f'{model.layers} layer{"s" * (model.layers != 1)}'
    return (
        f'{task.name}, {attention["name"]}{hyper}, {layers} of width {model.width}, '
        f'sequences of {task.length:,}, batches of {config.data.batch_size}'
    )


def describe_data(config: Any, task: Task) -> str:
    """Returns one line on the data of a config."""
    return task.dataset + ('' if config.data.data_dir is None else f', from {config.data.data_dir}')


def blank_tokens(task: Task, mesh: Mesh) -> jax.Array:
    """Returns zeros with the shape of the smallest batch of tokens that the mesh divides."""
    return jnp.zeros((sharding.batch_parts(mesh), *task.input_shape), jnp.int32)


def train_batches(config: Any, task: Task, mesh: Mesh | None = None) -> Iterable[dict[str, np.ndarray]]:
    """Opens the training batches of this process, by default all of them; raises as `pipeline.train_batches`.

    Args:
        config: of the run.
        task: of the config.
        mesh: over which the batches are split.
    """
    process_index, process_count = (0, 1) if mesh is None else sharding.share_of_process(mesh)
    return pipeline.train_batches(
        task,
        batch_size=config.data.batch_size,
        seed=config.seed,
        data_dir=config.data.data_dir,
        process_index=process_index,
        process_count=process_count,
    )


def eval_batch_size(config: Any, mesh: Mesh) -> int:
    """Returns run.eval_batch_size, rounded up to a number that the mesh divides."""
    parts = sharding.batch_parts(mesh)
    return -(-config.run.eval_batch_size // parts) * parts


def eval_batches(
    config: Any, task: Task, split: str, mesh: Mesh, limit: int | None = None, evaluation: str | None = None
) -> Iterable[dict[str, np.ndarray]]:
    """Opens the evaluation batches of this process, each of `eval_batch_size` examples.

    Args:
        config: of the run.
        task: of the config.
        split: to read.
        mesh: over which the batches are split.
        limit: number of examples to read, spread over the split; None for all.
        evaluation: one of the task's `evaluations`; None for the first.
    """
    process_index, process_count = sharding.share_of_process(mesh)
    return pipeline.eval_batches(
        task,
        split,
        batch_size=eval_batch_size(config, mesh),
        limit=limit,
        evaluation=evaluation,
        data_dir=config.data.data_dir,
        process_index=process_index,
        process_count=process_count,
    )
