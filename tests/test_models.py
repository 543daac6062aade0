import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_close, random_variables, sizes_of, those
from flax import linen as nn

from combiner import models, optim, steps
from combiner.core import registry

SHAPE = (4, 3, 2)
TOKENS = jax.random.randint(jax.random.key(0), (3, 24), 0, 10)
SETTINGS = {'layers': 2, 'width': 16, 'heads': 2, 'positions': 'learned', 'attention': {'name': 'combiner_fixed'}}


def build(head='language_model', classes=0, packed=False, **changes):
    return models.build(head, 10, SHAPE, SETTINGS | changes, classes, packed=packed)


DECODING = [name for name in those(uses_future=False) if True in registry.resolve(name).supported_causal]


@pytest.mark.parametrize(
    ('name', 'tied'),
    [*((name, True) for name in DECODING), ('combiner_fixed', False)],
    ids=[*DECODING, 'untied'],
)
def test_language_model_decodes_what_it_predicts_in_parallel(name, tied):
    """With biases, and heads of values of another width than those of queries and keys."""
    wider = {'value_width': 24} if registry.resolve(name).allows_value_width else {}
    model = build(attention={'name': name}, tied=tied, positions='image', bias='all', **wider)
    params = random_variables(model, TOKENS)
    expected = jax.jit(model.apply)(params, TOKENS)
    assert expected.shape == (3, 24, 10)
    assert expected.dtype == jnp.float32
    counts, rows = jnp.array([0, 5, 9]), jnp.arange(3)
    prefill = jax.jit(lambda tokens: model.apply(params, tokens, counts, 24, method='prefill', mutable=['cache']))
    decode = jax.jit(lambda cache, t, i: model.apply({**params, **cache}, t, i, method='decode', mutable=['cache']))
    logits, cache = prefill(TOKENS[:, :9])
    for index in [counts + step for step in range(15)]:
        assert_close(logits, expected[rows, index], 1e-5)
        logits, cache = decode(cache, TOKENS[rows, index], index + 1)


def test_a_token_is_not_in_its_own_prediction():
    model = build()
    params = random_variables(model, TOKENS)
    apply = jax.jit(lambda tokens: model.apply(params, tokens))
    expected = apply(TOKENS)
    for now in range(24):
        changed = jnp.where(jnp.arange(24) < now, TOKENS, 9 - TOKENS)
        np.testing.assert_array_equal(apply(changed)[:, : now + 1], expected[:, : now + 1])


BIASES_OF = {
    'none': set(),
    'mlp': {'mlp_branch.in_bias', 'mlp_branch.out_bias'},
    'all': {
        *(f'attention_branch.{role}_bias' for role in ('query', 'key', 'value', 'out')),
        *('mlp_branch.in_bias', 'mlp_branch.out_bias'),
        *('attention_norm.bias', 'mlp_norm.bias', 'trunk.stack.norm.bias', 'logits_bias'),
    },
}


@pytest.mark.parametrize('bias', BIASES_OF)
@pytest.mark.parametrize('head', ['language_model', 'masked_language_model'])
def test_biases_are_where_they_are_asked_for_and_do_not_decay(head, bias):
    params = nn.unbox(jax.eval_shape(build(head, bias=bias).init, jax.random.key(0), TOKENS)['params'])
    decayed = jax.tree_util.tree_leaves_with_path(optim.decays(params))
    decayed = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in decayed}
    biases = {name.removeprefix('trunk.stack.blocks_0.') for name in decayed if name.endswith('bias')}
    assert biases == BIASES_OF[bias]
    assert not any(leaf for name, leaf in decayed.items() if name.endswith('bias'))
    assert decayed['trunk.stack.blocks_0.mlp_branch.in_kernel']


def test_an_untied_model_starts_uniform():
    model = build(tied=False)
    logits, _ = jax.jit(model.init_with_output)(jax.random.key(0), TOKENS)
    np.testing.assert_array_equal(logits, 0)


@pytest.mark.parametrize(
    ('head', 'name'),
    [
        (head, name)
        for head, causal in (('language_model', True), ('masked_language_model', False))
        for name in those(supports_segments=True)
        if causal in registry.resolve(name).supported_causal
    ],
)
def test_packed_documents_do_not_see_each_other(head, name):
    model = build(head, attention={'name': name} | sizes_of(name), packed=True, layers=1)
    params = random_variables(model, TOKENS)
    segments = jnp.array([[1] * 7 + [2] * 17, [1] * 24, [4] * 11 + [5] * 12 + [6]])
    apply = jax.jit(lambda tokens: model.apply(params, tokens, segments=segments))
    logits = apply(TOKENS)
    changed = apply(TOKENS.at[0, 3].set(9 - TOKENS[0, 3]))
    after = slice(3, 7) if head == 'masked_language_model' else slice(4, 7)
    differs = (changed[0, after] != logits[0, after]).any(axis=-1)
    assert differs.all() if registry.resolve(name).full_support else differs.any()
    np.testing.assert_array_equal(changed[0, 7:], logits[0, 7:])
    np.testing.assert_array_equal(changed[1:], logits[1:])


def test_a_masked_language_model_attends_to_both_sides_and_to_its_own_input():
    model = build('masked_language_model')
    params = random_variables(model, TOKENS)
    apply = jax.jit(model.apply)
    logits = apply(params, TOKENS)
    assert logits.shape == (3, 24, 10)
    changed = apply(params, TOKENS.at[:, 12].set(9 - TOKENS[:, 12]))
    assert (changed != logits).any(axis=-1).all()


@pytest.mark.parametrize('pool', ['mean', 'cls'])
def test_classifier_ignores_padding(pool):
    model = build('classifier', classes=5, pool=pool)
    params = random_variables(model, TOKENS)
    valid = jnp.arange(24) < jnp.array([[24], [13], [1]])
    apply = jax.jit(model.apply)
    logits = apply(params, TOKENS, valid=valid)
    assert logits.shape == (3, 5)
    np.testing.assert_array_equal(apply(params, jnp.where(valid, TOKENS, 9 - TOKENS), valid=valid), logits)
    assert (apply(params, 9 - TOKENS, valid=valid) != logits).any(axis=1).all()


def test_dual_encoder_reads_pairs():
    model = build('dual_encoder', classes=2)
    pairs = jnp.stack([TOKENS, TOKENS[::-1]], axis=1)
    params = random_variables(model, pairs)
    apply = jax.jit(model.apply)
    logits = apply(params, pairs)
    assert logits.shape == (3, 2)
    assert_close(apply(params, pairs[::-1]), logits[::-1], 1e-5)
    valid = jnp.ones(pairs.shape, bool)
    assert_close(apply(params, pairs, valid=valid), logits, 1e-5)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'head': 'language'}, "unknown head 'language'; choose one of language_model, masked_language_model, "),
        ({'widht': 4}, 'unknown model settings widht; a language_model has: attention, .*tied'),
        ({'pool': 'mean'}, 'unknown model settings pool'),
        ({'layers': 0}, 'model.layers=0 must be positive'),
        ({'dropout': 1.5}, 'model.dropout=1.5 must be at least 0 and less than 1'),
        ({'dtype': 'floaty'}, "model.dtype='floaty': choose float32 or bfloat16"),
        ({'head': 'classifier'}, 'a classifier needs at least 2 classes, got 0'),
        ({'attention': {'name': 'combiner_fixd'}}, "did you mean 'combiner_fixed'"),
        ({'attention': {'name': 'full', 'block': 2}}, "full has no hyper-parameter 'block'"),
        (
            {'attention': {'name': 'bigbird'}, 'packed': True, 'head': 'masked_language_model'},
            'bigbird does not support packed documents; set data.options.documents=joined or cropped',
        ),
        (
            {'attention': {'name': 'combiner_axial_rowmajor', 'key': 'projected'}, 'packed': True},
            r'combiner_axial_rowmajor\+key=projected does not support packed documents; set data.options.documents',
        ),
        ({'attention': {}}, 'model.attention has no name; choose one of axial'),
        ({'kv_heads': 0}, 'model.kv_heads=0 must be positive'),
        ({'width': -16}, 'model.width=-16 must be positive'),
        ({'mlp_ratio': 0.01}, 'model.mlp_ratio=0.01 gives no hidden unit at width 16'),
        ({'attention_dropout': -0.1}, 'model.attention_dropout=-0.1 must be'),
        (
            {'attention': {'name': 'linear'}, 'value_width': 32},
            'Linear needs values as wide as queries: heads of 16 and 8; leave value_width unset',
        ),
        (
            {'attention': {'name': 'performer'}, 'attention_dropout': 0.1},
            'performer has no attention weights: set model.attention_dropout to 0, not 0.1',
        ),
        ({'value_width': 0}, 'model.value_width=0 must be positive'),
        ({'mlp_dropout': 1}, 'model.mlp_dropout=1 must be at least 0 and less than 1'),
        ({'embedding_dropout': -1}, 'model.embedding_dropout=-1 must be'),
        ({'embedding_std': -1.0}, 'model.embedding_std=-1.0 must be at least 0 and finite'),
        ({'bias': 'some'}, "model.bias='some': choose none, mlp, all"),
        ({'remat': 'true'}, "model.remat='true': choose none, dots, full"),
        ({'initialization': 'xavier'}, "model.initialization='xavier': choose default, sparse_transformer"),
        ({'dtype': 'bf16'}, "model.dtype='bf16': choose float32 or bfloat16"),
        ({'dtype': 'float16'}, "model.dtype='float16': choose float32 or bfloat16"),
    ],
)
def test_unknown_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match='3 heads do not divide the width 16'):
        build(heads=3).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match='2 heads do not divide the width 15'):
        build(value_width=15).init(jax.random.key(0), TOKENS)


def test_unknown_pool():
    with pytest.raises(ValueError, match="unknown pool 'max'; choose mean or cls"):
        build('classifier', classes=2, pool='max').init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="choose pool='mean' or other positions"):
        build('classifier', classes=2, pool='cls', positions='image').init(jax.random.key(0), TOKENS)


def test_a_prompt_must_leave_room():
    model = build()
    params = random_variables(model, TOKENS)
    with pytest.raises(ValueError, match='a prompt of 24 tokens is too long; give at most 23'):
        model.apply(params, TOKENS, jnp.array([24, 24, 24]), 24, method='prefill', mutable=['cache'])


@pytest.mark.parametrize('name', those(supports_segments=True))
def test_packed_documents_go_through_a_training_and_an_evaluation_step(name):
    head = 'language_model' if True in registry.resolve(name).supported_causal else 'masked_language_model'
    model = build(head, attention={'name': name}, packed=True)
    batch = {'tokens': TOKENS, 'targets': TOKENS, 'weights': jnp.ones(TOKENS.shape), 'segments': TOKENS * 0}
    optimizer = optax.sgd(0.1)

    def both():
        variables = nn.unbox(model.init(jax.random.key(0), TOKENS))
        collections = {key: value for key, value in variables.items() if key != 'params'}
        opt_state, rng = optimizer.init(variables['params']), jax.random.key_data(jax.random.key(1))
        state = steps.State(jnp.zeros((), int), variables['params'], opt_state, None, collections, rng)
        options = {'model': model, 'count_hits': True}
        settings = {'optimizer': optimizer, 'rate': lambda step: 0.1, 'accumulation': 1, 'ema_decay': 0.0}
        state, measured = steps.train_step(state, batch, **settings, **options)
        return state, measured, steps.eval_step({'params': state.params, **state.collections}, batch, **options)

    state, *_ = jax.eval_shape(both)
    assert state.step.shape == ()
