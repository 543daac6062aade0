import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, causal_or_not, draw, oracle
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

import combiner
from combiner import sharding
from combiner.attention import full
from combiner.core import registry
from combiner.kernels import choice, libraries
from combiner.ops import chunking
from combiner.ops.flash import attend_blockwise, block_for
from combiner.ops.softmax import attend_full, support_mask

SHAPE = (2, 23, 2, 8)
VALID = np.random.default_rng(0).random((2, 23)) > 0.4
DOCUMENTS = np.stack([np.repeat([7, 0, 3, -1, 4], sizes) for sizes in ([4, 1, 9, 3, 6], [1, 12, 2, 8, 0])])


def blockwise(q, k, v, **masks):
    return attend_blockwise(q, k, v, block=4, **masks)


def dense(q, k, v, **masks):
    return attend_full(q, k, v, support_mask(q.shape[1], **masks))


def library(q, k, v, **masks):
    return libraries.attend_by_library(q, k, v, implementation='xla', **masks)


def splash(q, k, v, **masks):
    return libraries.attend_splash(q, k, v, interpret=True, **masks)


@functools.partial(jax.jit, static_argnums=0, static_argnames='causal')
def run(attend, q, k, v, cotangent, valid=None, segments=None, *, causal):
    def masked(q, k, v):
        out = attend(q, k, v, causal=causal, valid=valid, segments=segments)
        return out if valid is None else jnp.where(valid[..., None, None], out, 0)

    out, pull_back = jax.vjp(masked, q, k, v)
    return out, *pull_back(cotangent)


@causal_or_not
@pytest.mark.parametrize('attend', [blockwise, dense, library, splash])
def test_every_implementation_equals_the_oracle_with_gradients(attend, causal):
    *qkv, cotangent = draw(*SHAPE, count=4)
    expected = oracle(full.pattern(SHAPE[1], causal=causal), *qkv, cotangent)
    for one, other in zip(run(attend, *qkv, cotangent, causal=causal), expected, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@pytest.mark.parametrize('length', [300, 1024])
def test_splash_visits_several_blocks_of_each_size(length):
    """300 positions are padded to three blocks of 128; 1,024 are two of the largest blocks."""
    *qkv, cotangent = draw(1, length, 1, 8, count=4)
    for one, other in zip(*(run(attend, *qkv, cotangent, causal=True) for attend in (splash, dense)), strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


@causal_or_not
@pytest.mark.parametrize('attend', [blockwise, library, splash])
def test_padding_and_documents(attend, causal):
    arrays = draw(*SHAPE, count=4)
    expected = run(dense, *arrays, VALID, DOCUMENTS, causal=causal)
    for one, other in zip(run(attend, *arrays, VALID, DOCUMENTS, causal=causal), expected, strict=True):
        assert_close(one, other, TOLERANCE[jnp.float32])


def test_gradients_in_float16_of_a_long_sequence_do_not_vanish():
    q, k, v, cotangent = draw(1, 1024, 1, 8, count=4, dtype=jnp.float16)
    cotangent = (cotangent / 2**14).astype(jnp.float16)  # each position gets a thousandth of it
    expected = run(dense, *(x.astype(jnp.float32) for x in (q, k, v, cotangent)), causal=False)
    for one, other in zip(run(blockwise, q, k, v, cotangent, causal=False)[1:], expected[1:], strict=True):
        assert one.dtype == jnp.float16
        largest = np.abs(np.asarray(other)).max()
        np.testing.assert_allclose(np.asarray(one, np.float32), other, rtol=0, atol=2**-5 * largest)


@causal_or_not
def test_blockwise_in_bfloat16(causal):
    arrays = draw(*SHAPE, count=4, dtype=jnp.bfloat16)
    expected = run(dense, *(x.astype(jnp.float32) for x in arrays), VALID, causal=causal)
    for one, other in zip(run(blockwise, *arrays, VALID, causal=causal), expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert_close(one, other, TOLERANCE[jnp.bfloat16])


def test_blockwise_does_not_touch_later_blocks():
    *qkv, cotangent = draw(*SHAPE, count=4)
    spoilt = [np.where(np.arange(SHAPE[1])[:, None, None] < 12, x, np.float32('nan')) for x in qkv]
    expected, actual = (run(blockwise, *x, cotangent, causal=True)[0] for x in (qkv, spoilt))
    np.testing.assert_array_equal(actual[:, :12], expected[:, :12])


def test_blockwise_with_large_logits():
    """The weights are as exact as those of the dense form: what is saved for the backward pass is not rounded."""
    q, k, v, cotangent = draw(*SHAPE, count=4)
    expected = run(dense, 1e3 * q, k, v, cotangent, causal=True)
    for one, other in zip(run(blockwise, 1e3 * q, k, v, cotangent, causal=True), expected, strict=True):
        assert_close(one, other, 1e-4)


def test_blocks_fit_into_a_cache(monkeypatch):
    assert [block_for(batch, 8, 8192) for batch in (1, 4, 64)] == [128, 64, 64]
    assert block_for(1, 1, 8192) == 512
    assert block_for(1, 8, 100) == 100
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 2**16)
    assert block_for(1, 1, 8192) == 256


def test_memory_is_linear_in_the_length():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.float32)
        gradient = jax.grad(lambda q: combiner.attend(q, q, q, 'full', causal=True).sum())
        return jax.jit(gradient).lower(x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048), temporaries(8192)
    assert long < 4.5 * short
    assert long < 400e6


@causal_or_not
def test_blockwise_is_sharded_without_gathering(causal):
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    placement = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'model'))
    qkv = [jax.device_put(x, placement) for x in draw(4, 23, 2, 8)]
    valid = jax.device_put(np.ones((4, 23), bool), NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))

    def loss(q, k, v, valid):
        out = blockwise(q, k, v, causal=causal, valid=valid)
        return jax.lax.with_sharding_constraint(out, placement).sum()

    program = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=placement).lower(*qkv, valid).compile().as_text()
    assert 'all-gather' not in program
    assert 'all-to-all' not in program
    assert 'while' in program


def test_splash_lowers_for_many_tpus():
    """XLA cannot split the kernel: outside of the shards of devices, its lowering is an error."""
    device = AbstractDevice(device_kind='any', num_cores=None, platform='tpu')
    x = jax.ShapeDtypeStruct((4, 512, 4, 64), jnp.bfloat16)

    def gradient(q, k, v, valid):
        attend = functools.partial(combiner.attend, name='full', causal=True, valid=valid)
        return jax.grad(lambda *qkv: attend(*qkv).sum().astype(jnp.float32), (0, 1, 2))(q, k, v)

    # Like the project's meshes; JAX's default for the kind of axes changed in 0.12.
    kinds = {'axis_types': (AxisType.Auto,) * 3, 'abstract_device': device}
    with use_abstract_mesh(AbstractMesh((2, 2, 2), ('data', 'fsdp', 'model'), **kinds)):
        traced = jax.jit(gradient).trace(x, x, x, jax.ShapeDtypeStruct((4, 512), bool))
        text = traced.lower(lowering_platforms=('tpu',)).as_text()
    assert '@tpu_custom_call' in text
    assert 'sdy.manual_computation' in text


@pytest.mark.parametrize('attend', [library, splash])
def test_kernels_of_libraries_run_on_the_shards_of_devices(attend):
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    qkv, valid = draw(4, 23, 2, 8), jnp.asarray(np.tile(VALID, (2, 1)))
    placement = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'model'))
    with sharding.use(mesh):
        sharded = jax.jit(functools.partial(libraries.on_shards(attend), causal=True, valid=valid))
        compiled = sharded.lower(*(jax.device_put(x, placement) for x in qkv)).compile()
        actual = compiled(*(jax.device_put(x, placement) for x in qkv))
    assert actual.sharding.is_equivalent_to(placement, 4)
    assert 'all-gather' not in compiled.as_text()
    expected = jax.jit(functools.partial(attend, causal=True, valid=valid))(*qkv)
    assert_close(actual, expected, TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    ('implementation', 'message'),
    [
        ('flash', "unknown implementation 'flash'; choose cudnn, splash, blockwise, dense, ring, or None"),
        ('cudnn', "implementation='cudnn' needs a GPU, this is cpu; choose another, or None"),
        ('splash', "implementation='splash' needs a TPU, this is cpu"),
    ],
)
def test_what_a_platform_cannot_do_is_told(implementation, message):
    with pytest.raises(ValueError, match=message):
        combiner.attend(*draw(1, 4, 1, 8), 'full', causal=True, implementation=implementation)


def test_a_named_implementation_does_not_drop_weights():
    attend = combiner.attention_fn('full', implementation='blockwise')
    with pytest.raises(ValueError, match="implementation='blockwise' has no dropout of weights"):
        attend(*draw(1, 4, 1, 8), dropout_rate=0.5, dropout_rng=jax.random.key(0))


@pytest.mark.parametrize(
    ('batch', 'length', 'masked', 'chosen'),
    [
        (1, 8192, True, 'cudnn'),
        (1, 32768, True, 'blockwise'),
        (64, 4096, True, 'blockwise'),
        (64, 4096, False, 'cudnn'),
    ],
)
def test_cudnn_is_not_chosen_for_masks_that_fill_the_memory(batch, length, masked, chosen):
    q, valid = jax.ShapeDtypeStruct((batch, length, 8, 64), jnp.bfloat16), jnp.zeros((batch, 1), bool)
    device = AbstractDevice(device_kind='NVIDIA H200', num_cores=None, platform='gpu')
    with use_abstract_mesh(AbstractMesh((1,), ('data',), abstract_device=device)):
        options = {'valid': valid if masked else None, 'segments': None, 'drop': None}
        choose = functools.partial(choice.choose, 'Full', registry.resolve('full').implementations, None, **options)
        found = []
        jax.eval_shape(lambda q: found.append(choose(q)) or q, q)
    assert found == [chosen]


CUDNN = 'cudnn needs a GPU, this is '
SPLASH = 'splash needs a TPU, this is '
TAKES = 'cudnn takes bfloat16 or float16 and a head width of 8, 16, … 128, not '


@pytest.mark.parametrize(
    ('backend', 'devices', 'dtype', 'width', 'chosen', 'why'),
    [
        ('cpu', 1, jnp.bfloat16, 64, 'blockwise', f'{CUDNN}cpu; {SPLASH}cpu'),
        ('gpu', 8, jnp.bfloat16, 64, 'cudnn', 'the best there is'),
        ('gpu', 1, jnp.float32, 64, 'blockwise', f'{TAKES}float32 and 64; {SPLASH}gpu'),
        ('gpu', 1, jnp.float16, 36, 'blockwise', f'{TAKES}float16 and 36; {SPLASH}gpu'),
        ('tpu', 1, jnp.float32, 64, 'splash', f'{CUDNN}tpu'),
        ('tpu', 8, jnp.float32, 64, 'splash', f'{CUDNN}tpu'),
    ],
)
def test_the_best_is_chosen_and_logged_once_with_the_reason(absl_log, backend, devices, dtype, width, chosen, why):
    choice._announce.cache_clear()
    q = jnp.zeros((1, 4, 1, width), dtype)
    implementations = registry.resolve('full').implementations

    def choose(implementation, drop=None):
        return choice.choose('Full', implementations, implementation, q, drop=drop)

    device = AbstractDevice(device_kind='any', num_cores=None, platform=backend)
    with use_abstract_mesh(AbstractMesh((devices,), ('data',), abstract_device=device)):
        assert choose(None) == chosen
        logged = absl_log.text
        assert f'Full: {chosen}, on {backend} ({why})\n' in logged
        assert choose(None) == chosen
        assert absl_log.text == logged
        assert choose(None, drop=abs) == 'dense'
        assert f'Full: dense, on {backend} (cudnn ' in absl_log.text
        assert choose('dense') == 'dense'
        assert f"Full: dense, on {backend} (implementation='dense')\n" in absl_log.text
