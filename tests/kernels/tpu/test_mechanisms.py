import functools
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import compile_ahead
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absent_tpu import DEVICES, on
from cases import TOLERANCE, assert_close, causal_or_not, draw
from compile_ahead import gradients, masks, shapes
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

import combiner
from combiner import sharding
from combiner.attention.combiner_fixed import CombinerFixed, attend_combiner_fixed
from combiner.core import registry
from combiner.core.mechanism import Context
from combiner.kernels import shards
from combiner.kernels.tpu import mechanisms, plan, tiles
from combiner.kernels.tpu.mechanisms import FIXED
from combiner.kernels.tpu.plan import Plan
from combiner.ops.softmax import Dropout

BLOCK = 16
V5E = 'TPU v5 lite'
# Sizes of blocks at some thousand positions.
USUAL = {
    'combiner_fixed': 128,
    'combiner_tree': 32,
    'combiner_logsparse': 128,
    'combiner_axial_rowmajor': 32,
    'combiner_mixture': 128,
}
KERNELS = {'combiner_logsparse': 4, 'combiner_mixture': 6}  # forward and backward together; of others 2
NAMES = [name for name in combiner.names() if 'mosaic' in registry.resolve(name).implementations]
every_mechanism = pytest.mark.parametrize('name', NAMES)


def test_query_heads_of_a_key_head_drop_the_same_weights_as_with_repeated_keys():
    """With 520 positions in two tiles, two key heads in one register, and three registers of query heads."""
    q, cotangent, _ = draw(1, 520, 6, 64)
    k, v, _ = draw(1, 520, 2, 64)
    mechanism = CombinerFixed(causal=True, block=BLOCK, implementation='mosaic')

    def run(repeats):
        def attend(q, k, v):
            k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
            return mechanism.attend(q, k, v, Context(drop=Dropout(jax.random.key(5), 0.3)))

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent)

    for one, other in zip(run(1), run(3), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(('model', 'log'), [(2, ''), (4, 'the mesh splits query heads into 4 parts, key heads into 1')])
def test_key_heads_are_repeated_only_where_the_mesh_needs_it_which_is_logged(model, log, absl_log):
    """With two key heads of two query heads each."""
    q, (_, k, v) = draw(1, 20, 4, 32)[0], draw(1, 20, 2, 32)
    shards.log_repeated.cache_clear()
    attend = functools.partial(combiner.attend, name='combiner_fixed', causal=True, block=BLOCK)
    expected = attend(q, k, v)
    with sharding.use(sharding.make_mesh(model=model)):
        actual = jax.jit(functools.partial(attend, implementation='mosaic'))(q, k, v)
    assert_close(actual, expected, TOLERANCE[jnp.float32])
    assert log in absl_log.text
    assert ('key heads are repeated' in absl_log.text) == bool(log)


def explicit_dropout(key, rate, batch, length, heads):
    """Dropout for the plain form, by the weights that the kernel keeps: first of the own block, then of summaries."""
    blocks = -(-length // BLOCK)
    seeds = jax.lax.bitcast_convert_type(jax.random.bits(key, (batch, heads)), jnp.int32)
    kept, firsts = jnp.int32(round((1 - rate) * 2**24)), iter((0, BLOCK))

    def drop(weights):
        first_key, keys = next(firsts), weights.shape[-1]

        def of_block(seed, block):
            return tiles.kept_weights(seed, block * BLOCK, first_key, (BLOCK, keys), kept)

        over_blocks = jax.vmap(of_block, (None, 0))
        keep = jax.vmap(jax.vmap(over_blocks, (0, None)), (0, None))(seeds, jnp.arange(blocks))
        keep = jnp.moveaxis(keep, 1, 0).reshape(weights.shape)
        return jnp.where(keep, weights / (1 - rate), 0)

    return drop


@causal_or_not
def test_dropout_has_the_same_mask_forward_and_backward(causal):
    """With 513 positions in two tiles; the weights that are kept are a function of the seed and the positions."""
    batch, length, heads, rate, key = 2, 513, 3, 0.3, jax.random.key(5)
    *qkv, cotangent = draw(batch, length, heads, 32, count=4)
    mechanism = CombinerFixed(causal=causal, block=BLOCK, implementation='mosaic')

    @jax.jit
    def run(q, k, v, cotangent):
        out, pull_back = jax.vjp(lambda *x: mechanism.attend(*x, Context(drop=Dropout(key, rate))), q, k, v)
        return out, *pull_back(cotangent)

    @jax.jit
    def plain(q, k, v, cotangent):
        def attend(*qkv):
            # One row for a summary of every block of the tiles, which are beyond the end of the sequence.
            drop = explicit_dropout(key, rate, batch, length, heads)
            return attend_combiner_fixed(*qkv, block=BLOCK, causal=causal, drop=drop)

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent)

    for one, other in zip(run(*qkv, cotangent), plain(*qkv, cotangent), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@causal_or_not
@pytest.mark.parametrize('name', ['combiner_fixed', 'combiner_tree'])
def test_dropout_of_given_summaries_is_that_of_the_kernels_own(name, causal, monkeypatch):
    """With documents, in two tiles: the seeds are the same, and so the weights that are kept, forward and backward."""
    *qkv, cotangent = draw(1, 520, 2, 64, count=4)
    segments = np.cumsum(np.random.default_rng(0).random((1, 520)) < 0.02, axis=1).astype(np.int32)
    size = {'block' if name == 'combiner_fixed' else 'branch': BLOCK}
    mechanism = registry.make_mechanism(name, {**size, 'implementation': 'mosaic'}, causal=causal)

    def run():
        context = Context(drop=Dropout(jax.random.key(5), 0.3), segments=jnp.asarray(segments))
        out, pull_back = jax.vjp(lambda *x: mechanism.attend(*x, context), *qkv)
        return out, *pull_back(cotangent)

    expected = run()
    monkeypatch.setattr(mechanisms, 'fused_pool', lambda pools, levels: '')  # XLA pools, by the maximum too
    for one, other in zip(run(), expected, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@causal_or_not
@pytest.mark.parametrize('name', ['combiner_logsparse', 'combiner_tree'])
def test_the_gradient_of_dropout_is_of_the_weights_that_were_kept(name, causal):
    """With means, which are smooth: linear in values, with a slope along queries and keys.

    Those of Combiner-Tree are given to the kernel.
    """
    key, length = jax.random.key(5), 75
    *qkv, cotangent, along_q, along_k = draw(2, length, 3, 32, count=6)
    size = {'chunk' if name == 'combiner_logsparse' else 'branch': 16}
    mechanism = registry.make_mechanism(name, {**size, 'pool': 'mean', 'implementation': 'mosaic'}, causal=causal)

    def product(q, k, v):
        return (mechanism.attend(q, k, v, Context(drop=Dropout(key, 0.3))) * cotangent).sum()

    @functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})  # quicker to compile
    def run(q, k, v):
        value, (dq, dk, dv) = jax.value_and_grad(product, (0, 1, 2))(q, k, v)
        return value, (dv * v).sum(), (dq * along_q).sum() + (dk * along_k).sum()

    step, (q, k, v) = 1e-3, qkv
    value, linear, slope = run(q, k, v)
    after, before = (run(q + sign * step * along_q, k + sign * step * along_k, v)[0] for sign in (1, -1))
    assert_close(linear, value, TOLERANCE[jnp.float32])
    np.testing.assert_allclose((after - before) / (2 * step), slope, rtol=1e-3)


def test_dropout_keeps_the_right_part_of_the_weights_and_differs_between_seeds():
    count = jnp.int32(round(0.7 * 2**24))
    first, second = (np.asarray(tiles.kept_weights(jnp.int32(seed), 0, 0, (512, 256), count)) for seed in (1, 2))
    deviation = np.sqrt(0.21 / 256)
    for kept in (first, second):
        assert abs(kept.mean() - 0.7) < 5 * deviation / np.sqrt(512)
        assert abs(kept.mean(axis=0) - 0.7).max() < 5 * deviation
        assert abs(kept.mean(axis=1) - 0.7).max() < 6 * deviation
    assert abs((first == second).mean() - 0.58) < 0.01


def test_another_function_of_the_weights_takes_the_plain_form():
    q, k, v = draw(1, 20, 1, 32)
    options = {'drop': lambda weights: 2 * weights, 'block': 16, 'causal': True}
    assert 'ops.softmax.Dropout' in FIXED.refuse(
        q, pools=CombinerFixed().pools(Context()), valid=None, segments=None, **options
    )
    out = CombinerFixed(block=16).attend(q, k, v, Context(drop=options['drop']))
    expected = combiner.attend(q, k, v, 'combiner_fixed', causal=True, block=16)
    assert_close(out, 2 * expected, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    ('shape', 'dtype', 'hyper', 'message'),
    [
        ((1, 40, 1, 8), jnp.float16, {'block': 16}, 'takes float32 or bfloat16, not float16'),
        ((1, 40, 1, 8), jnp.float32, {'block': 5}, 'takes blocks of a multiple of 8 positions in float32, not 5'),
        ((1, 40, 1, 8), jnp.bfloat16, {'block': 8}, 'takes blocks of a multiple of 16 positions in bfloat16, not 8'),
        ((1, 40000, 1, 8), jnp.float32, {'block': 4096}, 'MiB of vector memory for length 40000 and block 4096, of 60'),
    ],
)
def test_what_the_kernel_cannot_do_is_told(shape, dtype, hyper, message):
    q = jax.ShapeDtypeStruct(shape, dtype)
    attend = functools.partial(combiner.attend, name='combiner_fixed', causal=True, implementation='mosaic', **hyper)
    with pytest.raises(
        ValueError, match=f"CombinerFixed: implementation='mosaic' .*{message}.*; choose another, or None"
    ):
        jax.eval_shape(attend, q, q, q)


def test_a_block_longer_than_the_sequence_of_any_length():
    q, k, v = draw(1, 5, 1, 8)
    out = combiner.attend(q, k, v, 'combiner_fixed', causal=True, block=7, implementation='mosaic')
    assert_close(out, jax.nn.dot_product_attention(q, k, v, is_causal=True), TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    ('length', 'block', 'tile', 'count'),
    [(1, 8, 8, 1), (1000, 128, 1024, 1), (1025, 128, 1024, 2), (4096, 16, 512, 8), (4096, 24, 768, 6)],
)
def test_tiles(length, block, tile, count):
    sizes = Plan('any', 1, length, 1, 64, block, True, 'max', 1, False, 'float32', '', True)
    assert (sizes.tile, sizes.tiles) == (tile, count)
    assert sizes.tiles == 1 or sizes.tile % 128 == 0


@pytest.mark.parametrize(('causal', 'memory'), [(True, 5), (False, 10)])
def test_a_tile_is_as_short_as_the_memory_needs(causal, memory, monkeypatch):
    """Four tiles of two blocks then share the rows of a table that they write."""
    options = {'causal': causal, 'block': 128}
    packed = {'segments': np.cumsum(np.random.default_rng(0).random((1, 1041)) < 0.01, axis=1).astype(np.int32)}

    def run(implementation):
        def attend(*qkv):
            return combiner.attend(*qkv, 'combiner_fixed', implementation=implementation, **options, **packed)

        *qkv, cotangent = draw(1, 1041, 1, 128, count=4)
        out, pull_back = jax.vjp(attend, *qkv)
        return out, *pull_back(cotangent)

    monkeypatch.setitem(plan.VECTOR_MEMORY, '', memory)
    sizes = Plan('any', 1, 1041, 1, 128, 128, causal, 'max', 1, True, 'float32', '', True)
    assert (sizes.tile_blocks, sizes.tiles, sizes.shares_rows) == (2, 5, True)
    for one, other in zip(run('mosaic'), run('xla'), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def kernels_in(program) -> int:
    return program.as_text().count('@tpu_custom_call')


def widths_one_way_each():
    """Causal and bidirectional in turn; each width's other way is among the slow tests."""
    kinds = [(jnp.float32, 32), (jnp.bfloat16, 64), (jnp.bfloat16, 128), (jnp.float32, 256)]
    for turn, kind in enumerate(kinds):
        for causal in (False, True):
            yield pytest.param(*kind, causal, marks=[] if causal == bool(turn % 2) else [pytest.mark.slow])


@every_mechanism
@pytest.mark.parametrize(('dtype', 'width', 'causal'), list(widths_one_way_each()))
def test_it_lowers_for_a_tpu(dtype, width, causal, name):
    with on(V5E):
        traced = jax.jit(gradients(name, causal, 16)).trace(*shapes(1041, 4, width, dtype), *masks(1041))
        assert kernels_in(traced.lower(lowering_platforms=('tpu',))) == KERNELS.get(name, 2)


@every_mechanism
def test_it_lowers_whatever_the_precision_of_other_products(name):
    """`jax_default_matmul_precision` says nothing of bfloat16, which a TPU multiplies in one way alone."""
    with on(V5E), jax.default_matmul_precision('high'):
        traced = jax.jit(gradients(name, True, 16)).trace(*shapes(40, 2, 64, jnp.bfloat16))
        text = traced.lower(lowering_platforms=('tpu',)).as_text()
    assert '@tpu_custom_call' in text


@causal_or_not
@every_mechanism
def test_a_sequence_of_one_block_lowers_for_a_tpu(name, causal):
    with on(V5E):
        traced = jax.jit(gradients(name, causal, 16)).trace(*shapes(5, 2, 64, jnp.bfloat16), *masks(5))
        assert kernels_in(traced.lower(lowering_platforms=('tpu',))) >= 2


@every_mechanism
def test_it_lowers_for_many_tpus_at_the_size_of_training(name):
    """The blocks of a tile are unrolled there; XLA cannot split a kernel, which would be an error."""
    kinds = (AxisType.Auto,) * 3  # like the project's meshes; JAX's default changed in 0.12
    mesh = AbstractMesh((2, 2, 2), ('data', 'fsdp', 'model'), axis_types=kinds, abstract_device=DEVICES[V5E])
    with use_abstract_mesh(mesh):
        traced = jax.jit(gradients(name, True, USUAL[name])).trace(*shapes(4096, 8, 64, jnp.bfloat16))
        assert kernels_in(traced.lower(lowering_platforms=('tpu',))) == KERNELS.get(name, 2)


def compiled_ahead(name, topology, *switches, **sizes) -> str:
    """What is printed of programs that XLA compiles, in a process of its own, for TPUs that are not there."""
    if importlib.util.find_spec('libtpu') is None:
        pytest.skip('needs libtpu: bash scripts/setup.sh tpu-aot')
    command = [sys.executable, compile_ahead.__file__, name, f'--topology={topology}', f'--block={USUAL[name]}']
    command += [f'--{size}={value}' for size, value in sizes.items()] + [f'--{switch}' for switch in switches]
    env = {key: value for key, value in os.environ.items() if key not in ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')}
    env |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
    env['PYTHONPATH'] = str(Path(__file__).parents[3])
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernels_compiled(text) -> int:
    return text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.slow
@pytest.mark.parametrize('switches', [(), ('causal',)], ids=['bidirectional', 'causal'])
@every_mechanism
@pytest.mark.parametrize(('length', 'width', 'packed'), [(16384, 128, ()), (4096, 64, ()), (4096, 128, ('packed',))])
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1'])
def test_it_compiles_for_a_tpu(topology, length, width, packed, name, switches):
    text = compiled_ahead(name, topology, *packed, *switches, length=length, width=width)
    assert kernels_compiled(text) == KERNELS.get(name, 2)


@pytest.mark.slow
@every_mechanism
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_every_head_width_compiles_for_a_tpu(topology, name):
    """By the kernels, which are named and so cannot be replaced by another form."""
    lines = compiled_ahead(name, topology, 'causal', 'widths', length=4096).splitlines()
    found = [line.split() for line in lines if line.startswith(('float32', 'bfloat16'))]
    assert [(dtype, int(width)) for dtype, width, *_ in found] == list(
        itertools.product(('float32', 'bfloat16'), (32, 64, 128, 256))
    )
    for _, _, *kernels in found:
        assert len(kernels) == KERNELS.get(name, 2)
        assert any(f'{name}_forward' in kernel for kernel in kernels)
        assert any(f'{name}_backward' in kernel for kernel in kernels)


@pytest.mark.slow
@every_mechanism
def test_it_compiles_for_many_tpus_without_gathering(name):
    text = compiled_ahead(name, 'v5e:2x2', 'causal', 'sharded', length=2048, width=128)
    assert kernels_compiled(text) == KERNELS.get(name, 2)
    assert not [kind for kind in ('all-gather', 'all-to-all', 'all-reduce', 'collective-permute') if kind in text]
