"""Programs compiled for other devices: what the compiler plans, its refusals, and kernels that keep their promise."""

import jax
import jax.numpy as jnp
import pytest

from combiner import build, sharding
from combiner.aot import cost, programs

REFUSED = (  # what libtpu 0.0.52 says
    'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO '
    'temporaries (80.10G) exceeds available HBM (15.75G). HLO module: jit__lambda.'
)


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


@pytest.mark.parametrize('rotary', [False, True])
def test_a_module_is_traced_with_its_gradients(rotary):
    options = {'causal': True, 'rotary': rotary, 'devices': jax.devices()}
    lowered = programs.module('combiner_fixed', {'block': 8, 'pool': 'deepsets'}, (1, 32, 2, 8), **options)
    out, variables, x = lowered.out_info
    assert out.shape == x.shape == (1, 32, 16)
    assert {'query_kernel', 'query_pool_inner_kernel'} <= variables['params'].keys()
    assert ('cosine' in lowered.as_text()) == rotary


def parameters(config):
    task = build.task(config)
    shapes = jax.eval_shape(build.model(config, task).init, jax.random.key(0), jnp.zeros((1, *task.input_shape), int))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes['params']))
