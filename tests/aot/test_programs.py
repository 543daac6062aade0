"""Programs compiled for other devices: what the compiler plans, its refusals, and kernels that keep their promise."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

import combiner
from combiner import build, sharding
from combiner.aot import cost, programs, targets
from combiner.core import registry

with_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs the extra tpu-aot')
REFUSED = (  # what libtpu 0.0.52 says
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
    'temporaries (80.10G) exceeds available HBM (15.75G). HLO module: jit__lambda.'
)
SHAPE = (16, 4096, 8, 128)  # more than the memory on the chip holds
KERNELS = [name for name in combiner.names() if 'mosaic' in registry.resolve(name).implementations]


def test_a_refusal_says_how_much_is_needed():
    assert programs.refusal(REFUSED) == {'temporaries_bytes': int(80.1 * 2**30), 'chip_bytes': int(15.75 * 2**30)}
    assert programs.refusal('INTERNAL: a fault') == {}


def test_the_least_traffic_is_every_array_once():
    assert programs.least_bytes((2, 3, 5, 7), backward=False) == 4 * 2 * 3 * 5 * 7 * 2
    assert programs.least_bytes((2, 3, 5, 7), backward=True, itemsize=4) == 8 * 2 * 3 * 5 * 7 * 4


@pytest.mark.parametrize('devices', [1, 8])
def test_a_training_step_sums_the_gradients_of_all_devices(tiny, devices):
    config = tiny.config()
    config.data.batch_size = 8
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    program = programs.compiled(programs.training_step(config, mesh), 'cpu')
    found = cost.count(program.text)
    planned = programs.memory(program.executable)
    state = 4 * 3 * parameters(config)  # with two moments
    assert planned['total_bytes'] > planned['arguments_bytes'] > state
    assert found.flops > 0
    reduced = found.collectives.get('all-reduce', cost.Traffic()).bytes
    if devices == 1:
        assert found.collectives == {}
    else:
        assert 4 * parameters(config) <= reduced < 5 * parameters(config)


def parameters(config):
    task = build.task(config)
    shapes = jax.eval_shape(build.model(config, task).init, jax.random.key(0), jnp.zeros((1, *task.input_shape), int))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))


@with_libtpu
def test_an_attention_is_compiled_for_a_chip_that_is_not_here():
    v5e = targets.parse('v5e')
    traced = programs.attention(
        'combiner_fixed', {}, (1, 256, 2, 128), causal=True, backward=False, devices=v5e.devices()
    )
    program = programs.compiled(traced.lower(), 'tpu')
    found = cost.count(program.text)
    assert found.hbm_bytes >= programs.least_bytes((1, 256, 2, 128), backward=False)
    assert programs.memory(program.executable)['arguments_bytes'] == 3 * 2 * 256 * 2 * 128


@pytest.mark.slow
@with_libtpu
@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize(('backward', 'most'), [(False, 1.1), (True, 1.5)])
def test_a_kernel_moves_hardly_more_than_the_least(name, backward, most):
    """Forward every array once; backward also keeps summaries, and reads q, k and v again."""
    traced = programs.attention(
        name,
        {'implementation': 'mosaic'},
        SHAPE,
        causal=True,
        backward=backward,
        devices=targets.parse('v5e').devices(),
    )
    found = cost.count(programs.compiled(traced.lower(), 'tpu').text)
    assert found.kernels, 'the kernel is not in the program'
    assert found.hbm_bytes <= most * programs.least_bytes(SHAPE, backward=backward)
