import copy
import dataclasses
import functools
import os
import pickle
from pathlib import Path
from typing import Annotated, Any, get_origin

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE, assert_close, draw, random_variables, sizes_of, those
from flax import nnx
from jax.sharding import PartitionSpec

import combiner
from combiner.attention.full import Full
from combiner.core import registry
from combiner.core.mechanism import COUNTS
from combiner.core.module import make_attention
from combiner.ops import chunking

VALID = jnp.arange(9) < jnp.array([[9], [5]])


def test_shapes_of_jax_nn_dot_product_attention():
    q, k, v = draw(2, 9, 4, 8)
    k, v = k[:, :, :2], v[:, :, :2]
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    assert_close(combiner.attend(q, k, v, 'full', causal=True), expected, TOLERANCE[jnp.float32])


def test_numpy_in_jax_out():
    q, k, v = (np.asarray(x) for x in draw(2, 9, 4, 8))
    out = combiner.attend(q, k, v, 'combiner_fixed', causal=True, valid=np.asarray(VALID), block=4)
    assert isinstance(out, jax.Array)
    assert_close(
        out, combiner.attend(*map(jnp.asarray, (q, k, v)), 'combiner_fixed', causal=True, valid=VALID, block=4), 0.0
    )


def explicit():
    """A mesh of explicit axes in use, which `jax.make_mesh` makes by default in newer versions."""
    return jax.set_mesh(jax.make_mesh((2, 4), ('data', 'model'), (jax.sharding.AxisType.Explicit,) * 2))


def split(x, *axes):
    return jax.device_put(x, PartitionSpec(*axes))


@pytest.mark.parametrize('name', those(input_dependent=False, requires=''))
def test_every_mechanism_takes_explicit_axes(name):
    """Types say how arrays are split: a trace tells whether an operation has no answer to that."""
    causal, hyper = registry.resolve(name).supported_causal[0], sizes_of(name)
    given = {'valid': np.ones((2, 23), bool)}
    if registry.resolve(name).supports_segments:
        given['segments'] = np.arange(46).reshape(2, 23) // 7

    def run(q, k, v):
        return jax.vjp(lambda *qkv: combiner.attend(*qkv, name, causal=causal, **given, **hyper), q, k, v)[1](q)

    with explicit():
        arrays = [split(x, 'data', None, 'model') for x in draw(2, 23, 4, 4)]
        for gradient, x in zip(jax.eval_shape(run, *arrays), arrays, strict=True):
            assert jax.typeof(gradient).sharding == jax.typeof(x).sharding


def test_explicit_axes_change_nothing():
    q, k, v = (np.asarray(x) for x in draw(2, 23, 4, 4))
    k, v = k[:, :, :2], v[:, :, :2]
    masks = {'valid': np.arange(46).reshape(2, 23) % 5 > 0, 'segments': np.arange(46).reshape(2, 23) // 7}
    expected = combiner.attend(q, k, v, 'combiner_fixed', causal=True, block=4, **masks)
    with explicit():
        for axes in (('data', None, 'model'), (None, None, 'data'), ()):
            arrays = split(q, *axes), split(k, 'data'), split(v, 'data')
            found = combiner.attend(*arrays, 'combiner_fixed', causal=True, block=4, **masks)
            assert jax.typeof(found).sharding == jax.typeof(arrays[0]).sharding
            assert_close(np.asarray(found), expected, TOLERANCE[jnp.float32])


def test_nnx_takes_explicit_axes():
    with explicit():
        own = nnx.MultiHeadAttention(
            2, 8, decode=False, attention_fn=combiner.attention_fn('full'), rngs=nnx.Rngs(0), deterministic=True
        )
        (x,) = draw(2, 9, 8, count=1)
        assert jax.typeof(own(split(x, 'data'))).sharding.spec[0] == 'data'


def test_linen_modules_refuse_explicit_axes():
    module = make_attention('combiner_fixed', width=8)
    message = r'explicit axes data, model.*make it with combiner\.sharding\.make_mesh'
    with explicit(), pytest.raises(ValueError, match=message):
        module.init(jax.random.key(0), split(jnp.ones((2, 9, 8)), 'data'), jnp.arange(9)[None])


def spoil(**changes):
    q, k, v = draw(2, 9, 4, 8)
    return {'q': q, 'k': k, 'v': v, 'name': 'full', 'causal': True} | changes


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            lambda: spoil(q=jnp.ones((9, 4, 8))),
            r'must be \[batch, length, heads, head width\], got q float32\[9, 4, 8\]',
        ),
        (
            lambda: spoil(q=jnp.ones((2, 1, 4, 8))),
            r'must agree in batch, length and head width .*to decode, use .* combiner\.Attention',
        ),
        (lambda: spoil(v=jnp.ones((2, 9, 2, 8))), 'must agree in batch'),
        (lambda: spoil(k=jnp.ones((2, 9, 3, 8)), v=jnp.ones((2, 9, 3, 8))), 'key heads must divide the query heads'),
        (lambda: spoil(**{x: jnp.ones((2, 0, 4, 8)) for x in 'qkv'}), 'at least one position'),
        (lambda: spoil(**{x: jnp.ones((2, 9, 4, 8), int) for x in 'qkv'}), 'one floating-point type, got q int32'),
        (lambda: spoil(**{x: jnp.ones((0, 9, 4, 8)) for x in 'qkv'}), 'at least one position of one sequence'),
        (lambda: spoil(**{x: jnp.ones((2, 9, 4, 0)) for x in 'qkv'}), 'at least one position of one sequence'),
        (lambda: spoil(**{x: jnp.ones((2, 9, 4, 8), jnp.float8_e4m3fn) for x in 'qkv'}), 'at least 16 bits'),
        (lambda: spoil(q=jnp.ones((2, 9, 4, 8), jnp.bfloat16)), 'one floating-point type, got q bfloat16'),
        (lambda: spoil(name='fulll'), "did you mean 'full'"),
        (lambda: spoil(block=4), "full has no hyper-parameter 'block'"),
        (lambda: spoil(name='combiner_fixed', block=0), 'block must be at least 1, got 0'),
        (
            lambda: spoil(name='combiner_mixture', segments=jnp.zeros((2, 9), int)),
            'CombinerMixture does not support segments',
        ),
        (lambda: spoil(segments=jnp.zeros((2, 9))), r'segments must be int\[2, 9\], got float32\[2, 9\]'),
        (
            lambda: spoil(name='combiner_fixed', pool='deepsets'),
            "pool='deepsets' owns parameters: use the Linen module",
        ),
        (lambda: spoil(name='combiner_fixed', pool='min'), "unknown pool 'min'; choose max, mean"),
        (lambda: spoil(name='combiner_fixed', block=2.5), r'block=2\.5 must be of type int \| None, not float'),
        (lambda: spoil(name='axial', columns='3'), r"columns='3' must be of type int \| None, not str"),
        (lambda: spoil(name='combiner_axial_rowmajor', key=None), 'key=None must be of type str, not NoneType'),
        (lambda: spoil(name='fixed', summary=0), 'summary must be at least 1, got 0'),
        (lambda: spoil(valid=jnp.ones((2, 8), bool)), r'valid must be bool\[2, 9\], got bool\[2, 8\]'),
    ],
)
def test_wrong_input_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        combiner.attend(**arguments())


def in_linen(name, x, mask=None, **hyper):
    fn = combiner.attention_fn(name, **hyper)
    module = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=fn, deterministic=True)
    return module.init_with_output(jax.random.key(0), x, mask=mask)[0]


def in_nnx(name, x, mask=None, **hyper):
    fn = combiner.attention_fn(name, **hyper)
    module = nnx.MultiHeadAttention(2, 8, decode=False, attention_fn=fn, rngs=nnx.Rngs(0), deterministic=True)
    return module(x, mask=mask)


@pytest.mark.parametrize('inside', [in_linen, in_nnx], ids=['linen', 'nnx'])
def test_drop_in_for_flax(inside):
    (x,) = draw(2, 9, 8, count=1)
    causal = nn.make_causal_mask(jnp.ones((2, 9)))
    dense = {'linen': nn.dot_product_attention, 'nnx': nnx.dot_product_attention}

    def expected(mask):
        if inside is in_linen:
            module = nn.MultiHeadDotProductAttention(2, attention_fn=dense['linen'], deterministic=True)
            return module.init_with_output(jax.random.key(0), x, mask=mask)[0]
        fn = dense['nnx']
        return nnx.MultiHeadAttention(2, 8, decode=False, attention_fn=fn, rngs=nnx.Rngs(0), deterministic=True)(
            x, mask=mask
        )

    one_block = {'name': 'combiner_fixed', 'block': 9}
    padding = VALID[:, None, None]

    @jax.jit
    def run(x):
        return inside(x=x, causal=True, **one_block), inside(x=x, mask=padding, **one_block)

    unpadded, padded = run(x)
    assert_close(unpadded, expected(causal), 1e-5)
    assert_close(jnp.where(VALID[..., None], padded, 0), jnp.where(VALID[..., None], expected(padding), 0), 1e-5)
    for mask in (causal, nn.make_attention_mask(VALID, VALID)):
        with pytest.raises(ValueError, match='mask must be one of keys alone'):
            inside(x=x, mask=mask, **one_block)


@pytest.mark.parametrize('inside', [in_linen, in_nnx], ids=['linen', 'nnx'])
@pytest.mark.parametrize('name', those(requires=''))
def test_every_mechanism_drops_in(name, inside):
    (x,) = draw(2, 9, 8, count=1)
    assert jax.jit(functools.partial(inside, name))(x).shape == x.shape


def test_dropout_in_flax():
    (x,) = draw(2, 9, 8, count=1)
    module = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, attention_fn=combiner.attention_fn('combiner_fixed'))
    params = module.init(jax.random.key(0), x, deterministic=True)
    still, *dropped = (
        module.apply(params, x, deterministic=off, rngs={'dropout': jax.random.key(seed)})
        for off, seed in ((True, 0), (False, 0), (False, 0), (False, 1))
    )
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert (dropped[0] != dropped[2]).any()
    assert (dropped[0] != still).any()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'bias': jnp.zeros((1, 1, 9, 9))}, 'full cannot honour bias'),
        ({'precision': 'highest'}, 'full cannot honour precision'),
        ({'something': 1}, 'full cannot honour something'),
        ({'dropout_rate': 0.1}, 'dropout needs a random key'),
        ({'dropout_rate': 1.0}, 'dropout_rate=1.0 must be at least 0 and less than 1'),
        ({'dropout_rate': -0.1}, 'dropout_rate=-0.1 must be at least 0 and less than 1'),
    ],
)
def test_arguments_are_refused_and_not_ignored(arguments, message):
    with pytest.raises(ValueError, match=message):
        combiner.attention_fn('full')(*draw(2, 9, 2, 4), **arguments)


def test_attention_fn_is_a_value():
    made = [combiner.attention_fn('combiner_fixed', causal=True, pool='max', block=4) for _ in range(2)]
    other = combiner.attention_fn('combiner_fixed', causal=True, block=5)
    copies = [copy.deepcopy(made[0]), pickle.loads(pickle.dumps(made[0]))]
    for same in (made[1], *copies):
        assert same == made[0]
        assert hash(same) == hash(made[0])
    assert other != made[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made[0].causal = False
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(module, x):
        traced.append(module)
        return module.init_with_output(jax.random.key(0), x)[0]

    (x,) = draw(2, 9, 8, count=1)
    for fn in (*made, *copies):
        run(nn.MultiHeadDotProductAttention(2, attention_fn=fn, deterministic=True), x)
    assert len(traced) == 1


@pytest.mark.parametrize('name', combiner.names())
def test_every_attention_fn_is_a_value(name):
    for causal in registry.resolve(name).supported_causal:
        one, same = (combiner.attention_fn(name, causal=causal, **sizes_of(name)) for _ in range(2))
        assert one == same == copy.deepcopy(one) == pickle.loads(pickle.dumps(one))
        assert one.mechanism == same.mechanism
        assert hash(one.mechanism) == hash(same.mechanism)


def test_what_flax_passes_is_honoured_or_refused():
    attend, qkv = combiner.attention_fn('full', causal=True), draw(2, 9, 2, 4)
    expected = attend(*qkv)
    np.testing.assert_array_equal(attend(*qkv, module=None, is_causal=True, input_positions=None), expected)
    with pytest.raises(ValueError, match=r'full cannot sow its weights.*leave sow_weights=False'):
        attend(*qkv, module=nn.Dense(1))
    with pytest.raises(ValueError, match=r"say attention_fn\('full', causal=True\)"):
        combiner.attention_fn('full')(*qkv, is_causal=True)
    (x,) = draw(2, 9, 8, count=1)
    linen = nn.MultiHeadDotProductAttention(2, attention_fn=attend, deterministic=True)
    with pytest.raises(ValueError, match='cannot sow its weights'):
        linen.init(jax.random.key(0), x, sow_weights=True)
    own = nnx.MultiHeadAttention(2, 8, decode=False, attention_fn=attend, rngs=nnx.Rngs(0), deterministic=True)
    assert own(x, sow_weights=False).shape == x.shape
    with pytest.raises(ValueError, match='cannot sow its weights'):
        own(x, sow_weights=True)


@pytest.mark.parametrize('name', combiner.names())
def test_wrong_values_are_told_when_a_mechanism_is_made(name):
    """Every hyper-parameter that is one of some names, and every implementation."""
    fields = {field.name: field.type for field in dataclasses.fields(registry.resolve(name))}
    named = [field for field, kind in fields.items() if get_origin(kind) is Annotated and kind not in COUNTS]
    named += ['implementation'] * ('implementation' in fields)
    for field in named:
        with pytest.raises(ValueError, match=f"unknown {field} 'mux'; choose "):
            registry.make_mechanism(name, {field: 'mux'}, causal=registry.resolve(name).supported_causal[0])
    texts = [field for field, value in registry.hyper_parameters(name).items() if isinstance(value, str)]
    assert set(texts) <= set(named), 'a text that is not checked: annotate it with its names'


def test_a_tree_has_at_least_two_branches():
    with pytest.raises(ValueError, match='branch must be at least 2, got 1'):
        combiner.attention_fn('combiner_tree', branch=1)


def test_a_hyper_parameter_without_a_hash_is_frozen_or_refused():
    made = [combiner.attention_fn(f'{__name__}:Listed', sizes=[1, {'a': [2]}]) for _ in range(2)]
    assert made[0] == made[1]
    assert hash(made[0].mechanism) == hash(made[1].mechanism)
    with pytest.raises(ValueError, match='sizes is a ndarray, which has no hash'):
        combiner.attention_fn(f'{__name__}:Listed', sizes=np.ones(3))


class Noted(Full):
    """A mechanism with a hyper-parameter whose type has a note that is no list of names."""

    seconds: Annotated[float, 'of a step'] = 1.0


def test_a_note_of_a_type_is_no_list_of_names():
    assert registry.make_mechanism(f'{__name__}:Noted', {'seconds': 2.0}).seconds == 2.0


class Listed(Full):
    """A mechanism of the user's own, with a hyper-parameter of any kind."""

    sizes: Any = ()


@pytest.fixture
def compilations():
    """The number of programs compiled so far, in a list."""
    count = [0]

    def listen(event, duration, **of):
        count[0] += event == '/jax/core/compile/backend_compile_duration'

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def resident() -> float:
    """MiB of memory that this process holds."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def calls_of(name, length=32):
    """What a user may call eagerly: function, function in Flax, module, decoding step."""
    causal, hyper = registry.resolve(name).supported_causal[0], sizes_of(name)
    frame = {'causal': causal, 'width': 16, 'heads': 2, 'max_length': length}
    (x,), positions = draw(1, length, 16, count=1), jnp.arange(length)[None]
    module = make_attention(name, hyper, **frame)
    variables = random_variables(module, x, positions)
    calls = {'module': lambda: make_attention(name, hyper, **frame).apply(variables, x, positions)}
    if not registry.resolve(name).requires:
        qkv = [np.asarray(part) for part in draw(1, length, 2, 8)]
        calls['function'] = lambda: combiner.attend(*qkv, name, causal=causal, **hyper)
        calls['in Flax'] = lambda: combiner.attention_fn(name, causal=causal, **hyper)(*map(jnp.asarray, qkv))
    if causal:
        counts = jnp.array([length // 2])
        half = x[:, : length // 2], positions[:, : length // 2]
        first = x[:, :1]
        start = functools.partial(module.apply, variables, method='prefill', mutable=['cache'])
        calls['prefill'] = lambda: start(*half, counts, length)
        _, cache = calls['prefill']()
        step = functools.partial(module.apply, {**variables, **cache}, method='decode', mutable=['cache'])
        calls['decode'] = lambda: step(first, counts)
    return calls


@pytest.mark.parametrize('name', combiner.names())
@pytest.mark.usefixtures('one_device')
def test_eager_calls_compile_once_and_keep_nothing(name, compilations, monkeypatch):
    monkeypatch.setattr(chunking, 'CHUNK_LOGITS', 64)
    for what, call in calls_of(name).items():
        call()
        call()
        before, held = compilations[0], resident()
        for _ in range(48 if what == 'function' else 3):
            jax.block_until_ready(call())
        assert compilations[0] == before, what
        assert resident() - held < 8, what
