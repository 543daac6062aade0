"""What every fused kernel must satisfy, in Pallas' interpreter; a new one is tested by being in `implementations`.

The mechanism's plain form, which other tests compare with the oracle, is the truth for lengths beyond the oracle's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    LONGEST,
    TOLERANCE,
    assert_close,
    causal_or_not,
    draw,
    mechanism_pattern,
    oracle,
    oracle_key,
    random_variables,
)
from jax.sharding import NamedSharding, PartitionSpec

import combiner
from combiner import sharding
from combiner.core import registry
from combiner.core.module import make_attention
from combiner.kernels import choice
from combiner.ops import pooling
from combiner.ops.pooling import Pools

KERNELS = [
    (name, implementation)
    for name in combiner.names()
    for implementation in registry.resolve(name).implementations
    if implementation in choice.INTERPRETED
]
SIZES = {'block': 16, 'branch': 16, 'chunk': 16, 'columns': 16}
QUICK = {'xla_backend_optimization_level': 0}  # to compile takes longer than to run
LENGTH = 1041  # of several tiles; neither blocks nor tiles divide it
POOLING = [kernel for kernel in KERNELS if 'pool' in registry.hyper_parameters(kernel[0])]


def sizes_of(name: str) -> dict[str, int]:
    return {size: value for size, value in SIZES.items() if size in registry.hyper_parameters(name)}


def takes_parameters(name, implementation) -> bool:
    pools = Pools(*[pooling.attention(jnp.zeros((1, 32)))] * 2)
    options = {'causal': True, 'pools': pools, 'drop': None, **sizes_of(name)}
    return not registry.resolve(name).implementations[implementation].refuse(jnp.zeros((1, 40, 1, 32)), **options)


def every_kernel_of(kernels):
    return pytest.mark.parametrize(('name', 'implementation'), kernels, ids=['-'.join(kernel) for kernel in kernels])


every_kernel = every_kernel_of(KERNELS)


def in_turn(argument: str, values: dict):
    """Every kernel, with one of the named values; with the others it is among the slow tests."""
    found = []
    for turn, kernel in enumerate(KERNELS):
        for index, (name, value) in enumerate(values.items()):
            marks = [] if index == turn % len(values) else [pytest.mark.slow]
            found.append(pytest.param(*kernel, value, id='-'.join((*kernel, name)), marks=marks))
    return pytest.mark.parametrize(('name', 'implementation', argument), found)


every_kernel_one_way = in_turn('causal', {'bidirectional': False, 'causal': True})


def masks(name: str, length: int, kind: str) -> dict[str, np.ndarray]:
    """Scattered padding with a block of nothing else; documents, if supported, from 1 position to several blocks."""
    random = np.random.default_rng(length)
    valid = random.random((2, length)) < 0.6
    valid[1, length // 2 : length // 2 + 40] = False
    segments = np.cumsum(random.random((2, length)) < np.array([[0.02], [0.2]]), axis=1).astype(np.int32)
    kind = kind if kind != 'packed' or registry.resolve(name).supports_segments else 'valid'
    return {'': {}, 'valid': {'valid': valid}, 'packed': {'segments': segments, 'valid': valid}}[kind]


@functools.cache
def program(name, implementation, causal, **hyper):
    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v, cotangent, **given):
        def attend(q, k, v):
            options = {**sizes_of(name), **hyper, 'implementation': implementation}
            return combiner.attend(q, k, v, name, causal=causal, **given, **options)

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(cotangent)

    return run


def inputs(length: int, width: int = 32, heads: int = 1, dtype=jnp.float32, batch: int = 2) -> list[np.ndarray]:
    """Few and narrow heads by default: the interpreter copies the arrays in every step of a kernel's grid."""
    return [np.asarray(x) for x in draw(batch, length, heads, width, count=4, dtype=dtype)]


def assert_all_close(actual, expected, tolerance):
    for what, one, other in zip(('out', 'dq', 'dk', 'dv'), actual, expected, strict=True):
        assert np.isfinite(np.asarray(one, np.float32)).all(), what
        assert_close(one, other, tolerance)


@causal_or_not
@every_kernel
def test_it_equals_the_oracle_with_gradients(name, implementation, causal):
    """With padding, and positions that share a maximum, and its gradient."""
    q, k, *others = inputs(LONGEST, 128, 2)
    arrays, valid = [*(np.round(2 * x) / 2 for x in (q, k)), *others], masks(name, LONGEST, 'valid')['valid']
    key = oracle_key(registry.hyper_parameters(name))
    expected = oracle(mechanism_pattern(name, LONGEST, causal=causal, hyper=sizes_of(name)), *arrays, valid, **key)
    assert_all_close(program(name, implementation, causal)(*arrays, valid=valid), expected, TOLERANCE[jnp.float32])


@in_turn('length', {'one': 1, 'three': 3})
def test_a_sequence_shorter_than_a_register(name, implementation, length):
    arrays = inputs(length)
    actual, expected = (program(name, one, causal=False)(*arrays) for one in (implementation, 'xla'))
    assert_all_close(actual, expected, TOLERANCE[jnp.float32])


@causal_or_not
@every_kernel
def test_it_equals_the_plain_form_with_gradients(name, implementation, causal):
    arrays, given = inputs(LENGTH), masks(name, LENGTH, 'packed')
    actual, expected = (program(name, one, causal)(*arrays, **given) for one in (implementation, 'xla'))
    assert_all_close(actual, expected, TOLERANCE[jnp.float32])


@every_kernel_one_way
def test_several_heads_equal_the_plain_form(name, implementation, causal):
    """Of 3 heads of width 64, two fill a register and one half of another."""
    arrays = inputs(513, 64, 3, batch=1)
    actual, expected = (program(name, one, causal)(*arrays) for one in (implementation, 'xla'))
    assert_all_close(actual, expected, TOLERANCE[jnp.float32])


def compare_grouped_heads(name, implementation, causal, length, **hyper):
    """Of two key heads in one register, each serves three query heads."""
    (q, _, _, cotangent), (_, k, v, _) = inputs(length, 64, 6, batch=1), inputs(length, 64, 2, batch=1)
    given = {key: array[1:] for key, array in masks(name, length, 'packed').items()}
    actual, expected = (
        program(name, one, causal, **hyper)(q, k, v, cotangent, **given) for one in (implementation, 'xla')
    )
    assert_all_close(actual, expected, TOLERANCE[jnp.float32])


@every_kernel_one_way
def test_grouped_heads_equal_repeated_ones(name, implementation, causal):
    """In two tiles, for a kernel that reads each key head for several query heads; for others they are repeated."""
    groups = registry.resolve(name).implementations[implementation].groups
    compare_grouped_heads(name, implementation, causal, 520 if groups else 40)


@pytest.mark.parametrize('implementation', choice.INTERPRETED)
def test_grouped_heads_with_given_summaries_equal_repeated_ones(implementation):
    """Means of summaries of summaries, which XLA computes."""
    compare_grouped_heads('combiner_tree', implementation, False, 520, pool='mean')


@pytest.mark.slow
@causal_or_not
@pytest.mark.parametrize('kind', ['', 'valid', 'packed'])
@pytest.mark.parametrize('length', [1, 2, 15, 16, 17, 127, 129, 256, 257, 300, 511, 512, 513, 544, 1024, 1025])
@every_kernel
def test_every_length_equals_the_plain_form(name, implementation, length, kind, causal):
    arrays, given = inputs(length, 128, 2), masks(name, length, kind)
    actual, expected = (program(name, one, causal)(*arrays, **given) for one in (implementation, 'xla'))
    assert_all_close(actual, expected, TOLERANCE[jnp.float32])


def without_ties(x: np.ndarray) -> np.ndarray:
    """Replaces the numbers of a bfloat16 sequence, in their order, by distinct ones between 0.15 and 3 in magnitude.

    Equal maxima of levels of spans share their gradient level by level in the plain form, at once in some kernels.
    """
    magnitudes = (0x4040 - np.arange(-(-x.shape[1] // 2))).astype(np.uint16).view(jnp.bfloat16)
    values = np.sort(np.concatenate([magnitudes, -magnitudes]))
    return values[x.argsort(axis=1, kind='stable').argsort(axis=1)]


@every_kernel_one_way
def test_bfloat16(name, implementation, causal):
    arrays, given = inputs(LENGTH, dtype=jnp.bfloat16), masks(name, LENGTH, 'packed')
    arrays = [*map(without_ties, arrays[:2]), *arrays[2:]]
    actual = program(name, implementation, causal)(*arrays, **given)
    assert actual[0].dtype == jnp.bfloat16
    expected = program(name, 'xla', causal)(*(x.astype(np.float32) for x in arrays), **given)
    assert_all_close(actual, expected, TOLERANCE[jnp.bfloat16])


@pytest.mark.parametrize(('width', 'heads', 'dtype'), [(20, 3, jnp.float32), (256, 1, jnp.bfloat16)])
@every_kernel
def test_any_head_width(name, implementation, width, heads, dtype):
    """Some kernels take the widest heads in bfloat16 only."""
    arrays = inputs(40, width, heads, dtype, batch=1)
    arrays = [*map(without_ties, arrays[:2]), *arrays[2:]] if dtype == jnp.bfloat16 else arrays
    actual = program(name, implementation, causal=True)(*arrays)
    expected = program(name, 'xla', causal=True)(*(x.astype(np.float32) for x in arrays))
    assert_all_close(actual, expected, TOLERANCE[dtype])


@every_kernel_of(POOLING)
def test_pooling_by_the_mean_with_padding(name, implementation):
    arrays, given = inputs(72), masks(name, 72, 'valid')
    actual, expected = (
        program(name, one, causal=False, pool='mean')(*arrays, **given) for one in (implementation, 'xla')
    )
    assert_all_close(actual, expected, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(('pool', 'causal'), [('deepsets', True), ('attention', False)])
@every_kernel_of([kernel for kernel in POOLING if takes_parameters(*kernel)])
def test_gradients_reach_the_parameters_of_poolings(name, implementation, pool, causal):
    """With two query heads of one key head, in two tiles."""
    (x,), positions = draw(1, 520, 64, count=1), jnp.arange(520)[None]
    given = {key: jnp.asarray(array[1:]) for key, array in masks(name, 520, 'packed').items()}

    def module(implementation):
        hyper = {**sizes_of(name), 'pool': pool, 'implementation': implementation}
        return make_attention(name, hyper, causal=causal, width=64, heads=2, kv_heads=1)

    def run(implementation):
        def loss(variables, x):
            return (module(implementation).apply(variables, x, positions, **given) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1)), compiler_options=QUICK)(variables, x)

    variables = random_variables(module('xla'), x, positions)
    for one, other in zip(*map(jax.tree.leaves, (run(implementation), run('xla'))), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@every_kernel_one_way
def test_it_is_deterministic_and_padding_never_spreads(name, implementation, causal):
    """Padding may hold anything; an all-padded sequence gives zeros and zero gradients."""
    *qkv, cotangent = inputs(LENGTH)
    given = masks(name, LENGTH, 'packed')
    given['valid'][0] = False
    run = program(name, implementation, causal)
    expected = run(*qkv, cotangent, **given)
    spoilt = [np.where(given['valid'][..., None, None], x, np.float32('nan')) for x in qkv]
    for again in (run(*qkv, cotangent, **given), run(*spoilt, cotangent, **given)):
        for one, other in zip(again, expected, strict=True):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(one[0], 0)


@every_kernel
def test_the_future_changes_nothing(name, implementation):
    *qkv, cotangent = inputs(LENGTH)
    run, given = program(name, implementation, causal=True), masks(name, LENGTH, 'packed')
    expected, *_ = run(*qkv, cotangent, **given)
    for now in (15, 511, 512, 1000):
        past = np.arange(LENGTH)[:, None, None] <= now
        actual, *_ = run(*(np.where(past, x, -100 * x) for x in qkv), cotangent, **given)
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1])


@every_kernel
def test_it_is_sharded_by_sequences_and_heads_without_gathering(name, implementation):
    causal, arrays = True, [np.asarray(x) for x in draw(4, 40, 2, 128, count=4)]
    valid = np.random.default_rng(0).random((4, 40)) < 0.6
    expected = program(name, 'xla', causal)(*arrays, valid=valid)
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    placement = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'model'))
    with sharding.use(mesh):
        arrays = [jax.device_put(x, placement) for x in arrays]
        valid = jax.device_put(valid, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
        compiled = program(name, implementation, causal).lower(*arrays, valid=valid).compile()
        actual = compiled(*arrays, valid=valid)
    text = compiled.as_text()
    assert not [kind for kind in ('all-gather', 'all-to-all', 'collective-permute', 'all-reduce') if kind in text]
    for one, other in zip(actual, expected, strict=True):
        assert one.sharding.is_equivalent_to(placement, one.ndim)
        assert_close(one, other, TOLERANCE[jnp.float32])


@every_kernel
def test_float32_is_taken_where_64_bits_are_enabled(name, implementation):
    with jax.enable_x64(True):
        q, k, v = draw(1, 80, 1, 32)
        options = {'causal': True, 'implementation': implementation, **sizes_of(name)}
        lowered = jax.jit(lambda *qkv: combiner.attend(*qkv, name, **options)).lower(q, k, v)
    assert (lowered.out_info.shape, lowered.out_info.dtype) == (q.shape, q.dtype)
