"""With `jax_enable_x64`, float32 stays float32 everywhere, and float64 is exact to its own precision."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import draw, sizes_of
from flax import linen as nn
from jax.tree_util import tree_leaves_with_path

import combiner
from combiner import models, optim, steps
from combiner.baselines.sinkhorn import pool
from combiner.baselines.transient_global import EPSILON, summarise_input
from combiner.core import registry
from combiner.core.module import make_attention
from combiner.layers import rotate

PROGRAM = """
import json
import jax
jax.config.update('jax_enable_x64', True)
import jax.numpy as jnp
import numpy as np
from cases import KNOWN_AHEAD, UNPARTITIONED, draw, sizes_of
import combiner
from combiner import reference
from combiner.core import registry
from combiner.core.module import make_attention
from combiner.patterns import Mixture

found = {}
for name in KNOWN_AHEAD + UNPARTITIONED:
    causal, hyper = registry.resolve(name).supported_causal[0], sizes_of(name)

    def attend(*qkv):
        out, pull_back = jax.vjp(lambda *qkv: combiner.attend(*qkv, name, causal=causal, **hyper), *qkv)
        return out, *pull_back(jnp.ones_like(out))

    qkv = draw(1, 23, 2, 4, dtype=jnp.float64)
    single = jax.eval_shape(attend, *(x.astype(jnp.float32) for x in qkv))
    error = None
    if name in KNOWN_AHEAD:
        pattern = combiner.pattern(name, 23, causal=causal, **hyper)
        parts = pattern.parts if isinstance(pattern, Mixture) else [pattern]
        keys = {'key': 'attended'} if 'key' in registry.hyper_parameters(name) else {}
        expected = sum(reference.attend(*qkv, part, **keys) for part in parts) / len(parts)
        error = float(abs(jax.jit(attend)(*qkv)[0] - expected).max())
    found[name] = sorted({str(x.dtype) for x in single}), error
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def found():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], cwd=root / 'tests', capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_float32_stays_float32(found):
    assert {name: types for name, (types, _) in found.items() if types != ['float32']} == {}


def test_float64_is_exact(found):
    assert {name: error for name, (_, error) in found.items() if error is not None and not error < 1e-12} == {}


@pytest.mark.parametrize(('heads', 'width'), [(2, 8), (2, 64)])  # 64: two heads in a register
@pytest.mark.parametrize('by_product', [False, True])
def test_rotary_positions_are_exact(heads, width, by_product):
    with jax.enable_x64(True):
        (x,) = draw(2, 23, heads, width, count=1, dtype=jnp.float64)
        run = jax.jit(functools.partial(rotate, by_product=by_product))
        found, single = run(x, jnp.arange(23)[None]), run(x.astype(jnp.float32), jnp.arange(23)[None])
    half, x = width // 2, np.asarray(x)
    angles = np.arange(23)[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    expected = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    assert (found.dtype, single.dtype) == (jnp.float64, jnp.float32)
    np.testing.assert_allclose(found, np.concatenate([expected.real, expected.imag], axis=-1), rtol=0, atol=1e-12)


def test_a_mixture_of_other_parts_is_exact():
    parts = 'combiner_fixed', 'combiner_logsparse'
    with jax.enable_x64(True):
        qkv = draw(1, 23, 2, 4, dtype=jnp.float64)
        found = combiner.attend(*qkv, 'combiner_mixture', causal=True, parts=parts)
        expected = np.mean([combiner.attend(*qkv, part, causal=True) for part in parts], axis=0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_sums_of_inputs_are_exact():
    with jax.enable_x64(True):
        (x,) = draw(2, 23, 8, 1, count=1, dtype=jnp.float64)
        x = x[..., 0]
        summed = pool(x, 5, causal=False)
        scaled = summarise_input(x, jnp.ones(8), 5)
    padded = np.pad(x, ((0, 0), (0, 2), (0, 0))).reshape(2, 5, 5, 8).sum(axis=2)
    np.testing.assert_allclose(summed, padded, rtol=0, atol=1e-13)
    normal = padded / np.sqrt((padded**2).mean(axis=-1, keepdims=True) + EPSILON)
    np.testing.assert_allclose(scaled, normal, rtol=0, atol=1e-12)


def step_of(head, name):
    """A function that makes a state, trains it for a step and evaluates it: the state after it, and the metrics."""
    classes = 2 if head == 'classifier' else 0
    config = tiny.config(**{'model.layers': 1, 'optimizer.warmup_steps': 2, 'optimizer.ema_decay': 0.9})
    task = tiny.task('tiny', head, metrics=('accuracy',), classes=classes)
    settings = config.model.to_dict() | {'attention': {'name': name}}
    model = models.build(head, 256, (48,), settings, classes)
    optimizer = optim.optimizer(config.optimizer, config.steps)
    tokens = np.random.default_rng(0).integers(256, size=(2, 48)).astype(np.int32)
    targets = tokens[:, 0] % 2 if classes else tokens
    arrays = {'tokens': tokens, 'targets': targets, 'weights': np.ones(targets.shape, np.float32)}

    def run():
        batch = jax.tree.map(jnp.asarray, arrays)
        state = nn.meta.unbox(steps.initial_state(model, optimizer, config, batch['tokens']))
        state, measured = steps.make_train_step(config, task, model, optimizer)(state, batch)
        variables = {'params': state.params, **state.collections}
        return state, measured, steps.eval_step(variables, batch, model=model, count_hits=True)

    return run


def head_for(name):
    return 'language_model' if True in registry.resolve(name).supported_causal else 'masked_language_model'


@pytest.mark.parametrize(
    ('head', 'name'), [*((head_for(name), name) for name in combiner.names()), ('classifier', 'reformer')]
)
def test_models_training_and_evaluation_stay_float32(head, name):
    run = step_of(head, name)
    with jax.enable_x64(True):
        wide = jax.eval_shape(run)
    assert [jax.tree_util.keystr(path) for path, leaf in tree_leaves_with_path(wide) if leaf.dtype == 'float64'] == []
    floats = {leaf.dtype for leaf in jax.tree.leaves(wide[0]) if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    assert floats == {jnp.dtype('float32')}  # no smaller type either


@pytest.mark.slow
def test_metrics_of_a_step_are_the_same_with_x64():
    run = step_of('language_model', 'full')
    expected = jax.tree.leaves(jax.jit(run)()[1:])
    with jax.enable_x64(True):
        found = jax.tree.leaves(jax.jit(run)()[1:])
    np.testing.assert_allclose(np.array(found, float), np.array(expected, float), rtol=1e-4)


@pytest.mark.parametrize('name', [name for name in combiner.names() if True in registry.resolve(name).supported_causal])
def test_decoding_keeps_float64(name):
    frame = {'width': 8, 'heads': 2, 'max_length': 23, 'dtype': jnp.float64}
    module = make_attention(name, sizes_of(name), **frame)
    counts = jnp.array([5, 3])

    def run(x):
        variables = module.init(jax.random.key(0), x, jnp.arange(9)[None])
        prefilled, cache = module.apply(
            variables, x, jnp.arange(9)[None], counts, 23, method='prefill', mutable=['cache']
        )
        step, _ = module.apply(variables | cache, x[:, :1], counts, method='decode', mutable=['cache'])
        return prefilled, step

    with jax.enable_x64(True):
        assert {x.dtype for x in jax.eval_shape(run, jnp.zeros((2, 9, 8), jnp.float64))} == {jnp.dtype(jnp.float64)}
