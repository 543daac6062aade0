"""Sequences that are cut over devices: the results of one device, without the tokens of another."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import sizes_of
from jax.sharding import NamedSharding, PartitionSpec

import combiner
from combiner import build, optim, sharding, steps
from combiner.attention.combiner_fixed import CombinerFixed
from combiner.core import distributed
from combiner.core.mechanism import Context
from combiner.ops.softmax import Dropout

TOLERANCE = 1e-5
ABLE = ['combiner_axial_rowmajor', 'combiner_fixed', 'combiner_logsparse', 'combiner_tree', 'full']
every = pytest.mark.parametrize('name', ABLE)
causal_or_not = pytest.mark.parametrize('causal', [True, False])


def draw(*shape):
    return [jax.random.normal(jax.random.key(number), shape) for number in range(4)]


def draw_grouped(*shape, key_heads):
    q, k, v, cotangent = draw(*shape)
    return q, k[:, :, :key_heads], v[:, :, :key_heads], cotangent


def value_and_gradients(q, k, v, cotangent, attend):
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(cotangent)


def assert_all_close(actual, expected):
    for one, other in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)


@causal_or_not
@every
def test_it_equals_one_device(name, causal):
    """Of a length that is no whole number of blocks on each device; as it is, and with padding and documents.

    Two query heads share a key head.
    """
    length = 61
    valid = jnp.arange(length) < jnp.array([[length], [30]])
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 5, (2, length)), axis=1))
    attend = functools.partial(combiner.attend, name=name, causal=causal, **sizes_of(name))

    def both(*qkvo):
        packed = functools.partial(attend, valid=valid, segments=segments)
        return value_and_gradients(*qkvo, attend), value_and_gradients(*qkvo, packed)

    arrays, found = draw_grouped(2, length, 4, 4, key_heads=2), []
    for mesh in (sharding.make_mesh(context=4, model=2), sharding.make_mesh(devices=jax.devices()[:1])):
        with sharding.use(mesh):
            found.append(jax.jit(both)(*arrays))
    assert_all_close(*found)


@every
def test_it_keeps_the_type_of_its_arrays(name):
    """In bfloat16, parts that come from other devices are rounded once more than on one device."""
    arrays = [x.astype(jnp.bfloat16) for x in draw(1, 61, 2, 4)]
    attend, found = functools.partial(combiner.attend, name=name, causal=True, **sizes_of(name)), []
    for mesh in (sharding.make_mesh(context=4, data=2), sharding.make_mesh(devices=jax.devices()[:1])):
        with sharding.use(mesh):
            found.append(jax.jit(functools.partial(value_and_gradients, attend=attend))(*arrays))
    for one, other in zip(*found, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(float), other.astype(float), atol=0.05 * float(abs(other).max()))


@every
def test_devices_exchange_summaries_and_no_tokens(name):
    """Of 256 tokens in blocks of 16: at most 16 keys and values of a sequence's head are gathered.

    Where keys go round, they do so once for two query heads.
    """
    mesh, length = sharding.make_mesh(data=2, context=2, model=2), 256
    placement = NamedSharding(mesh, PartitionSpec('data', 'context', 'model'))
    x = jax.ShapeDtypeStruct((2, length, 2, 8), jnp.float32, sharding=placement)
    q = x.update(shape=(2, length, 4, 8)) if name == 'full' else x
    sizes = dict.fromkeys(sizes_of(name), 16)
    attend = functools.partial(combiner.attend, name=name, causal=True, **sizes)
    with sharding.use(mesh):
        program = jax.jit(functools.partial(value_and_gradients, attend=attend), out_shardings=placement)
        text = program.lower(q, x, x, q).compile().as_text()
    kinds = 'all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter'
    exchanged = re.findall(rf'f32\[([\d,]+)\]\S* ({kinds})\(', text)
    found = [(kind, math.prod(map(int, shape.split(','))) // 8) for shape, kind in exchanged]
    gathered = [rows for kind, rows in found if kind == 'all-gather']
    if name == 'full':  # keys, values and their gradients go round
        assert {kind for kind, _ in found} == {'collective-permute'}
        assert max(rows for _, rows in found) == length // 2
    else:
        assert {kind for kind, _ in found} <= {'all-gather', 'reduce-scatter'}
        # A grid row has a summary for each of its columns.
        assert sum(gathered) == 2 * length if name == 'combiner_axial_rowmajor' else max(gathered) <= 16


def test_parameters_of_a_pooling_get_the_gradient_of_all_devices():
    x = draw(2, 32, 16)[0]
    module = combiner.Attention(CombinerFixed(block=4, pool='deepsets'), width=16, heads=2)
    variables = nn.meta.unbox(module.init(jax.random.key(0), x, jnp.arange(32)[None]))

    def loss(variables):
        return (module.apply(variables, x, jnp.arange(32)[None]) ** 2).sum()

    found = []
    for mesh in (sharding.make_mesh(data=2, context=2, model=2), sharding.make_mesh(devices=jax.devices()[:1])):
        with sharding.use(mesh):
            found.append(jax.jit(jax.grad(loss))(variables))
    assert_all_close(*found)


def test_each_part_drops_weights_of_its_own():
    x = jnp.zeros((1, 64, 2, 4))
    with sharding.use(sharding.make_mesh(context=8)):

        @jax.jit
        def attend(key):
            context = Context(drop=Dropout(key, 0.5))
            return distributed.attend(CombinerFixed(block=4, causal=False), x, x, x + 1, context)

        out = np.asarray(attend(jax.random.key(0)))[0, :, :, 0].reshape(8, 8, 2)
    assert len(np.unique(out.reshape(8, -1), axis=0)) == 8
    assert abs(out.mean() - 1) < 0.1


@pytest.mark.parametrize(
    ('name', 'hyper', 'message'),  # the mechanisms that it names are those of this file
    [
        ('local', {}, f'Local cannot attend across the 2 devices .* set mesh.context=1, or choose .*{", ".join(ABLE)}'),
        ('full', {'implementation': 'dense'}, "implementation='dense' does not attend across the devices of the mesh"),
    ],
)
def test_another_is_refused(name, hyper, message):
    with sharding.use(sharding.make_mesh(context=2)), pytest.raises(ValueError, match=message):
        combiner.attend(*draw(2, 8, 1, 4)[:3], name, causal=True, **hyper)


def test_full_refuses_dropout():
    attend = combiner.attention_fn('full', causal=True)
    with sharding.use(sharding.make_mesh(context=2)), pytest.raises(ValueError, match='ring has no dropout of weights'):
        attend(*draw(2, 8, 1, 4)[:3], dropout_rate=0.5, dropout_rng=jax.random.key(0))


def test_a_training_step_equals_that_of_one_device(tiny):
    """The first token of a device is predicted from the last of another; losses, gradients and moments are sums."""
    config = tiny.config(**{'optimizer.accumulation': 2})
    config.model.attention = {'name': 'combiner_fixed', 'block': 4}
    task = build.task(config)
    model, optimizer = build.model(config, task), optim.optimizer(config.optimizer, config.steps)
    batch, found = next(iter(build.train_batches(config, task))), []
    for mesh in (sharding.make_mesh(data=2, context=2, model=2), sharding.make_mesh(devices=jax.devices()[:1])):
        with sharding.use(mesh):
            initialize = functools.partial(
                steps.initial_state, model, optimizer, config, build.blank_tokens(task, mesh)
            )
            target = sharding.place(jax.eval_shape(initialize), mesh)
            state = jax.jit(lambda make=initialize: nn.meta.unbox(make()))()
            state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, target))
            step = steps.compile_step(steps.make_train_step(config, task, model, optimizer), target, mesh)
            placed = sharding.put_batch(batch, mesh)
            found.append(step(state, placed))
            assert placed['tokens'].sharding.shard_shape(placed['tokens'].shape)[1] == 48 // mesh.shape['context']
    assert_all_close(*found)
