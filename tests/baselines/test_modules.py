"""What the modules of mechanisms that own parameters or state must satisfy; a new one is tested by its name below."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, attend_with, draw, has_pattern

import combiner
from combiner import evaluate, models, sharding, train
from combiner.core import registry
from combiner.core.module import make_attention
from combiner.data import tasks

LENGTH, SHORT = 23, 17
HYPER = {
    'bigbird': {'block': 3, 'globals': 1, 'random': 2},
    'compressed': {'block': 4, 'window': 6, 'chunk': 8},
    'linformer': {'rank': 6, 'share_heads': False, 'share_values': False},
    'reformer': {'chunk': 4, 'rounds': 2},
    'sinkhorn': {'block': 5},
    'synthesizer': {},
    'transient_global': {'block': 4, 'radius': 3, 'chunk': 8},
}
SCATTERED = np.random.default_rng(0).random((2, LENGTH)) > 0.3
SCATTERED[1] = False
EVERYTHING = np.ones((2, LENGTH), bool)

CASES = [
    pytest.param(name, causal, id=f'{name}-{"causal" if causal else "bidirectional"}')
    for name in HYPER
    for causal in registry.resolve(name).supported_causal
]
every_form = pytest.mark.parametrize(('name', 'causal'), CASES)
UNPARTITIONED = [
    pytest.param(name, causal, id=f'{name}-{"causal" if causal else "bidirectional"}')
    for name in HYPER
    if not has_pattern(name) and not registry.resolve(name).input_dependent
    for causal in registry.resolve(name).supported_causal
]
OWNERS = [name for name in combiner.names() if registry.resolve(name).requires]
OWNERS.append('performer')  # it can also do without what it owns
NEW_PROCESS = os.environ | {'PYTHONPATH': str(Path(__file__).parents[2]), 'JAX_PLATFORMS': 'cpu'}
every_causal = pytest.mark.parametrize(
    'name', [name for name in HYPER if True in registry.resolve(name).supported_causal]
)


def make(name, causal, **frame):
    frame = {'width': 16, 'heads': 2, 'kv_heads': 1, 'max_length': LENGTH} | frame
    return make_attention(name, HYPER[name], causal=causal, **frame)


@functools.cache
def made(name, causal):
    """A module with random parameters, and the state that it starts with."""
    module = make(name, causal)
    x = given()
    variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), x, jnp.arange(LENGTH)[None]))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 1 / 4, leaf.shape).astype(leaf.dtype), variables['params'])
    return module, {**variables, 'params': jax.tree.map(jnp.asarray, params)}


def given():
    return draw(2, LENGTH, 16, count=1)[0]


@functools.cache
def program(name, causal, length=LENGTH):
    """Compiled `(x, valid) -> (out, gradients of parameters, gradient of x)`."""
    module, variables = made(name, causal)
    state = {key: value for key, value in variables.items() if key != 'params'}
    (cotangent,) = draw(2, LENGTH, 16, count=1, seed=7)

    @jax.jit
    def run(x, valid):
        def attend(params, x):
            return module.apply({'params': params, **state}, x, jnp.arange(length)[None], valid=valid)

        out, pull_back = jax.vjp(attend, variables['params'], x)
        return out, *pull_back(cotangent[:, :length])

    return run


@every_form
def test_padding_is_not_read_and_gives_zeros(name, causal):
    run, x = program(name, causal), given()
    out, of_params, of_x = clean = run(x, SCATTERED)
    spoilt = run(np.where(SCATTERED[..., None], x, np.float32('nan')), SCATTERED)
    for one, other in zip(jax.tree.leaves(spoilt), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.isfinite(other).all()
    np.testing.assert_array_equal(np.where(SCATTERED[..., None], 0, out), 0)
    np.testing.assert_array_equal(np.where(SCATTERED[..., None], 0, of_x), 0)
    assert all((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(of_params))


@every_form
def test_padding_changes_nothing(name, causal):
    x, short = given(), np.arange(LENGTH) < SHORT
    padded = program(name, causal)(np.where(short[:, None], x, 3), EVERYTHING & short)
    alone = program(name, causal, SHORT)(x[:, :SHORT], EVERYTHING[:, :SHORT])
    assert_close(padded[0][:, :SHORT], alone[0], TOLERANCE[jnp.float32])
    assert_close(padded[2][:, :SHORT], alone[2], TOLERANCE[jnp.float32])
    for one, other in zip(*(jax.tree.leaves(result[1]) for result in (padded, alone)), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(('name', 'causal'), UNPARTITIONED)
def test_everything_is_reached_where_it_is_claimed_and_no_pattern_says_so(name, causal):
    module, variables = made(name, causal)

    @jax.jit
    def influence(x):
        """How much the value at each position, of one head and dimension, changes each output."""

        def attended(v):
            q, k, own = module.apply(variables, x, jnp.arange(LENGTH)[None], method='_project')
            changed = own.at[:, :, :, 0].set(v)
            return attend_with(module, variables, q, k, changed, x=x)[0, :, 0, 0]

        return jax.jacobian(attended)(jnp.ones((2, LENGTH, 2)))[:, 0, :, 0]

    support = np.tri(LENGTH, dtype=bool) if causal else np.ones((LENGTH, LENGTH), bool)
    reached = np.asarray(influence(given())) != 0
    assert (reached <= support).all()
    assert not module.mechanism.full_support or (reached == support).all()


@every_form
def test_one_position(name, causal):
    for leaf in jax.tree.leaves(program(name, causal, 1)(given()[:, :1], EVERYTHING[:, :1])):
        assert np.isfinite(leaf).all()


@every_causal
def test_no_position_depends_on_later_ones(name):
    run, before, after = program(name, True), given(), 5 - given()
    if registry.resolve(name).uses_future:
        pytest.skip('as published')
    expected, *_ = run(before, EVERYTHING)
    for now in range(LENGTH - 1):
        actual, *_ = run(np.where(np.arange(LENGTH)[:, None] <= now, before, after), EVERYTHING)
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1], f'position {now}')


@every_causal
def test_decoding_equals_the_parallel_form(name):
    """Returns, for a mechanism that uses the future, the parallel form of the tokens so far, from the prompt on."""
    module, variables = made(name, True)
    run, x, counts, rows = program(name, True), given(), np.array([1, 6]), np.arange(2)

    @jax.jit
    def start(x):
        arguments = x, jnp.arange(10)[None], jnp.asarray(counts), LENGTH
        return module.apply(variables, *arguments, method='prefill', mutable=['cache'])

    @jax.jit
    def decode(cache, x, index):
        return module.apply({**variables, **cache}, x, index, method='decode', mutable=['cache'])

    (attended, cache), (expected, *_) = start(x[:, :10]), run(x, EVERYTHING)
    if registry.resolve(name).uses_future:
        expected, *_ = run(x, np.arange(LENGTH) < counts[:, None])
    assert_close(attended[rows, counts - 1], expected[rows, counts - 1], TOLERANCE[jnp.float32])
    for index in [counts + step for step in range(LENGTH - 6)]:
        attended, cache = decode(cache, x[rows, index][:, None], index)
        if registry.resolve(name).uses_future:
            expected, *_ = run(x, np.arange(LENGTH) <= index[:, None])
        assert_close(attended[:, 0], expected[rows, index], TOLERANCE[jnp.float32])


@every_form
def test_dropout_and_bfloat16(name, causal):
    module = make(name, causal, dropout=0.5, dtype=jnp.bfloat16)
    _, variables = made(name, causal)

    @jax.jit
    def run(x, key):
        apply = functools.partial(module.apply, variables, x, jnp.arange(LENGTH)[None])
        trained = jax.vmap(lambda key: apply(deterministic=False, rngs={'dropout': key}))
        return apply(), trained(jnp.stack([key, key, jax.random.key(1)]))

    still, (one, same, other) = run(given(), jax.random.key(0))
    assert still.dtype == one.dtype == jnp.bfloat16
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert (one != still).any()


def choices(name):
    """Hyper-parameters with which a mechanism owns other parameters."""
    known = {'variant': ('dense', 'random', 'factorised_random'), 'share_heads': (True, False)}
    known |= {'pool': ('max', 'deepsets', 'attention'), 'key': ('attended', 'projected')}
    has = [key for key in known if key in registry.hyper_parameters(name)]
    return [{key: value} for key in has for value in known[key]] or [{}]


@pytest.mark.parametrize('name', combiner.names())
def test_every_choice_of_parameters_is_placed_on_a_mesh(name):
    mesh, positions = sharding.make_mesh(data=2, fsdp=2, model=2), jnp.arange(LENGTH)[None]
    x = jax.ShapeDtypeStruct((4, LENGTH, 16), jnp.float32)
    for hyper in choices(name):
        causal = registry.resolve(name).supported_causal[0]
        frame = {'width': 16, 'heads': 2, 'max_length': LENGTH, 'bias': True}
        module = make_attention(name, hyper, causal=causal, **frame)
        placed = sharding.place(jax.eval_shape(module.init, jax.random.key(0), x, positions), mesh)
        assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(placed))


@every_form
def test_batch_and_heads_are_sharded_without_gathering(name, causal):
    mesh = sharding.make_mesh(data=4, model=2)
    module, positions = make(name, causal, kv_heads=2), jnp.arange(LENGTH)[None]
    x = jax.ShapeDtypeStruct((4, LENGTH, 16), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, positions)
    placed = sharding.place(shapes, mesh)
    placement = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))

    def loss(params, state, x):
        out = module.apply({'params': params, **state}, x, positions)
        return jax.lax.with_sharding_constraint(out, placement).sum()

    params = placed.pop('params')
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params), placement
    run = jax.jit(jax.grad(loss, (0, 2)), out_shardings=shardings)
    compiled = run.lower(params, placed, x).compile().as_text()
    assert 'all-gather' not in compiled
    assert 'all-to-all' not in compiled


@pytest.mark.parametrize('name', HYPER)
def test_state_is_drawn_by_layer_and_reproducible(name):
    head = 'language_model' if True in registry.resolve(name).supported_causal else 'classifier'
    settings = {'layers': 2, 'width': 16, 'heads': 2, 'attention': {'name': name, **HYPER[name]}}
    model = models.build(head, 10, (LENGTH,), settings, 0 if head == 'language_model' else 3)
    init = jax.jit(lambda key: nn.unbox(model.init(key, jnp.zeros((1, LENGTH), int))))
    first, again = init(jax.random.key(0)), init(jax.random.key(0))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    for leaf in jax.tree.leaves(first.get('state', {})):
        assert (np.asarray(leaf[0]) != np.asarray(leaf[1])).any()


@pytest.fixture(scope='module')
def evaluated_again(tmp_path_factory):
    """Returns, of every mechanism with variables, its trained workdir and its test metrics, here and in a new process.

    One new process evaluates them all.
    """
    import tiny

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, 'TASKS', tiny.TASKS)
        for name in OWNERS:
            task = 'tiny' if True in registry.resolve(name).supported_causal else 'tiny_classes'
            workdir, config = tmp_path_factory.mktemp(name), tiny.config(task, **{'run.eval_every': 100})
            config.model.attention = {'name': name, **HYPER.get(name, {})}
            state = train.train(config, workdir, devices=jax.devices()[:1])
            found[name] = workdir, config, tiny.digest(state), evaluate.evaluate(workdir)
    command = [sys.executable, tiny.__file__, '--evaluate', *(str(workdir) for workdir, *_ in found.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=NEW_PROCESS)
    assert done.returncode == 0, done.stderr
    again = json.loads(re.search('metrics (.*)', done.stdout)[1])
    return {name: (*found[name], metrics) for name, metrics in zip(found, again, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize('name', OWNERS)
def test_a_run_is_saved_evaluated_in_a_new_process_and_continued(name, tiny, evaluated_again):
    workdir, config, digest, metrics, again = evaluated_again[name]
    assert again['loss_nats'] == pytest.approx(metrics['loss_nats'], rel=1e-6)  # there on one device, here on eight
    assert again['examples'] == metrics['examples']
    shutil.rmtree(workdir / 'checkpoints' / '6')
    assert tiny.digest(train.train(config, workdir, devices=jax.devices()[:1])) == digest


@pytest.mark.parametrize('name', HYPER)
def test_what_it_owns_is_told(name):
    q, k, v = draw(1, 4, 1, 4)
    mechanism = registry.resolve(name)
    way_out = rf'owns .*: use the Linen module combiner\.Attention\({mechanism.__module__}.{mechanism.__name__}'
    with pytest.raises(ValueError, match=way_out):
        combiner.attend(q, k, v, name, causal=mechanism.supported_causal[0])
    for missing in {True, False} - set(mechanism.supported_causal):
        with pytest.raises(ValueError, match=f'has no .* form; say causal={not missing} for'):
            registry.make_mechanism(name, causal=missing)
    module, variables = made(name, mechanism.supported_causal[0])
    with pytest.raises(ValueError, match='does not support segments'):
        module.apply(variables, given(), jnp.arange(LENGTH)[None], segments=jnp.zeros((2, LENGTH), int))
