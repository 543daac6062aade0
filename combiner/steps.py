"""The steps of training and evaluation: pure functions from a state or parameters and a batch to sums and updates."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from combiner import losses, metrics, optim, sharding
from combiner.data.task import Task


class State(struct.PyTreeNode):
    """The state of training: all that a step changes or depends on besides its batch.

    Attributes:
        step: number of updates so far.
        params: float32 parameters.
        opt_state: of optax.
        ema: moving average of the parameters, or None.
        collections: the model's other variables; {} for most models.
        rng: raw key data, as checkpoints hold plain arrays; constant: each step folds its number into it.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    collections: Any
    rng: Any


def initial_state(model: nn.Module, optimizer: optax.GradientTransformation, config: Any, tokens: Any) -> State:
    """Returns the state before the first step; parameters are boxed with their logical axes."""
    key, rng = jax.random.split(jax.random.key(config.seed))
    collections = dict(model.init(key, tokens))
    params = collections.pop('params')
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=params if config.optimizer.ema_decay else None,
        collections=collections,
        rng=jax.random.key_data(rng),
    )


def model_inputs(batch: dict[str, jax.Array]) -> dict[str, Any]:
    """Returns the arrays of a batch that a model takes as arguments."""
    return {name: batch[name] for name in ('tokens', 'valid', 'segments') if name in batch}


def batch_sums(logits: Any, batch: dict[str, jax.Array], count_hits: bool) -> dict[str, jax.Array]:
    """Returns sums over a batch: weight · nats, weights ('targets'), and with `count_hits` weight · hits.

    Padding has weight 0.
    """
    weights = batch['weights']
    sums = {'nats': (losses.target_nats(logits, batch['targets']) * weights).sum(), 'targets': weights.sum()}
    return sums | ({'hits': (losses.hits(logits, batch['targets']) * weights).sum()} if count_hits else {})


def weighted_sums(
    params: Any, collections: Any, batch: dict[str, jax.Array], key: jax.Array, model: nn.Module, count_hits: bool
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
    """Returns (nats, (sums, collections)): weight · nats of a batch, all its sums, the updated collections."""
    logits, updated = model.apply(
        {'params': params, **collections},
        **model_inputs(batch),
        deterministic=False,
        rngs={'dropout': key},
        mutable=list(collections),
    )
    sums = batch_sums(logits, batch, count_hits)
    return sums['nats'], (sums, dict(updated))


def summed_gradients(
    params: Any,
    collections: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
    model: nn.Module,
    count_hits: bool,
    parts: int,
) -> tuple[dict[str, jax.Array], Any, Any]:
    """Returns (sums, gradients, collections) of a batch, summed over `parts` micro-batches in sequence.

    Sums, not means, so that the number of parts changes neither loss nor gradient, for any weights.
    """
    gradient = jax.grad(weighted_sums, has_aux=True)
    if parts == 1:
        gradients, (sums, collections) = gradient(params, collections, batch, key, model, count_hits)
        return sums, gradients, collections

    def add(carry: Any, micro: tuple[Any, dict[str, jax.Array]]) -> tuple[Any, dict[str, jax.Array]]:
        gradients, collections = carry
        index, batch = micro
        key_of_part = jax.random.fold_in(key, index)
        extra, (sums, collections) = gradient(params, collections, batch, key_of_part, model, count_hits)
        return (jax.tree.map(jnp.add, gradients, extra), collections), sums

    def split(x: jax.Array) -> jax.Array:
        # Example i goes to micro-batch i mod parts, so that each micro-batch stays spread over all devices.
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, *sharding.batch_spec(x.ndim - 1)))

    start = (jax.tree.map(jnp.zeros_like, params), collections)
    (gradients, collections), sums = jax.lax.scan(add, start, (jnp.arange(parts), jax.tree.map(split, batch)))
    return jax.tree.map(jnp.sum, sums), gradients, collections


def train_step(
    state: State,
    batch: dict[str, jax.Array],
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    count_hits: bool,
    accumulation: int,
    ema_decay: float,
) -> tuple[State, Any]:
    """Makes one update from one batch; the result is the same on any mesh up to the order of sums.

    But dropout of attention weights draws other numbers where `mesh.context` cuts the sequences in another way.

    A batch whose weights are all zero has no mean loss: it changes only the step number.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    sums, gradients, collections = summed_gradients(
        state.params, state.collections, batch, key, model, count_hits, accumulation
    )
    empty = sums['targets'] == 0
    gradients = jax.tree.map(lambda g: g / jnp.where(empty, 1, sums['targets']), gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    number = optim.updates_made(state.opt_state, state.step)
    ema = None if state.ema is None else optim.average(state.ema, params, ema_decay, number)
    new = state.replace(params=params, opt_state=opt_state, ema=ema, collections=collections)
    new = jax.tree.map(lambda new, old: jnp.where(empty, old, new), new, state)
    norms = optax.tree.norm(gradients), optax.tree.norm(new.params)
    return new.replace(step=state.step + 1), metrics.train_metrics(sums, *norms, rate(number))


def make_train_step(
    config: Any, task: Task, model: nn.Module, optimizer: optax.GradientTransformation
) -> Callable[[State, dict[str, jax.Array]], tuple[State, Any]]:
    """Returns `train_step` with the settings of a config; not compiled."""
    return functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        rate=optim.schedule(config.optimizer, config.steps),
        count_hits='accuracy' in task.metrics,
        accumulation=config.optimizer.accumulation,
        ema_decay=config.optimizer.ema_decay,
    )


def compile_step(step: Any, target: State, mesh: Mesh) -> Any:
    """Compiles a training step for states that are placed as `target`, and batches; the old state is donated."""
    placement = jax.tree.map(lambda leaf: leaf.sharding, target)
    return jax.jit(
        step,
        in_shardings=(placement, None),  # a batch is placed as it comes, by `sharding.put_batch`
        out_shardings=(placement, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def eval_step(variables: Any, batch: dict[str, jax.Array], *, model: nn.Module, count_hits: bool) -> Any:
    """Returns the evaluation metrics of one batch: `batch_sums`, examples, and words and bytes if it has them."""
    logits: Any = model.apply(variables, **model_inputs(batch), deterministic=True)
    weights = batch['weights'].reshape(len(batch['weights']), -1)
    sums = batch_sums(logits, batch, count_hits) | {'examples': (weights > 0).any(axis=1).sum()}
    return metrics.eval_metrics(sums | {name: batch[name].sum() for name in ('words', 'bytes') if name in batch})


def make_eval_step(model: nn.Module, task: Task) -> Any:
    """Returns the compiled `eval_step`; its arguments keep their shardings."""
    return jax.jit(functools.partial(eval_step, model=model, count_hits='accuracy' in task.metrics))


def evaluate_batches(step: Any, variables: Any, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh) -> Any:
    """Returns the merged metrics of all batches, on the host; call within `sharding.use(mesh)`.

    Raises:
        ValueError: there is no batch.
    """
    total = None
    for batch in batches:
        part = metrics.to_host(step(variables, sharding.put_batch(batch, mesh)))
        total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError('nothing to evaluate: the split has no examples; choose another split')
    return total
