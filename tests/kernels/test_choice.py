import contextlib
import re

import jax
import jax.numpy as jnp
import pytest
from cases import draw
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import combiner
from combiner.core import registry
from combiner.kernels import choice
from combiner.ops import chunking

CHOOSING = [name for name in combiner.names() if registry.resolve(name).implementations]


@pytest.fixture(autouse=True)
def _log_again():
    choice._announce.cache_clear()


def on(platform: str, axes: tuple[str, ...] = ('data',), devices: int = 1, kind: str = 'any'):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    sizes = (devices, *(1 for _ in axes[1:]))
    return use_abstract_mesh(AbstractMesh(sizes, axes, abstract_device=device))


def chosen(implementation, q, implementations, **options):
    return choice.choose('Any', implementations, implementation, q, **options)


KERNELS = {'tpu': {'mosaic', 'splash'}, 'gpu': {'triton', 'cudnn'}}
CHIPS = [
    ('tpu', 'TPU v4', jnp.bfloat16, False, ''),
    ('tpu', 'TPU v3', jnp.float32, False, ''),
    ('tpu', 'TPU v3', jnp.bfloat16, False, 'multiplies bfloat16 from TPU v4 on, not on TPU v3'),
    ('tpu', 'TPU v4', jnp.float16, False, 'takes float32 or bfloat16, not float16'),
    ('tpu', 'TPU v4', jnp.float32, True, 'needs jax_enable_x64 to be off on a TPU'),
    ('gpu', 'NVIDIA A100-SXM4-80GB', jnp.bfloat16, False, ''),
    ('gpu', 'Tesla T4', jnp.bfloat16, False, 'needs an NVIDIA GPU of .*, not Tesla T4'),
    ('gpu', 'AMD Instinct MI300X', jnp.bfloat16, False, 'needs an NVIDIA GPU of .*, not AMD Instinct MI300X'),
]


@pytest.mark.parametrize(
    ('name', 'platform', 'kind', 'dtype', 'wide', 'why'),
    [
        (name, *chip)
        for name in CHOOSING
        for chip in CHIPS
        if KERNELS[chip[0]] & set(registry.resolve(name).implementations)
    ],
)
def test_no_kernel_is_chosen_that_a_chip_cannot_compile(absl_log, name, platform, kind, dtype, wide, why):
    no_cudnn = contextlib.suppress(RuntimeError)  # which is told after the choice
    with jax.enable_x64(wide), on(platform, kind=kind), no_cudnn:
        q = jax.ShapeDtypeStruct((1, 256, 2, 32), dtype)
        jax.eval_shape(lambda q: combiner.attend(q, q, q, name, causal=True), q)
    ((chosen, reason),) = set(re.findall(r'\w+: (\w+), on \w+ \((.*)\)', absl_log.text))
    assert (chosen in KERNELS[platform]) == (not why)
    assert re.search(why, reason)


@pytest.mark.parametrize(
    ('kind', 'batch', 'fits'), [('TPU v4', 512, True), ('TPU v4', 4096, False), ('TPU v3', 64, False)]
)
@pytest.mark.parametrize('name', [name for name in CHOOSING if 'mosaic' in registry.resolve(name).implementations])
def test_no_kernel_is_chosen_whose_seeds_of_dropout_fill_the_scalar_memory(absl_log, name, kind, batch, fits):
    attend, key = combiner.attention_fn(name, causal=True), jax.random.key(0)
    with on('tpu', kind=kind):
        q = jax.ShapeDtypeStruct((batch, 256, 2, 32), jnp.float32)
        jax.eval_shape(lambda q: attend(q, q, q, dropout_rng=key, dropout_rate=0.1), q)
    ((chosen, reason),) = set(re.findall(r'\w+: (\w+), on \w+ \((.*)\)', absl_log.text))
    assert (chosen == 'mosaic') == fits
    assert ('of scalar memory for the seeds of' in reason) == (not fits)


@pytest.mark.parametrize(
    ('kind', 'dtype', 'chosen'),
    [('TPU v4', jnp.float32, 'xla'), ('TPU v4', jnp.bfloat16, 'mosaic'), ('TPU v5 lite', jnp.float32, 'mosaic')],
)
def test_logsparse_in_float32_needs_more_memory_than_a_tpu_v4_has(absl_log, kind, dtype, chosen):
    with on('tpu', kind=kind):
        q = jax.ShapeDtypeStruct((1, 1041, 4, 64), dtype)
        jax.eval_shape(lambda q: combiner.attend(q, q, q, 'combiner_logsparse', causal=True, chunk=128), q)
    assert f'CombinerLogsparse: {chosen}, on tpu' in absl_log.text


@pytest.mark.parametrize(('precision', 'chosen'), [(None, 'splash'), ('bfloat16', 'splash'), ('highest', 'blockwise')])
def test_splash_multiplies_bfloat16_in_one_precision(absl_log, precision, chosen):
    with jax.default_matmul_precision(precision), on('tpu', kind='TPU v4'):
        q = jax.ShapeDtypeStruct((1, 128, 2, 32), jnp.bfloat16)
        jax.eval_shape(lambda q: combiner.attend(q, q, q, 'full', causal=True), q)
    assert f'Full: {chosen}, on tpu' in absl_log.text


WAYS = {
    'mosaic': choice.Implementation(lambda *qkv: qkv[0], lambda q, size=16: '' if size % 8 == 0 else f'is no {size}'),
    'xla': choice.Implementation(lambda *qkv: qkv[0]),
}
Q = jnp.zeros((1, 4, 1, 8))


@pytest.mark.parametrize('name', CHOOSING)
def test_the_last_implementation_runs_anywhere_and_all_are_known(name):
    *_, last = implementations = registry.resolve(name).implementations
    assert choice.PLATFORMS[last] is None
    assert set(implementations) <= set(choice.PLATFORMS)
    assert registry.hyper_parameters(name)['implementation'] is None


@pytest.mark.parametrize(
    ('platform', 'devices', 'axes', 'size', 'name', 'why'),
    [
        ('tpu', 1, ('x',), 16, 'mosaic', 'the best there is'),
        ('tpu', 8, ('data',), 16, 'mosaic', 'the best there is'),
        ('tpu', 1, ('x',), 3, 'xla', 'mosaic is no 3'),
        ('tpu', 8, ('x',), 16, 'xla', 'mosaic needs a mesh with the axes of combiner.sharding.make_mesh, not x'),
        ('cpu', 1, ('x',), 16, 'xla', 'mosaic needs a TPU, this is cpu'),
        ('gpu', 1, ('x',), 16, 'xla', 'mosaic needs a TPU, this is gpu'),
    ],
)
def test_the_best_that_can_be_used_is_chosen_and_logged_once(absl_log, platform, devices, axes, size, name, why):
    with on(platform, axes, devices):
        for _ in range(2):
            assert chosen(None, Q, WAYS, size=size) == name
    records = {record.getMessage() for record in absl_log.records}
    assert records == {f'Any: {name}, on {platform} ({why})'}


@pytest.mark.parametrize('name', CHOOSING)
def test_an_unknown_implementation_names_the_choices(name):
    choices = ', '.join(registry.resolve(name).implementations)
    with pytest.raises(ValueError, match=f"unknown implementation 'best'; choose {choices}, or None"):
        combiner.attend(*draw(1, 4, 1, 8), name, causal=True, implementation='best')


def test_a_named_kernel_runs_in_the_interpreter_on_a_cpu_and_says_so(absl_log):
    assert chosen('mosaic', Q, WAYS) == 'mosaic'
    assert "Any: mosaic, on cpu (implementation='mosaic', in the interpreter of Pallas, which is slow)" in absl_log.text


def test_an_implementation_may_have_a_name_of_its_own(absl_log):
    mine = choice.Implementation(lambda *qkv: qkv[0], lambda q, size: '' if size % 8 == 0 else f'is no {size}')
    ways = {'mine': mine, 'xla': WAYS['xla']}
    for platform in ('cpu', 'gpu', 'tpu'):
        with on(platform):
            assert [chosen(None, Q, ways, size=size) for size in (16, 3)] == ['mine', 'xla']
    assert 'Any: xla, on cpu (mine is no 3)' in absl_log.text
    with pytest.raises(ValueError, match="implementation='mine' is no 3"):
        chosen('mine', Q, ways, size=3)


def test_a_named_implementation_that_cannot_be_used_is_refused():
    with pytest.raises(ValueError, match="Any: implementation='mosaic' is no 3; choose another, or None"):
        chosen('mosaic', Q, WAYS, size=3)
    with on('gpu'), pytest.raises(ValueError, match="implementation='mosaic' needs a TPU, this is gpu"):
        chosen('mosaic', Q, WAYS)


def test_kernels_need_a_mesh_if_there_are_many_devices(monkeypatch):
    tpus = chunking.Target('tpu', 8)
    monkeypatch.setattr(choice, 'target', lambda: tpus)
    monkeypatch.setattr('combiner.kernels.shards.target', lambda: tpus)
    assert chosen(None, Q, WAYS) == 'xla'
    with pytest.raises(ValueError, match='needs a mesh, as 8 devices may share its arrays'):
        chosen('mosaic', Q, WAYS)
