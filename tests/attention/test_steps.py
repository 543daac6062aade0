import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw
from jax.sharding import NamedSharding, PartitionSpec

import combiner
from combiner import sharding
from combiner.attention import steps

LENGTH = 32
SEGMENTS = np.stack([np.repeat([3, 1, 7, 2], [4, 9, 12, 7]), np.repeat([1, 2, 3], [11, 1, 20])])


def test_a_step_gets_its_share_of_every_sequence():
    x, y = jnp.arange(2 * 12), jnp.arange(2 * 6)
    seen = []

    def body(x, y, nothing):
        assert nothing is None
        seen.append((x.shape, y.shape))
        return x + 1, {'y': -y}

    for count in (1, 3):
        more, less = steps.visit(body, count, 2, x, y, None)
        np.testing.assert_array_equal(more, x + 1)
        np.testing.assert_array_equal(less['y'], -y)
    assert seen[0] == ((24,), (12,))
    assert seen[-1] == ((8,), (4,))


def test_steps_are_as_many_as_fit_and_divide_the_blocks(monkeypatch):
    assert steps.step_count(steps.STEP_LOGITS - 1, 64) == 1
    assert steps.step_count(16 * steps.STEP_LOGITS, 64) == 16
    assert steps.step_count(16 * steps.STEP_LOGITS, 12) == 12
    assert steps.step_count(16 * steps.STEP_LOGITS, 63) == 9
    assert steps.step_count(5 * steps.STEP_LOGITS, 7) == 1
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert steps.step_count(16 * steps.STEP_LOGITS, 64) == 1


def with_gradients(**options):
    (cotangent,) = draw(2, LENGTH, 2, 8, count=1, seed=7)

    @jax.jit
    def run(*qkv):
        out, pull_back = jax.vjp(lambda *qkv: combiner.attend(*qkv, 'combiner_fixed', block=4, **options), *qkv)
        return out, *pull_back(cotangent)

    return run(*draw(2, LENGTH, 2, 8))


@causal_or_not
@pytest.mark.parametrize('segments', [None, SEGMENTS], ids=['whole', 'packed'])
@pytest.mark.parametrize('padded', [False, True], ids=['full', 'padded'])
def test_steps_change_nothing(causal, segments, padded, monkeypatch):
    valid = np.random.default_rng(0).random((2, LENGTH)) > 0.3 if padded else None
    options = {'causal': causal, 'segments': segments, 'valid': valid}
    at_once = with_gradients(**options)
    monkeypatch.setattr(steps, 'STEP_LOGITS', 1)
    assert steps.step_count(LENGTH, LENGTH // 4) == LENGTH // 4
    for one, other in zip(with_gradients(**options), at_once, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_steps_leave_the_future_unseen(monkeypatch):
    monkeypatch.setattr(steps, 'STEP_LOGITS', 1)
    attend = jax.jit(lambda *qkv: combiner.attend(*qkv, 'combiner_fixed', block=4, causal=True))
    before, after = draw(2, LENGTH, 2, 8), draw(2, LENGTH, 2, 8, seed=1)
    expected = attend(*before)
    for now in range(LENGTH - 1):
        past = np.arange(LENGTH)[:, None, None] <= now
        actual = attend(*(jnp.where(past, old, 100 * new) for old, new in zip(before, after, strict=True)))
        np.testing.assert_array_equal(actual[:, : now + 1], expected[:, : now + 1], f'position {now}')


@pytest.mark.parametrize('logits', [1, steps.STEP_LOGITS], ids=['in-steps', 'at-once'])
def test_batch_and_heads_are_sharded_without_gathering(logits, monkeypatch):
    monkeypatch.setattr(steps, 'STEP_LOGITS', logits)
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    placement = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'model'))
    qkv = [jax.device_put(x, placement) for x in draw(4, LENGTH, 2, 8)]

    def loss(*qkv):
        out = combiner.attend(*qkv, 'combiner_fixed', block=4, causal=True)
        return jax.lax.with_sharding_constraint(out, placement).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=placement).lower(*qkv).compile().as_text()
    assert 'all-gather' not in program
    assert 'all-to-all' not in program
