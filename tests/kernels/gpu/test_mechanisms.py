import importlib.util
import os
import re
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

import combiner
from combiner import sharding
from combiner.attention.combiner_fixed import CombinerFixed, attend_combiner_fixed
from combiner.core.mechanism import Context
from combiner.kernels.gpu import slices
from combiner.kernels.gpu.mechanisms import FIXED
from combiner.ops.pooling import PLAIN
from combiner.ops.softmax import Dropout

KERNELS = 5  # summaries, attention, and the gradients of positions, tables and summaries
DTYPES = ('float32', 'bfloat16', 'float16')


def kept_weights(seed, kept, queries, keys):
    """The factors of queries and keys, each given by the first and their count."""
    queries, keys = (slices.Slice.of(None, first, count, count) for first, count in (queries, keys))
    given = jnp.stack([seed, jnp.int32(round(kept * slices.KEPT_UNIT))])
    return slices.kept_weights(given, queries.column, keys.row)


def explicit_dropout(key, rate, batch, length, heads, block):
    """Dropout for the plain form, by the weights that the kernel keeps: first of the own block, then of summaries."""
    firsts = iter((lambda n: n * block, lambda n: length))
    numbers = jnp.arange(-(-length // block))
    seeds = jax.lax.bitcast_convert_type(jax.random.bits(key, (batch, heads)), jnp.int32)

    def drop(weights):
        first = next(firsts)

        def of_block(seed, n):
            return kept_weights(seed, 1 - rate, (n * block, block), (first(n), weights.shape[-1]))

        of_row = jax.vmap(jax.vmap(of_block, (None, 0)), (0, None))
        return weights * jnp.moveaxis(jax.vmap(of_row, (0, None))(seeds, numbers), 1, 0).reshape(weights.shape)

    return drop


@causal_or_not
def test_dropout_has_the_same_mask_forward_and_backward(causal):
    batch, length, heads, block, rate, key = 1, 70, 2, 16, 0.3, jax.random.key(5)
    *qkv, cotangent = draw(batch, length, heads, 32, count=4)
    mechanism = CombinerFixed(causal=causal, block=block, implementation='triton')

    @jax.jit
    def run(q, k, v):
        out, pull_back = jax.vjp(lambda *x: mechanism.attend(*x, Context(drop=Dropout(key, rate))), q, k, v)
        return out, *pull_back(cotangent)

    @jax.jit
    def plain(q, k, v):
        drop = explicit_dropout(key, rate, batch, length, heads, block)
        attend = partial(attend_combiner_fixed, block=block, causal=causal, drop=drop)
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent)

    for one, other in zip(run(*qkv), plain(*qkv), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_dropout_keeps_the_right_part_of_the_weights_and_differs_between_seeds():
    kept = [np.asarray(kept_weights(jnp.int32(seed), 0.7, (0, 512), (0, 512))) for seed in (1, 2, 2)]
    for x in kept:
        np.testing.assert_allclose(np.unique(x), [0, 1 / 0.7], rtol=1e-6)
        np.testing.assert_allclose((x > 0).mean(axis=0), 0.7, atol=0.12)
        np.testing.assert_allclose((x > 0).mean(axis=1), 0.7, atol=0.12)
        assert abs((x > 0).mean() - 0.7) < 0.005
    np.testing.assert_array_equal(kept[1], kept[2])
    assert abs(((kept[0] > 0) == (kept[1] > 0)).mean() - (0.7**2 + 0.3**2)) < 0.005


def test_poolings_with_parameters():
    """XLA computes their summaries, whose gradients reach the parameters."""
    (x,), positions = draw(2, 37, 32, count=1), jnp.arange(37)[None]
    made = {
        one: combiner.Attention(CombinerFixed(block=16, pool='attention', implementation=one), width=32, heads=2)
        for one in ('triton', 'xla')
    }
    variables = made['xla'].init(jax.random.key(1), x, positions)
    gradients = [
        jax.jit(jax.grad(lambda v, m=module: (m.apply(v, x, positions) ** 2).sum()))(variables)
        for module in made.values()
    ]
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_float16():
    *qkv, _ = draw(1, 100, 2, 64, count=4)
    options = {'causal': True, 'block': 16}
    halves = [x.astype(jnp.float16) for x in qkv]
    actual = combiner.attend(*halves, 'combiner_fixed', implementation='triton', **options)
    expected = combiner.attend(*(x.astype(jnp.float32) for x in halves), 'combiner_fixed', **options)
    assert actual.dtype == jnp.float16
    assert_close(actual, expected, 2e-3)


@pytest.mark.parametrize('block', [7, 48])
def test_blocks_that_no_tile_divides(block):
    *qkv, cotangent = draw(1, 150, 1, 32, count=4)

    def run(implementation):
        return jax.jit(gradients(True, block, implementation))(*qkv, cotangent)

    for one, other in zip(run('triton'), run('xla'), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_what_it_refuses():
    q = jnp.zeros((1, 40, 1, 32))
    options = {'block': 16, 'causal': True, 'pools': PLAIN['max'], 'drop': None}
    assert FIXED.refuse(q, **options) == ''
    assert 'float32, bfloat16, float16, not float8_e4m3fn' in FIXED.refuse(q.astype(jnp.float8_e4m3fn), **options)
    assert 'up to 256, not 264' in FIXED.refuse(jnp.zeros((1, 40, 1, 264)), **options)
    assert 'ops.softmax.Dropout' in FIXED.refuse(q, **options | {'drop': lambda weights: weights})


@pytest.mark.parametrize(('capability', 'refused'), [('7.5', True), ('gfx942', True), ('8.0', False), ('12.0', False)])
def test_gpus_for_which_triton_does_not_compile_are_refused(monkeypatch, capability, refused):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(jax, 'local_devices', lambda: [SimpleNamespace(compute_capability=capability)])
    why = FIXED.refuse(jnp.zeros((1, 40, 1, 32)), drop=None)
    assert why == (f'needs an NVIDIA GPU of compute capability 8.0 or newer, not {capability}' if refused else '')


def gradients(causal, block, implementation=None):
    """A function that runs all kernels, with padding, documents and dropout if they are given."""
    mechanism = CombinerFixed(causal=causal, block=block, implementation=implementation)

    def run(q, k, v, cotangent, valid=None, segments=None, key=None):
        context = Context(valid=valid, segments=segments, drop=None if key is None else Dropout(key, 0.1))
        out, pull_back = jax.vjp(lambda *qkv: mechanism.attend(*qkv, context), q, k, v)
        return out, *pull_back(cotangent)

    return run


def shapes(length, heads, width, dtype):
    return (jax.ShapeDtypeStruct((1, length, heads, width), dtype),) * 4


def masks(length):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct((1, length), bool), jax.ShapeDtypeStruct((1, length), jnp.int32), key


def mesh_of_gpus(shape):
    device = AbstractDevice(device_kind='NVIDIA A100-SXM4-80GB', num_cores=None, platform='gpu')
    axes = ('data', 'fsdp', 'model')
    return use_abstract_mesh(AbstractMesh(shape, axes, axis_types=(AxisType.Auto,) * 3, abstract_device=device))


# JAX 0.11 and later; `block_table` says why Triton nevertheless.
lowers = pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')


@lowers
@causal_or_not
@pytest.mark.parametrize(
    ('dtype', 'width'), [('float32', 32), ('bfloat16', 64), ('bfloat16', 128), ('float16', 128), ('float32', 256)]
)
def test_it_lowers_for_a_gpu(dtype, width, causal):
    """The best implementation on a GPU; packed and not causal, there are two tables."""
    with mesh_of_gpus((1, 1, 1)):
        traced = jax.jit(gradients(causal, 16)).trace(*shapes(1041, 4, width, dtype), *masks(1041))
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('xla.gpu.triton') == (KERNELS if causal else KERNELS + 3)


@lowers
@causal_or_not
def test_it_lowers_for_many_gpus(causal):
    with mesh_of_gpus((2, 2, 2)):
        shape = jax.ShapeDtypeStruct((4, 512, 4, 64), jnp.bfloat16)
        text = jax.jit(gradients(causal, 128)).trace(*(shape,) * 4).lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('xla.gpu.triton') == KERNELS
    assert 'sdy.manual_computation' in text


# Facts of devices, in the form of XLA's GpuTargetConfigProto.
GPUS = {
    'sm_80': ('NVIDIA A100-SXM4-80GB', 'major: 8', 108, 64, 167936, 166912, 2039040000000, 41943040, 1.41, 85100068864),
    'sm_90a': (
        'NVIDIA H100 80GB HBM3',
        'major: 9 feature_extension: ACCELERATED_FEATURES',
        *(132, 128, 233472, 232448, 3352320000000, 52428800, 1.98, 84942979072),
    ),
}
TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ {1} }} core_count: {2} fpus_per_core: {3}
  shared_memory_per_core: {4} shared_memory_per_block_optin: {5}
  memory_bandwidth: {6} l2_cache_size: {7} clock_rate_ghz: {8} device_memory_size: {9}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024 thread_dim_limit_z: 64 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.12.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
device_description_str: "{0}"
"""


@pytest.fixture(params=GPUS)
def gpu(request):
    """A mesh of one GPU that is not there, for which XLA compiles, and its architecture."""
    pytest.importorskip('jax_plugins.xla_cuda13', reason='bash scripts/setup.sh gpu-aot')
    if os.environ.get('JAX_PLATFORMS') != 'cpu':
        pytest.skip(
            'needs JAX_PLATFORMS=cpu in the environment: otherwise the plug-in looks for libraries to run programs'
        )
    config = TARGET.format(*GPUS[request.param])
    topology = topologies.get_topology_desc(platform='cuda', topology_name='', target_config=config, topology='1x1x1')
    jax.config.update('jax_disable_most_optimizations', False)
    yield sharding.make_mesh(data=1, fsdp=1, model=1, devices=topology.devices), request.param
    jax.config.update('jax_disable_most_optimizations', os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] != '0')


def spilled(folder: Path, architecture: str) -> dict[str, int]:
    """The bytes that each kernel of a compiled program stores to memory for want of registers."""
    ptxas = Path(importlib.util.find_spec('nvidia.cu13').submodule_search_locations[0]) / 'bin' / 'ptxas'
    found = {}
    for path in (path for path in folder.glob('*.ptx') if '_kernel' in path.read_text()):
        command = [ptxas, '-v', f'-arch={architecture}', path, '-o', '/dev/null']
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        for name, stored in re.findall(r"entry function '(_\w+_kernel\w*)'.*?(\d+) bytes spill stores", said, re.S):
            found[name] = int(stored)
    return found


@lowers
@pytest.mark.slow
@pytest.mark.parametrize(
    ('length', 'width', 'dtype', 'causal', 'masked'),
    [
        (4096, 64, jnp.bfloat16, True, False),
        (4096, 128, jnp.bfloat16, True, False),
        (16384, 64, jnp.bfloat16, True, False),
        (16384, 128, jnp.bfloat16, True, False),
        (4000, 128, jnp.bfloat16, False, True),
        (4000, 256, jnp.bfloat16, True, True),
        (4000, 128, jnp.float32, False, True),
    ],
)
def test_it_compiles_for_a_gpu_without_spilling_registers(gpu, tmp_path, length, width, dtype, causal, masked):
    mesh, architecture = gpu
    with sharding.use(mesh):
        given = masks(length) if masked else ()
        lowered = jax.jit(gradients(causal, 128)).lower(*shapes(length, 8, width, dtype), *given)
        lowered.compile(compiler_options={'xla_dump_to': str(tmp_path)})
    stored = spilled(tmp_path, architecture)
    assert len(stored) == (KERNELS if causal else KERNELS + 1)  # a second table has kernels like the first
    assert set(stored.values()) == {0}, stored
