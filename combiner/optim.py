"""Learning-rate schedules, optimisers and parameter averages; `config` is the group `optimizer` of a config."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ('cosine', 'rsqrt', 'constant')
OPTIMIZERS = ('adamw', 'adam')


def schedule(config: Any, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: linear warm-up to `learning_rate`, then decay.

    The warm-up takes `warmup_steps`. Then `cosine` falls to 0 at `steps`; `rsqrt` is
    learning_rate · √(w / (step + w - warmup_steps)) with w = max(warmup_steps, 1); `constant` does not decay.

    Raises:
        ValueError: unknown schedule, or a warm-up that is negative or not shorter than the training.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if not 0 <= warmup < steps:
        raise ValueError(
            f'optimizer.warmup_steps={warmup} must be at least 0 and less than steps={steps}; shorten the warm-up'
        )
    after: optax.Schedule
    if config.schedule == 'cosine':
        after = optax.cosine_decay_schedule(peak, steps - warmup)
    elif config.schedule == 'rsqrt':
        shift = max(warmup, 1)
        after = lambda count: peak * jnp.sqrt(shift / (count + shift))  # noqa: E731
    elif config.schedule == 'constant':
        after = optax.constant_schedule(peak)
    else:
        raise ValueError(f'unknown optimizer.schedule {config.schedule!r}; known: {", ".join(SCHEDULES)}')
    # Step 0 has a rate of 1/(warmup + 1) of the peak, not 0.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup) if warmup else optax.constant_schedule(peak)
    return optax.join_schedules([rise, after], [warmup])


def decays(params: Any) -> Any:
    """Marks with True the parameters that weight decay applies to: all but norms, scales, biases and embeddings.

    It decides by name, not by rank: under `nn.scan` a layer's bias is a matrix too.
    """

    def decayed(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(entry.key).lower() for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        exempt = names[-1].endswith(('bias', 'scale', 'begin')) or any(
            word in name for name in names for word in ('norm', 'embed', 'position')
        )
        return not exempt

    return jax.tree_util.tree_map_with_path(decayed, params)


def optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """Returns the optimiser: clipping by global norm (`clip_norm`, 0 = off), then AdamW or Adam with the schedule.

    `weight_decay` is decoupled (Loshchilov & Hutter, arXiv 1711.05101), for adamw only. `eps` is added to the root of
    the second moment.

    Raises:
        ValueError: unknown optimiser or schedule, a number out of its range, or adam with weight decay.
    """
    for name in ('b1', 'b2', 'ema_decay'):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f'optimizer.{name}={getattr(config, name)} must be at least 0 and less than 1')
    for name in ('learning_rate', 'weight_decay', 'clip_norm', 'eps'):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f'optimizer.{name}={getattr(config, name)} must be at least 0 and finite')
    rate = schedule(config, steps)
    if config.name == 'adamw':
        rule = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decays)
    elif config.name == 'adam':
        if config.weight_decay:
            raise ValueError(f'adam has no weight_decay ({config.weight_decay}); use adamw or set it to 0')
        rule = optax.adam(rate, config.b1, config.b2, config.eps)
    else:
        raise ValueError(f'unknown optimizer.name {config.name!r}; known: {", ".join(OPTIMIZERS)}')
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule) if config.clip_norm else rule


def updates_made(state: Any, default: Any) -> Any:
    """Returns the number of updates that the schedule has counted; `default` if there is no schedule.

    Steps whose batch has no target do not count.
    """
    schedule = optax.tree.get(state, 'ScaleByScheduleState', None)
    return default if schedule is None else schedule.count


def average(ema: Any, params: Any, decay: float, step: Any) -> Any:
    """Updates the exponential moving average of the parameters after update `step`: ema ← d·ema + (1 − d)·params.

    d = min(decay, (1 + step) / (10 + step)) is small at first, so that the random initial values are soon forgotten.
    """
    rate = (1 - jnp.minimum(decay, (1 + step) / (10 + step))).astype(jnp.float32)
    return optax.incremental_update(params, ema, rate)
