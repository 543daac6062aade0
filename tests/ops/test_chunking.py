import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

import combiner
from combiner import sharding
from combiner.ops import chunking

LENGTH = 32
SEGMENTS = np.stack([np.repeat([3, 1, 7, 2], [4, 9, 12, 7]), np.repeat([1, 2, 3], [11, 1, 20])])
PADDED = np.random.default_rng(0).random((2, LENGTH)) > 0.3
GRIDS = {
    'combiner_axial_rowmajor': {'columns': 6},
    'combiner_axial_vertical': {'columns': 6},
    'combiner_axial_horizontal': {'columns': 6},
    'combiner_mixture': {'columns': 6},
}
MECHANISMS = {
    'combiner_fixed': {'block': 4},
    'combiner_logsparse': {'chunk': 4},
    'combiner_tree': {'branch': 3},
    'local': {'block': 4, 'overlap': 3},
    'logsparse': {'chunk': 4},
    'longformer': {'window': 6, 'chunk': 4},
    'strided': {'stride': 4},
    **GRIDS,
}


@pytest.fixture
def in_steps(monkeypatch):
    """A function after whose call every mechanism takes as many steps as it can, as on a machine with one device."""

    def begin():
        monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 1)
        monkeypatch.setattr(chunking, 'target', lambda: chunking.Target('cpu', 1))

    return begin


def test_steps_are_as_many_as_fit_whatever_divides_the_blocks(monkeypatch):
    assert chunking.plan_chunks(chunking.CHUNK_LOGITS - 1, 64) == (64, 64)
    assert chunking.plan_chunks(16 * chunking.CHUNK_LOGITS, 64).count == 16
    assert chunking.plan_chunks(16 * chunking.CHUNK_LOGITS, 64, at_once=True).count == 1
    assert chunking.plan_chunks(16 * chunking.CHUNK_LOGITS, 12).count == 12
    assert chunking.plan_chunks(16 * chunking.CHUNK_LOGITS, 63).count == 9
    assert chunking.plan_chunks(16 * chunking.CHUNK_LOGITS, 76).count == 19  # of 4 each
    for blocks in range(2, 300):
        for wanted in (1, 2, 5, 16, 33):
            found = chunking.plan_chunks(wanted * chunking.CHUNK_LOGITS, blocks)
            assert min(wanted, blocks) / 2 < found.count < 2 * wanted
            assert (found.count - 1) * found.size < blocks <= found.count * found.size
            assert found.count * found.size - blocks <= blocks / 2
    monkeypatch.setattr(chunking, 'target', lambda: chunking.Target('gpu', 1))
    assert chunking.plan_chunks(16 * chunking.CHUNK_LOGITS, 64).count == 1


@pytest.mark.parametrize(('platform', 'devices'), [('cpu', 1), ('gpu', 8), ('tpu', 4)])
def test_a_program_is_traced_for_the_devices_of_the_mesh(platform, devices):
    """Also while it is traced, and though the devices are not there."""
    assert chunking.target()[:2] == ('cpu', 8)  # as many as the tests fake
    device = AbstractDevice(device_kind='any', num_cores=None, platform=platform)
    with use_abstract_mesh(AbstractMesh((devices,), ('data',), abstract_device=device)):
        found = []
        jax.eval_shape(lambda x: found.append(chunking.target()) or x, jnp.zeros(1))
        assert found == [(platform, devices, 'any')]


@pytest.mark.parametrize(('steps', 'expected'), [(1, (2, 5, 4, 8)), (2, (2, 5, 2, 8)), (8, (1, 5, 1, 8))])
def test_a_step_gets_some_heads_of_some_sequences(steps, expected, monkeypatch, in_steps):
    q, k, v = draw(2, 5, 4, 8)
    labels, seen = jnp.arange(10).reshape(2, 5), []

    def attend(q, k, v, labels, nothing):
        assert nothing is None
        assert labels.shape == q.shape[:2]
        seen.append(q.shape)
        return (q + 2 * k) * v * labels[..., None, None]

    def run(*qkv):
        return jax.vjp(lambda *qkv: chunking.map_heads(attend, *qkv, labels, None, keys=3), *qkv)

    at_once, pull_back = run(q, k, v)
    assert set(seen) == {(2, 5, 4, 8)}  # of eight devices any may hold some heads
    in_steps()
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 2 * 5 * 4 * 3 // steps)
    attended, pull_back_in_steps = run(q, k, v)
    np.testing.assert_array_equal(attended, at_once)
    for one, other in zip(pull_back_in_steps(q), pull_back(q), strict=True):
        np.testing.assert_array_equal(one, other)
    assert set(seen[1:]) == {expected}
    seen.clear()
    monkeypatch.setattr(chunking, 'target', lambda: chunking.Target('gpu', 1))
    run(q, k, v)
    assert set(seen) == {(2, 5, 4, 8)}


@pytest.mark.parametrize('heads', [1, 2])
def test_with_several_devices_one_step_computes_everything(heads, monkeypatch):
    """Of one head too: the sequences may be on several devices."""
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 1)
    seen = []

    def attend(q, k, v):
        seen.append(q.shape)
        return q * k * v

    chunking.map_heads(attend, *draw(4, 5, heads, 8), keys=3)
    assert set(seen) == {(4, 5, heads, 8)}


def test_steps_may_be_taken_anew_in_a_scan(in_steps):
    def attend(q, k, v, valid):
        return jnp.tanh(q * k) + v * valid[..., None, None]

    def layer(x, size):
        valid = jnp.broadcast_to(jnp.arange(5) < size, (2, 5))
        return chunking.map_heads(attend, x, x, x, valid, keys=8), None

    def gradient(x):
        return jax.grad(lambda x: jax.lax.scan(jax.checkpoint(layer), x, jnp.array([5, 3]))[0].sum())(x)

    (x,) = draw(2, 5, 4, 8, count=1)
    at_once = gradient(x)
    in_steps()
    assert_close(gradient(x), at_once, TOLERANCE[jnp.float32])


def with_gradients(name, **options):
    (cotangent,) = draw(2, LENGTH, 2, 8, count=1, seed=7)

    @jax.jit
    def run(*qkv):
        out, pull_back = jax.vjp(lambda *qkv: combiner.attend(*qkv, name, **MECHANISMS[name], **options), *qkv)
        return out, *pull_back(cotangent)

    return run(*draw(2, LENGTH, 2, 8))


CASES = [
    ('combiner_fixed', None, None),
    ('combiner_fixed', SEGMENTS, PADDED),
    *(('combiner_axial_rowmajor', segments, PADDED) for segments in (None, SEGMENTS)),
    *((name, SEGMENTS, PADDED) for name in ('combiner_logsparse', 'combiner_tree', 'local', 'logsparse', 'longformer')),
    ('strided', None, PADDED),
    ('combiner_mixture', None, PADDED),  # of vertical and horizontal
]


@causal_or_not
@pytest.mark.parametrize(
    ('name', 'segments', 'valid'),
    [
        pytest.param(*case, id=f'{case[0]}{"" if case[1] is None else "-packed"}{"" if case[2] is None else "-padded"}')
        for case in CASES
    ],
)
def test_steps_change_nothing(name, causal, segments, valid, in_steps):
    options = {'causal': causal, 'valid': valid} | ({} if segments is None else {'segments': segments})
    at_once = with_gradients(name, **options)
    in_steps()
    assert chunking.plan_chunks(LENGTH, LENGTH // 4).count == LENGTH // 4
    for one, other in zip(with_gradients(name, **options), at_once, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize('name', MECHANISMS)
def test_steps_leave_the_future_unseen(name, in_steps):
    in_steps()
    attend = jax.jit(lambda *qkv: combiner.attend(*qkv, name, causal=True, **MECHANISMS[name]))
    before, after = draw(2, LENGTH, 2, 8), draw(2, LENGTH, 2, 8, seed=1)
    expected = attend(*before)
    for now in range(LENGTH - 1):
        past = np.arange(LENGTH)[:, None, None] <= now
        actual = attend(*(jnp.where(past, old, 100 * new) for old, new in zip(before, after, strict=True)))
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1], f'position {now}')


@pytest.mark.parametrize(
    ('name', 'logits'), [('combiner_fixed', chunking.CHUNK_LOGITS), *((name, 1) for name in MECHANISMS)]
)
def test_batch_and_heads_are_sharded_without_gathering(name, logits, monkeypatch):
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', logits)
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    placement = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'model'))
    qkv = [jax.device_put(x, placement) for x in draw(4, LENGTH, 2, 8)]

    def loss(*qkv):
        out = combiner.attend(*qkv, name, causal=True, **MECHANISMS[name])
        return jax.lax.with_sharding_constraint(out, placement).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=placement).lower(*qkv).compile().as_text()
    assert 'all-gather' not in program
    assert 'all-to-all' not in program
