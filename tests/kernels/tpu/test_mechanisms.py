import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import combiner
from combiner import sharding
from combiner.attention.combiner_fixed import CombinerFixed, attend_combiner_fixed
from combiner.core import registry
from combiner.core.mechanism import Context
from combiner.kernels.tpu import tiles
from combiner.kernels.tpu.mechanisms import FIXED
from combiner.kernels.tpu.plan import Plan
from combiner.ops.softmax import Dropout

BLOCK = 16
USUAL = {'combiner_fixed': 128, 'combiner_tree': 32}  # sizes of blocks at some thousand positions
NAMES = [name for name in combiner.names() if 'mosaic' in registry.resolve(name).implementations]
every_mechanism = pytest.mark.parametrize('name', NAMES)


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
    plan = Plan('any', 1, length, 1, 64, block, True, 'max', 1, False, 'float32', '', True)
    assert (plan.tile, plan.tiles) == (tile, count)
    assert plan.tiles == 1 or plan.tile % 128 == 0


def gradients(name, causal, block):
    """A function whose gradients take both kernels, with padding, documents and dropout if they are given."""
    size = 'branch' if name == 'combiner_tree' else 'block'
    mechanism = registry.make_mechanism(name, {size: block, 'implementation': 'mosaic'}, causal=causal)

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


def kernels_in(program) -> int:
    return program.as_text().count('@tpu_custom_call')


TPU = AbstractDevice(device_kind='TPU v5 lite', num_cores=1, platform='tpu')


@causal_or_not
@every_mechanism
@pytest.mark.parametrize('width', [32, 64, 128, 256])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=['float32', 'bfloat16'])
def test_it_lowers_for_a_tpu(dtype, width, name, causal):
    with use_abstract_mesh(AbstractMesh((1,), ('data',), abstract_device=TPU)):
        traced = jax.jit(gradients(name, causal, 16)).trace(*shapes(1041, 4, width, dtype), *masks(1041))
        assert kernels_in(traced.lower(lowering_platforms=('tpu',))) == 2


@causal_or_not
@every_mechanism
def test_it_lowers_for_many_tpus_at_the_size_of_training(name, causal):
    """The blocks of a tile are unrolled there; XLA cannot split a kernel, which would be an error."""
    mesh = AbstractMesh((2, 2, 2), ('data', 'fsdp', 'model'), abstract_device=TPU)
    with use_abstract_mesh(mesh):
        traced = jax.jit(gradients(name, causal, USUAL[name])).trace(*shapes(4096, 8, 64, jnp.bfloat16))
        assert kernels_in(traced.lower(lowering_platforms=('tpu',))) == 2


@pytest.fixture
def mesh_of_tpus(request, monkeypatch):
    """A mesh of TPUs that are not there, for which XLA compiles."""
    pytest.importorskip('libtpu', reason='bash scripts/setup.sh tpu-aot')
    monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
    monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    devices = topologies.get_topology_desc(platform='tpu', topology_name=request.param).devices
    return sharding.make_mesh(data=1, fsdp=1, model=1, devices=devices[:1])


@pytest.mark.slow
@causal_or_not
@every_mechanism
@pytest.mark.parametrize(('length', 'width', 'packed'), [(16384, 128, False), (4096, 64, False), (4096, 128, True)])
@pytest.mark.parametrize('mesh_of_tpus', ['v5e:2x2', 'v5p:2x2x1'], indirect=True)
def test_it_compiles_for_a_tpu(mesh_of_tpus, length, width, packed, name, causal):
    with jax.set_mesh(mesh_of_tpus):
        arrays = (*shapes(length, 8, width, jnp.bfloat16), *(masks(length) if packed else ()))
        compiled = jax.jit(gradients(name, causal, USUAL[name])).lower(*arrays).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    # Nothing is as large as the logits, of float32 to the own block and to all summaries.
    arrays, logits = compiled.memory_analysis().temp_size_in_bytes, 8 * length * (128 + length // 128) * 4
    assert arrays < logits
