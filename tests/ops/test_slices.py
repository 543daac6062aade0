"""Loops over slices in place: results and all derivatives are those of the whole arrays, for slices of every size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import combiner
from combiner.ops import chunking
from combiner.ops.blocks import Blocks
from combiner.ops.slices import Chunks, Cut, map_slices

LENGTH, BLOCK, WIDTH = 11, 2, 3
BLOCKS = -(-LENGTH // BLOCK)
x = jnp.asarray(np.random.default_rng(0).standard_normal((2, LENGTH, WIDTH)), jnp.float32)
per_block = jnp.linspace(0.5, 2, BLOCKS)
shared = jnp.linspace(-1, 1, WIDTH * WIDTH).reshape(WIDTH, WIDTH)


def computed(size, x, per_block, shared):
    """A function of positions, of one number for each block and of a closed-over matrix; an integer result too."""

    def body(x, per_block):
        blocks = x.reshape(2, -1, BLOCK, WIDTH) * per_block[:, None, None]
        result = jnp.tanh(blocks @ shared).reshape(x.shape)
        return [result, (result > 0).astype(jnp.int32)]

    cuts = [(Cut(1, BLOCK),), (Cut(0),)]
    return map_slices(body, (Chunks(BLOCKS, size),), [x, per_block], cuts, (Cut(1, BLOCK, LENGTH),))


SIZES = pytest.mark.parametrize('size', range(1, BLOCKS))


@SIZES
def test_slices_change_no_result(size):
    for one, other in zip(computed(size, x, per_block, shared), computed(BLOCKS, x, per_block, shared), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize('size', [1, 4])
def test_slices_change_no_derivative(size):
    """Reverse and forward mode, once and twice, of sliced and of closed-over arrays, and in a batch."""

    def loss(size, *arguments):
        return (computed(size, *arguments)[0] ** 2).sum()

    def derivatives(size):
        of = functools.partial(loss, size)
        arguments, directions = (x, per_block, shared), (jnp.cos(x), jnp.sin(per_block), jnp.ones_like(shared))
        gradient = jax.grad(of, (0, 1, 2))
        return (
            gradient(*arguments),
            jax.jvp(of, arguments, directions),
            jax.jvp(gradient, arguments, directions),
            jax.grad(lambda *arguments: jax.jvp(of, arguments, directions)[1], (0, 1, 2))(*arguments),
            jax.vmap(lambda scale: gradient(scale * x, per_block, shared))(jnp.array([1.0, 2.0])),
        )

    jitted = jax.jit(derivatives, static_argnums=0)
    for one, other in zip(jax.tree.leaves(jitted(size)), jax.tree.leaves(jitted(BLOCKS)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_the_gradient_of_a_batch_costs_no_more_than_a_batch_of_gradients():
    def loss(x, per_block):
        return (computed(1, x, per_block, shared)[0] ** 2).sum()

    def of_batch(x, per_block):
        return jax.vmap(loss, (0, None))(x, per_block).sum()

    arguments = jnp.stack([x, x + 1, x - 1]), per_block
    whole = jax.jit(jax.grad(of_batch)).lower(*arguments).compile()
    each = jax.jit(jax.vmap(jax.grad(loss), (0, None))).lower(*arguments).compile()
    np.testing.assert_allclose(whole(*arguments), each(*arguments), rtol=1e-6)
    bytes_of = [program.cost_analysis()['bytes accessed'] for program in (whole, each)]
    assert bytes_of[0] < 1.1 * bytes_of[1]  # a step of a loop counts once: it adds no gradient of the whole input


def test_two_loops_slice_two_axes():
    def body(x, y):
        return [x * y[:, None]]

    y = x[:, 0]
    loops, cuts = (Chunks(2, 1), Chunks(WIDTH, 2)), [(Cut(0), Cut(2)), (Cut(0), Cut(1))]
    gradient = jax.grad(lambda x, y: (map_slices(body, loops, [x, y], cuts, (Cut(0), Cut(2)))[0] ** 3).sum(), (0, 1))
    expected = jax.grad(lambda x, y: ((x * y[:, None]) ** 3).sum(), (0, 1))(x, y)
    for one, other in zip(gradient(x, y), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_zeros_that_fill_up_the_last_slice_have_no_derivative():
    """Though the result there is not finite."""

    def gradient(size):
        def loss(x):
            return map_slices(lambda x: [1 / x], (Chunks(5, size),), [x], [(Cut(0),)], (Cut(0),))[0].sum()

        return jax.grad(loss)(1 + jnp.arange(5, dtype=jnp.float32))

    for size in (2, 3, 4):
        np.testing.assert_allclose(gradient(size), gradient(5), rtol=1e-6)


def test_a_chunk_gets_its_share_of_every_sequence(monkeypatch):
    monkeypatch.setattr(chunking, 'target', lambda: chunking.Target('cpu', 1))
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 2 * 6 * 2 * 2)
    q = jnp.arange(2.0 * 11 * 1 * 4).reshape(2, 11, 1, 4)
    blocks, seen = Blocks.of(q, 2), []

    def body(tokens, numbers):
        assert tokens.segment_ids is None
        seen.append(tokens.q.shape)
        return tokens.q + numbers[:, None, None]

    numbers = jnp.arange(12)
    tokens = blocks.tokens(q, q, q, causal=True)
    expected = q + jnp.repeat(numbers.reshape(2, 6), 2, axis=1)[:, :11, None, None]
    for logits, shape in ((2, (1, 12, 2, 4)), (4, (1, 6, 2, 4)), (8, (1, 4, 2, 4)), (24, (1, 2, 2, 4))):
        np.testing.assert_array_equal(blocks.attend(body, tokens, numbers, keys=logits), expected)
        assert seen.pop() == shape


@pytest.mark.parametrize('name', ['combiner_fixed', 'combiner_logsparse', 'combiner_tree', 'fixed', 'linear'])
def test_one_token_more_takes_no_more_memory(name, monkeypatch, one_device):
    """A prime number of blocks, and a partial last block, cost neither copies nor larger chunks."""
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 2**12)
    sizes = {'linear': {'chunk': 16}, 'combiner_logsparse': {'chunk': 16}, 'combiner_tree': {'branch': 16}}

    def memory(length):
        q = jax.ShapeDtypeStruct((2, length, 2, 32), jnp.float32)

        def gradient(q, k, v):
            attend = functools.partial(combiner.attend, name=name, causal=True, **sizes.get(name, {'block': 16}))
            return jax.grad(lambda *qkv: attend(*qkv).sum(), (0, 1, 2))(q, k, v)

        return jax.jit(gradient).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    whole = memory(16 * 66)
    assert memory(16 * 66 + 1) < 1.2 * whole
    assert memory(16 * 67) < 1.2 * whole
