import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, draw, oracle
from jax.sharding import NamedSharding, PartitionSpec

import combiner
from combiner import sharding
from combiner.core import registry

LENGTH = 19
VALID = np.random.default_rng(0).random((2, LENGTH)) > 0.3
DOCUMENTS = np.stack([np.repeat([3, 1, 2], sizes) for sizes in ([1, 11, 7], [5, 6, 8])])


def direct(q, k, v, window, first):
    """The definition, position by position."""
    attended = []
    for i in range(len(q)):
        reached = range(len(q)) if i < first else {*range(first), *range(i - window // 2, i + window // 2 + 1)}
        at = np.array(sorted(j for j in reached if 0 <= j < len(q)))
        attended.append(jax.nn.softmax(k[at] @ q[i] / np.sqrt(q.shape[1])) @ v[at])
    return jnp.stack(attended)


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(first, q, k, v, cotangent, valid=None, segments=None):
    options = {'causal': False, 'window': 6, 'globals': first, 'chunk': 4, 'valid': valid, 'segments': segments}
    out, pull_back = jax.vjp(lambda *qkv: combiner.attend(*qkv, 'longformer', **options), q, k, v)
    return out, *pull_back(cotangent)


@pytest.mark.parametrize('first', [0, 2, 5, 30])
def test_it_is_its_definition(first):
    *qkv, cotangent = draw(1, LENGTH, 1, 4, count=4)

    @jax.jit
    def by_definition(*qkv):
        out, pull_back = jax.vjp(lambda *qkv: direct(*(x[0, :, 0] for x in qkv), 6, first)[None, :, None], *qkv)
        return out, *pull_back(cotangent)

    for one, other in zip(with_gradients(first, *qkv, cotangent), by_definition(*qkv), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_global_positions_may_be_padding_or_of_another_document():
    *qkv, cotangent = draw(2, LENGTH, 2, 4, count=4)
    pattern = combiner.pattern('longformer', LENGTH, causal=False, window=6, globals=5)
    for one, other in zip(
        with_gradients(5, *qkv, cotangent, VALID), oracle(pattern, *qkv, cotangent, VALID), strict=True
    ):
        assert_close(one, other, TOLERANCE[jnp.float32])
    alone = [with_gradients(5, *qkv, cotangent, VALID & (number == DOCUMENTS)) for number in (1, 2, 3)]
    for actual, *parts in zip(with_gradients(5, *qkv, cotangent, VALID, DOCUMENTS), *alone, strict=True):
        assert_close(actual, sum(np.asarray(part) for part in parts), TOLERANCE[jnp.float32])


def test_pattern_by_hand():
    pattern = combiner.pattern('longformer', 8, causal=False, window=2, globals=1)
    assert [np.flatnonzero(row).tolist() for row in pattern.direct[[0, 1, 4, 7]]] == [
        list(range(8)),
        [0, 1, 2],
        [0, 3, 4, 5],
        [0, 6, 7],
    ]
    causal = combiner.pattern('longformer', 8, causal=True, window=2)
    assert [np.flatnonzero(row).tolist() for row in causal.direct[[0, 1, 7]]] == [[0], [0, 1], [5, 6, 7]]


@pytest.mark.parametrize('first', [0, 1, 3, 50])
def test_cost_with_global_positions(first):
    for length in (1, 2, 3, 17, 40):
        mechanism = registry.make_mechanism('longformer', {'window': 6, 'globals': first}, causal=False)
        assert mechanism.cost(length) == mechanism.pattern(length).cost()


@pytest.mark.parametrize(
    ('sizes', 'causal', 'message'),
    [
        ({'window': -1}, True, 'window must be at least 0, got -1'),
        ({'globals': -1}, False, 'globals must be at least 0, got -1'),
        ({'globals': 1}, True, 'leave globals unset, or use causal=False'),
        ({'chunk': 3}, True, 'chunk must be a power of two, got 3'),
    ],
)
def test_what_there_is_not(sizes, causal, message):
    with pytest.raises(ValueError, match=message):
        combiner.attend(*draw(1, 4, 1, 8), 'longformer', causal=causal, **sizes)


def test_global_positions_are_sharded_without_gathering():
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    placement = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'model'))
    arrays = [jax.device_put(x, placement) for x in draw(4, LENGTH, 2, 8, count=4)]
    program = with_gradients.lower(2, *arrays).compile().as_text()
    assert 'all-gather' not in program
    assert 'all-to-all' not in program


def test_long_inputs_in_little_memory():
    x = jax.ShapeDtypeStruct((1, 16384, 8, 64), jnp.float32)
    gradient = jax.grad(lambda *qkv: combiner.attend(*qkv, 'longformer', causal=False).sum(), (0, 1, 2))
    assert jax.jit(gradient).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes < 2e9
