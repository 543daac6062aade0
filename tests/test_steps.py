"""The pure steps of training."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from combiner import metrics, models, optim, sharding, steps


def assert_close(actual, expected, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


def one_step(tiny, batch, accumulations=(1,)):
    """(state before, [(state after, metrics) for each accumulation]); the update is the gradient itself."""
    config = tiny.config()
    model = models.build('language_model', 256, (4, 4, 3), config.model.to_dict())
    optimizer = optax.sgd(1.0)
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        start = jax.jit(lambda: nn.meta.unbox(steps.initial_state(model, optimizer, config, batch['tokens'])))()
        fixed = {'model': model, 'optimizer': optimizer, 'rate': optax.constant_schedule(1.0), 'ema_decay': 0.5}
        fixed |= {'count_hits': False}
        step = jax.jit(functools.partial(steps.train_step, **fixed), static_argnames='accumulation')
        return start, [step(start, batch, accumulation=parts) for parts in accumulations]


def test_accumulation_changes_nothing_whatever_the_weights(tiny):
    key = jax.random.key(0)
    tokens = jax.random.randint(key, (8, 48), 0, 256)
    batch = {'tokens': tokens, 'targets': tokens, 'weights': jax.random.uniform(key, (8, 48)) ** 4}
    _, ((expected, expected_metrics), *others) = one_step(tiny, batch, (1, 2, 8))
    for state, measured in others:
        assert_close(state.params, expected.params)
        assert_close(measured.compute(), expected_metrics.compute())


def test_a_micro_batch_without_targets_changes_nothing(tiny):
    tokens = jax.random.randint(jax.random.key(0), (8, 48), 0, 256)
    weights = (jnp.arange(8)[:, None] % 2) * jnp.ones((8, 48))  # with 2 parts the first has none, with 8 every other
    batch = {'tokens': tokens, 'targets': tokens, 'weights': weights}
    _, ((expected, expected_metrics), *others) = one_step(tiny, batch, (1, 2, 8))
    for state, measured in others:
        assert_close(state.params, expected.params)
        assert_close(measured.compute(), expected_metrics.compute())
        assert 'empty_batches' not in metrics.summarize(metrics.to_host(measured), ())


def test_ema_follows_the_parameters(tiny):
    tokens = jnp.zeros((8, 48), jnp.int32)
    batch = {'tokens': tokens, 'targets': tokens, 'weights': jnp.ones((8, 48))}
    before, [(state, _)] = one_step(tiny, batch)
    assert_close(before.ema, before.params)
    assert_close(state.ema, optim.average(before.params, state.params, 0.5, 0))
