"""The loss of a language model by position."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jaxtyping import Array, Float

from combiner import build, cli, evaluate, losses, messages, paths, sharding, steps
from combiner.run import provenance, saved_config


class Loss(NamedTuple):
    """Loss at the positions `first` to `last`.

    Attributes:
        first, last: inclusive.
        nats: mean over the targets with weight.
        targets: number of these targets.
    """

    first: int
    last: int
    nats: float
    targets: int


def sums(
    variables: Any, batch: dict[str, jax.Array], *, model: nn.Module
) -> tuple[Float[Array, ' l'], Float[Array, ' l']]:
    """Returns nats and weights of a batch at every position, summed over its sequences."""
    logits: Any = model.apply(variables, **steps.model_inputs(batch), deterministic=True)
    nats = losses.target_nats(logits, batch['targets']) * batch['weights']
    return nats.sum(axis=0), batch['weights'].sum(axis=0)


def in_ranges(nats: Float[np.ndarray, ' l'], weights: Float[np.ndarray, ' l']) -> list[Loss]:
    """Returns the mean loss over ranges of positions that double; skips ranges without targets."""
    found = []
    first, last = 0, 0
    while first < len(nats):
        positions = slice(first, last + 1)
        if targets := float(weights[positions].sum()):
            mean = float(nats[positions].sum()) / targets
            found.append(Loss(first, min(last, len(nats) - 1), mean, round(targets)))
        first, last = last + 1, 2 * last + 1 if last else 1
    return found


def loss_by_position(
    workdir: Path,
    split: str = 'test',
    examples: int | None = None,
    parameters: str = 'latest',
    data_dir: Path | None = None,
) -> list[Loss]:
    """Returns the losses of a run on a split, or on `examples` examples spread over it.

    Raises:
        ValueError: see `evaluate.load` and `provenance.check`; or the run is no causal language model; or no target
            has weight.
    """
    head = build.task(saved_config.load(workdir)).head
    if head != 'language_model':
        raise ValueError(
            f'{workdir} has the head {head}; only a language_model goes from left to right; give the --workdir of one'
        )
    trained = evaluate.load(workdir, parameters, data_dir=data_dir)
    provenance.check(workdir, trained.task, split, trained.config.data.data_dir)
    step = jax.jit(lambda variables, batch: sums(variables, batch, model=trained.model))
    nats = weights = jnp.zeros(trained.task.length)
    with sharding.use(trained.mesh):
        for batch in build.eval_batches(trained.config, trained.task, split, trained.mesh, examples):
            added = step(trained.variables, sharding.put_batch(batch, trained.mesh))
            nats, weights = nats + added[0], weights + added[1]
    found = in_ranges(np.asarray(nats, np.float64), np.asarray(weights, np.float64))
    if not found:
        raise ValueError(f'no target of {trained.task.name} ({split}) counts; choose another split or more examples')
    return found


@cli.guarded
def command(description: str | None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=paths.argument, required=True, help='folder of the run')
    parser.add_argument('--split', choices=evaluate.SPLITS, default='test')
    parser.add_argument('--examples', type=int, help='number of examples, spread over the split (default: all)')
    parser.add_argument('--parameters', choices=evaluate.PARAMETERS, default='latest')
    parser.add_argument('--data_dir', type=paths.argument, help='folder of data sets (default: as in training)')
    options = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # Orbax warns that checkpoints are opened for reading only
    messages.heading(workdir=options.workdir, data=f'{options.split} split', parameters=options.parameters)
    try:
        found = loss_by_position(**vars(options))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print('positions       nats a target   targets')
    for loss in found:
        print(f'{f"{loss.first}-{loss.last}":<15} {loss.nats:<15.4f} {loss.targets:,}')
    messages.next_steps(messages.module_command('combiner.evaluate', '--workdir', options.workdir))
