import importlib.util
import os
import re
import subprocess
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw
from compile_ahead import gradients, masks, shapes
from flax import linen as nn
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

import combiner
from combiner import costs, sharding
from combiner.aot import targets
from combiner.core import registry
from combiner.core.mechanism import Context
from combiner.core.module import make_attention
from combiner.kernels.dropout import KEPT_UNIT
from combiner.kernels.gpu import slices
from combiner.kernels.gpu.mechanisms import FIXED
from combiner.ops.pooling import PLAIN
from combiner.ops.softmax import Dropout

USUAL = {'combiner_fixed': 128, 'combiner_tree': 32}  # sizes of blocks at some thousand positions
NAMES = [name for name in combiner.names() if 'triton' in registry.resolve(name).implementations]
every_mechanism = pytest.mark.parametrize('name', NAMES)


def levels_of(name, length, block):
    return costs.tree_levels(length, block) if name == 'combiner_tree' else 1


def kernels(name, length, block, tables=1):
    """Attention, and the gradients of positions; of every level, summaries, their parents' gradients and the tables'.

    One kernel summarises the blocks for several tables, but above the blocks each has its own.
    """
    levels = levels_of(name, length, block)
    above = tables * (levels - 1)
    return 2 + levels + 2 + 3 * above  # summaries above the blocks also add what they get from their parents


def kept_weights(seed, kept, queries, keys):
    """The factors of queries and keys, each given by the first and their count."""
    queries, keys = (slices.Slice.of(None, first, count, count) for first, count in (queries, keys))
    given = jnp.stack([seed, jnp.int32(round(kept * KEPT_UNIT))])
    return slices.kept_weights(given, queries.column, keys.row)


def explicit_dropout(key, rate, batch, heads, plan):
    """Dropout for the plain form, by the weights that the kernel keeps: first of the own block, then of summaries."""

    def first_summary(n, level):
        return plan.before(level, 0) + slices.round_down(n // plan.block**level, plan.row(level))

    firsts = iter([lambda n: n * plan.block, *(partial(first_summary, level=level) for level in range(plan.levels))])
    seeds = jax.lax.bitcast_convert_type(jax.random.bits(key, (batch, heads)), jnp.int32)

    def drop(weights):
        first = next(firsts)

        def of_block(seed, n):
            return kept_weights(seed, 1 - rate, (n * plan.block, plan.block), (first(n), weights.shape[-1]))

        of_row = jax.vmap(jax.vmap(of_block, (None, 0)), (0, None))
        return weights * jnp.moveaxis(jax.vmap(of_row, (0, None))(seeds, jnp.arange(plan.count(0))), 1, 0).reshape(
            weights.shape
        )

    return drop


@pytest.mark.parametrize(
    ('name', 'causal', 'block', 'pool'),
    [
        ('combiner_fixed', True, 16, 'max'),
        ('combiner_fixed', False, 16, 'max'),
        ('combiner_tree', False, 8, 'max'),
        ('combiner_tree', False, 8, 'mean'),
    ],
)
def test_dropout_has_the_same_mask_forward_and_backward(name, causal, block, pool):
    """Summaries of Combiner-Tree by the mean are given to the kernel."""
    batch, length, heads, rate, key = 1, 70, 2, 0.3, jax.random.key(5)
    *qkv, cotangent = draw(batch, length, heads, 32, count=4)
    relations, levels = ('earlier',) if causal else ('other',), levels_of(name, length, block)
    plan = slices.Plan(length, 32, block, causal, False, relations, levels, interpret=True)

    def run(drop, implementation):
        size = {'branch' if 'tree' in name else 'block': block}
        mechanism = registry.make_mechanism(
            name, {**size, 'pool': pool, 'implementation': implementation}, causal=causal
        )
        return jax.jit(lambda *x: gradients_of(mechanism, Context(drop=drop()), *x))(*qkv, cotangent)

    actual = run(lambda: Dropout(key, rate), 'triton')
    for one, other in zip(actual, run(lambda: explicit_dropout(key, rate, batch, heads, plan), 'xla'), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def gradients_of(mechanism, context, q, k, v, cotangent):
    out, pull_back = jax.vjp(lambda *qkv: mechanism.attend(*qkv, context), q, k, v)
    return out, *pull_back(cotangent)


def test_dropout_keeps_the_right_part_of_the_weights_and_differs_between_seeds():
    kept = [np.asarray(kept_weights(jnp.int32(seed), 0.7, (0, 512), (0, 512))) for seed in (1, 2, 2)]
    for x in kept:
        np.testing.assert_allclose(np.unique(x), [0, 1 / 0.7], rtol=1e-6)
        np.testing.assert_allclose((x > 0).mean(axis=0), 0.7, atol=0.12)
        np.testing.assert_allclose((x > 0).mean(axis=1), 0.7, atol=0.12)
        assert abs((x > 0).mean() - 0.7) < 0.005
    np.testing.assert_array_equal(kept[1], kept[2])
    assert abs(((kept[0] > 0) == (kept[1] > 0)).mean() - (0.7**2 + 0.3**2)) < 0.005


def test_float16():
    *qkv, _ = draw(1, 100, 2, 64, count=4)
    options = {'causal': True, 'block': 16}
    halves = [x.astype(jnp.float16) for x in qkv]
    actual = combiner.attend(*halves, 'combiner_fixed', implementation='triton', **options)
    expected = combiner.attend(*(x.astype(jnp.float32) for x in halves), 'combiner_fixed', **options)
    assert actual.dtype == jnp.float16
    assert_close(actual, expected, 2e-3)


@pytest.mark.parametrize(('name', 'block'), [('combiner_fixed', 7), ('combiner_fixed', 48), ('combiner_tree', 12)])
def test_blocks_that_no_tile_divides(name, block):
    *qkv, cotangent = draw(1, 150, 1, 32, count=4)

    def run(implementation):
        return jax.jit(gradients(name, True, block, implementation))(*qkv, cotangent)

    for one, other in zip(run('triton'), run('xla'), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_what_it_refuses():
    q = jnp.zeros((1, 40, 1, 32))
    options = {'causal': True, 'pools': PLAIN['max'], 'drop': None}
    assert FIXED.refuse(q, block=16, **options) == ''
    refused = {
        'float32, bfloat16, float16, not float8_e4m3fn': FIXED.refuse(q.astype(jnp.float8_e4m3fn), **options),
        'up to 128 in float32, not 136': FIXED.refuse(jnp.zeros((1, 40, 1, 136)), **options),
        'up to 256 in bfloat16, not 264': FIXED.refuse(jnp.zeros((1, 40, 1, 264), jnp.bfloat16), **options),
        'ops.softmax.Dropout': FIXED.refuse(q, **options | {'drop': lambda weights: weights}),
    }
    for expected, why in refused.items():
        assert expected in why


@pytest.mark.parametrize(
    ('kind', 'refused'),
    [
        *((kind, True) for kind in ('Tesla V100-SXM2-16GB', 'NVIDIA T4G', 'NVIDIA GeForce RTX 2080 Ti', 'gfx942')),
        *((kind, True) for kind in ('NVIDIA GeForce MX450', 'GRID RTX6000-8Q', 'Quadro RTX 5000')),
        *((kind, False) for kind in ('NVIDIA A100-SXM4-80GB', 'NVIDIA H200', 'NVIDIA L4', 'NVIDIA GeForce RTX 4090')),
        *((kind, False) for kind in ('NVIDIA RTX 2000 Ada Generation', 'NVIDIA RTX A2000')),
    ],
)
def test_gpus_for_which_triton_does_not_compile_are_refused(kind, refused):
    """By the name of the target, whatever devices this machine has."""
    with mesh_of_gpus((1, 1, 1), kind):
        why = FIXED.refuse(jnp.zeros((1, 40, 1, 32)), pools=PLAIN['max'], drop=None)
    assert why == (f'needs an NVIDIA GPU of compute capability 8.0 or newer, not {kind}' if refused else '')


@pytest.mark.parametrize(('block', 'length'), [(32, 2**20), (2048, 2**22 + 1), (1500, 2_300_000), (2, 2**26 + 1)])
def test_the_queries_of_summaries_are_found_in_32_bits(block, length):
    """Of the last slice of every level, whose row goes on far behind the sequence."""
    levels = costs.tree_levels(length, block)
    plan = slices.Plan(length, 64, block, True, True, ('earlier', 'later'), levels, False)
    for level in range(levels):
        size, count = plan.size(level), plan.count(level)
        start = (count - 1) // 16 * 16
        keys = slices.Slice(jnp.int32(start), jnp.arange(16), None, None)
        row = (start // block * block, (start + 15) // block * block + block)
        exact = {'other': row, 'earlier': (start + 1, row[1]), 'later': (row[0], start + 15)}
        for relation, (first, end) in exact.items():
            begin, stop = slices.queries_of(keys, relation, level, 1, plan)
            assert (int(begin), int(stop)) == (min(first, count) * size, min(end * size, length)), (level, relation)


def mesh_of_gpus(shape, kind='NVIDIA A100-SXM4-80GB'):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform='gpu')
    axes = ('data', 'fsdp', 'model')
    return use_abstract_mesh(AbstractMesh(shape, axes, axis_types=(AxisType.Auto,) * 3, abstract_device=device))


# JAX 0.11 and later; `block_table` says why Triton nevertheless.
lowers = pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')


@lowers
@causal_or_not
@every_mechanism
@pytest.mark.parametrize(('dtype', 'width'), [('float32', 32), ('bfloat16', 256), ('float16', 128)])
def test_it_lowers_for_a_gpu(dtype, width, name, causal):
    """The best implementation on a GPU; packed and not causal, there are two tables of every level."""
    with mesh_of_gpus((1, 1, 1)):
        traced = jax.jit(gradients(name, causal, 16, None)).trace(*shapes(1041, 4, width, dtype), *masks(1041))
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('xla.gpu.triton') == kernels(name, 1041, 16, tables=1 if causal else 2)


@lowers
@every_mechanism
def test_it_lowers_for_many_gpus(name):
    """With two query heads of each key head."""
    q, k = (jax.ShapeDtypeStruct((4, 2048, heads, 64), jnp.bfloat16) for heads in (4, 2))
    with mesh_of_gpus((2, 2, 2)):
        traced = jax.jit(gradients(name, True, USUAL[name], None)).trace(q, k, k, q)
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('xla.gpu.triton') == kernels(name, 2048, USUAL[name])
    assert 'sdy.manual_computation' in text


ARCHITECTURES = {'a100': 'sm_80', 'h100': 'sm_90a'}


@pytest.fixture
def _compiler():
    """The compiler for GPUs, as programs are compiled in practice."""
    pytest.importorskip('jax_plugins.xla_cuda13', reason='bash scripts/setup.sh gpu-aot')
    if os.environ.get('JAX_PLATFORMS') != 'cpu':
        pytest.skip(
            'needs JAX_PLATFORMS=cpu in the environment: otherwise the plug-in looks for libraries to run programs'
        )
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] != '0')


class Kernel(NamedTuple):
    """What the assembler says of a kernel: registers of a thread, and bytes of a program."""

    registers: int
    spilled: int
    shared: int


def compiled_kernels(folder: Path, architecture: str) -> dict[str, Kernel]:
    """The kernels of a program whose compilation was dumped; spilled are stores to memory for want of registers."""
    ptxas = Path(importlib.util.find_spec('nvidia.cu13').submodule_search_locations[0]) / 'bin' / 'ptxas'
    (thunks,) = folder.glob('*.thunk_sequence.txt')
    shared = dict(re.findall(r'(_\w+_kernel\w*) grid.*shared_memory: (\d+)', thunks.read_text()))
    found = {}
    for path in (path for path in folder.glob('*.ptx') if '_kernel' in path.read_text()):
        command = [ptxas, '-v', f'-arch={architecture}', path, '-o', '/dev/null']
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        pattern = r"entry function '(_\w+_kernel\w*)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        for name, spilled, registers in re.findall(pattern, said, re.S):
            found[name] = Kernel(int(registers), int(spilled), int(shared[name]))
    return found


@lowers
@pytest.mark.slow
@pytest.mark.usefixtures('_compiler')
@pytest.mark.parametrize(
    ('length', 'width', 'dtype', 'causal', 'masked'),
    [
        (4096, 64, jnp.bfloat16, True, False),
        (4096, 128, jnp.bfloat16, True, False),
        (16384, 128, jnp.bfloat16, True, False),
        (4000, 64, jnp.bfloat16, False, True),
        (4000, 128, jnp.bfloat16, False, True),
        (4000, 256, jnp.bfloat16, True, True),
        (4000, 64, jnp.float32, True, False),
        (4000, 128, jnp.float32, False, True),
    ],
)
@every_mechanism
@pytest.mark.parametrize('gpu', ARCHITECTURES)
def test_it_compiles_for_a_gpu_without_spilling_registers(gpu, tmp_path, name, length, width, dtype, causal, masked):
    """Prints what each kernel needs (pytest -s)."""
    with sharding.use(sharding.make_mesh(devices=targets.parse(gpu).devices())):
        given = masks(length) if masked else ()
        lowered = jax.jit(gradients(name, causal, USUAL[name], None)).lower(*shapes(length, 8, width, dtype), *given)
        lowered.compile(compiler_options={'xla_dump_to': str(tmp_path)})
    found = compiled_kernels(tmp_path, ARCHITECTURES[gpu])
    for kernel, needs in sorted(found.items()):
        print(gpu, name, length, width, jnp.dtype(dtype), 'causal' if causal else '', kernel, needs)
    assert len(found) == kernels(name, length, USUAL[name])  # above the blocks, two tables share a compiled kernel
    assert not {kernel: needs for kernel, needs in found.items() if needs.spilled}


@lowers
@pytest.mark.slow
@pytest.mark.usefixtures('_compiler')
@every_mechanism
@pytest.mark.parametrize('gpu', ARCHITECTURES)
def test_given_summaries_and_grouped_heads_compile_without_spilling_registers(gpu, tmp_path, name):
    """Of a pooling with parameters, with four query heads of each key head; prints as the test above."""
    hyper = {'branch' if name == 'combiner_tree' else 'block': USUAL[name], 'pool': 'deepsets'}
    module = make_attention(
        name, hyper | {'implementation': 'triton'}, width=1024, heads=8, kv_heads=2, dtype='bfloat16'
    )
    x, positions = jax.ShapeDtypeStruct((1, 4096, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def gradients_of_module(variables, x, positions):
        return jax.grad(lambda *inputs: module.apply(*inputs, positions).sum(dtype=jnp.float32), (0, 1))(variables, x)

    with sharding.use(sharding.make_mesh(devices=targets.parse(gpu).devices())):
        variables = jax.eval_shape(lambda *inputs: nn.unbox(module.init(jax.random.key(0), *inputs)), x, positions)
        lowered = jax.jit(gradients_of_module).lower(variables, x, positions)
        lowered.compile(compiler_options={'xla_dump_to': str(tmp_path)})
    found = compiled_kernels(tmp_path, ARCHITECTURES[gpu])
    for kernel, needs in sorted(found.items()):
        print(gpu, name, 'given and grouped', kernel, needs)
    assert len(found) == 2 + levels_of(name, 4096, USUAL[name])  # the gradients of the tables of each level
    assert not {kernel: needs for kernel, needs in found.items() if needs.spilled}


@lowers
@pytest.mark.slow
@pytest.mark.usefixtures('_compiler')
@pytest.mark.parametrize(('name', 'target'), [*((name, 'triton') for name in NAMES), ('full', '__cudnn$fmha')])
def test_a_host_of_gpus_computes_its_sequences_and_heads_without_gathering(name, target):
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2, devices=targets.parse('h100:8').devices())
    placement = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES, None, sharding.HEAD_AXES))
    given = (jax.ShapeDtypeStruct((8, 2048, 8, 128), jnp.bfloat16, sharding=placement),) * 4
    mechanism = registry.make_mechanism(name, {}, causal=True)
    with sharding.use(mesh):
        text = jax.jit(partial(gradients_of, mechanism, Context())).lower(*given).compile().as_text()
    assert target in text
    assert 'bf16[2,2048,4,128]' in text  # of a device
    collectives = ('all-gather', 'all-to-all', 'all-reduce', 'collective-permute', 'while')
    assert not [kind for kind in collectives if f' {kind}(' in text or f' {kind}-start(' in text]
