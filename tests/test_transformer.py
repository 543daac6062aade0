import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_close, random_variables

from combiner import sharding
from combiner.aot import cost
from combiner.transformer import REMATS, Backbone

SHAPE = (4, 3, 2)
TOKENS = jax.random.randint(jax.random.key(0), (2, 24), 0, 10)


def backbone(**changes):
    settings = {
        'attention': {'name': 'combiner_fixed', 'block': 5},
        'shape': SHAPE,
        'vocabulary': 10,
        'prefix': False,
        'causal': True,
    }
    return Backbone(**(settings | {'layers': 3, 'width': 16, 'heads': 2, 'positions': 'image'} | changes))


def loss_and_gradients(model, params):
    return jax.jit(jax.value_and_grad(lambda p: (model.apply(p, TOKENS).astype(jnp.float32) ** 2).sum()))(params)


def unrolled(params):
    """Parameters of a scanned stack, as those of one without scan."""
    stack = params['params']['stack']
    layers = {f'blocks_{i}': jax.tree.map(lambda x, i=i: x[i], stack['blocks_0']) for i in range(3)}
    return {'params': params['params'] | {'stack': layers | {'norm': stack['norm']}}}


def test_scan_equals_unrolled():
    model, plain = backbone(), backbone(scan=False)
    params = random_variables(model, TOKENS)
    loss, gradients = loss_and_gradients(model, params)
    expected_loss, expected = loss_and_gradients(plain, unrolled(params))
    assert_close(loss, expected_loss, 1e-5)
    jax.tree.map(lambda one, other: assert_close(one, other, 1e-5), unrolled(gradients), expected)


@pytest.mark.parametrize('scan', [True, False], ids=['scan', 'unrolled'])
def test_remat_changes_nothing(scan):
    params = random_variables(backbone(scan=scan), TOKENS)
    expected, *others = [loss_and_gradients(backbone(scan=scan, remat=remat), params) for remat in REMATS]
    for found in others:
        jax.tree.map(lambda one, other: assert_close(one, other, 1e-6), found, expected)


def test_remat_computes_again_what_its_name_says():
    """`full` the block but for its last product, whose result it does not need; `dots` of that no dense layer."""

    def flops(remat):
        model = backbone(remat=remat)
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
        step = jax.jit(jax.grad(lambda params: (model.apply(params, TOKENS) ** 2).sum()))
        return cost.count(step.lower(params).compile().as_text()).flops

    none, dots, full = map(flops, REMATS)
    dense_of_a_block = 2 * TOKENS.size * (4 * 16 * 16 + 16 * 64)  # four projections, the first layer of the MLP
    assert full - dots == 3 * dense_of_a_block
    assert none < dots


def test_depth_is_traced_once():
    """So 128 layers compile in the time of two: parameters, forward pass, backward pass."""

    def programs(layers):
        model = backbone(layers=layers, remat='full')
        params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
        step = jax.jit(jax.grad(lambda params: (model.apply(params, TOKENS) ** 2).sum()))
        lowered = jax.jit(model.init).lower(jax.random.key(0), TOKENS), step.lower(params)
        return [len(each.as_text().splitlines()) for each in lowered]

    assert programs(128) == programs(2)


def test_dropout_differs_between_layers_and_steps():
    model = backbone(dropout=0.5, attention_dropout=0.5)
    params = random_variables(model, TOKENS)
    apply = jax.jit(
        lambda seed: model.apply(params, TOKENS, deterministic=False, rngs={'dropout': jax.random.key(seed)})
    )
    np.testing.assert_array_equal(apply(0), apply(0))
    assert (apply(0) != apply(1)).any()


@pytest.mark.parametrize('positions', ['image', 'learned', 'sinusoid', 'rotary'])
def test_order_matters(positions):
    model = backbone(positions=positions, attention={'name': 'full'}, causal=False)
    params = random_variables(model, TOKENS)
    apply = jax.jit(model.apply)
    features, flipped = apply(params, TOKENS), apply(params, TOKENS[:, ::-1])[:, ::-1]
    assert abs(features - flipped).max() > 1e-2


@pytest.mark.parametrize(('positions', 'size'), [('sinusoid', 1.0), ('learned', 0.02)])
def test_tokens_start_as_large_as_their_positions(positions, size):
    model = backbone(positions=positions, width=64, vocabulary=500)
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    bound = model.bind(nn.meta.unbox(variables))
    assert float(jnp.std(bound.embedding) * bound.token_scale) == pytest.approx(size, rel=0.05)


def std_of(variables):
    """The standard deviation of every parameter, by its name in the backbone."""
    flat = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(variables))
    return {jax.tree_util.keystr(path, simple=True, separator='.'): float(jnp.std(leaf)) for path, leaf in flat}


def test_initialization_of_the_sparse_transformer():
    """Child et al. (2019), section 6: 0.125/√fan-in, the last matrix of a branch smaller by 1/√(2·layers)."""
    sizes = {
        'width': 128,
        'qkv_width': 64,
        'value_width': 96,
        'vocabulary': 200,
        'mlp_ratio': 2.0,
        'shape': (40, 30, 20),
    }
    model = backbone(initialization='sparse_transformer', prefix=True, scan=False, **sizes)
    found = std_of(jax.jit(model.init)(jax.random.key(0), TOKENS))
    last = 0.125 / (2 * 3) ** 0.5
    expected = {
        'embedding': 0.125 / 128**0.5,
        'position_embedding.axis_1': 0.125 / (128 * 3) ** 0.5,
        'stack.blocks_1.attention_branch.query_kernel': 0.125 / 128**0.5,
        'stack.blocks_1.attention_branch.value_kernel': 0.125 / 128**0.5,
        'stack.blocks_1.attention_branch.out_kernel': last / 96**0.5,
        'stack.blocks_1.mlp_branch.in_kernel': 0.125 / 128**0.5,
        'stack.blocks_1.mlp_branch.out_kernel': last / 256**0.5,
    }
    assert {name: found[f'params.{name}'] for name in expected} == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize('positions', ['learned', 'sinusoid'])
def test_embedding_std_is_that_of_what_enters_the_stack(positions):
    model = backbone(positions=positions, width=64, vocabulary=500, embedding_std=0.7)
    bound = model.bind(nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS)))
    assert float(jnp.std(bound.embedding) * bound.token_scale) == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize(
    ('rates', 'embeddings', 'features'),
    [
        ({'dropout': 0.5}, True, True),
        ({'dropout': 0.5, 'embedding_dropout': 0.0}, False, True),
        ({'embedding_dropout': 0.5}, True, True),
        ({'mlp_dropout': 0.5}, False, True),
        ({}, False, False),
    ],
    ids=str,
)
def test_where_dropout_acts(rates, embeddings, features):
    model = backbone(layers=1, **rates)
    params = random_variables(model, TOKENS)
    entered = []

    def record(call, args, kwargs, context):
        if type(context.module).__name__ == 'Stack' and context.method_name == '__call__':
            entered.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        still = model.apply(params, TOKENS)
        trained = model.apply(params, TOKENS, deterministic=False, rngs={'dropout': jax.random.key(0)})
    assert bool(jnp.any(entered[0] != entered[1])) == embeddings
    assert bool(jnp.any(still != trained)) == features


def test_no_position_depends_on_later_ones():
    model = backbone()
    params = random_variables(model, TOKENS)
    apply = jax.jit(lambda tokens: model.apply(params, tokens))
    expected = apply(TOKENS)
    for now in range(23):
        changed = jnp.where(jnp.arange(24) <= now, TOKENS, 9 - TOKENS)
        np.testing.assert_array_equal(apply(changed)[:, : now + 1], expected[:, : now + 1])


def test_padding_does_not_reach_what_is_valid():
    model = backbone(causal=False)
    params = random_variables(model, TOKENS)
    valid = jnp.arange(24) < jnp.array([[24], [13]])
    apply = jax.jit(model.apply)
    features = apply(params, TOKENS, valid=valid)
    changed = apply(params, jnp.where(valid, TOKENS, 9 - TOKENS), valid=valid)
    np.testing.assert_array_equal(jnp.where(valid[..., None], features, 0), jnp.where(valid[..., None], changed, 0))


def test_bfloat16():
    model = backbone(dtype=jnp.bfloat16)
    params = random_variables(model, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    features = jax.jit(model.apply)(params, TOKENS)
    assert features.dtype == jnp.bfloat16
    assert_close(features, jax.jit(backbone().apply)(params, TOKENS), 5e-2)


def test_too_long():
    with pytest.raises(ValueError, match='length 25 exceeds the 4x3x2 positions of the model; give at most 24 tokens'):
        backbone().init(jax.random.key(0), jnp.zeros((1, 25), int))


def test_every_axis_of_every_parameter_has_a_rule():
    specs = nn.get_partition_spec(jax.eval_shape(backbone(bias='all').init, jax.random.key(0), TOKENS))
    assert 'embed' in specs['params']['stack']['blocks_0']['mlp_norm']['bias']
    named = {axis for spec in jax.tree.leaves(specs) for axis in spec}
    assert {'layers', 'embed', 'heads', 'head_dim', 'mlp', 'vocab', 'positions'} <= named
    assert named <= {name for name, _ in sharding.RULES}


def test_rows_of_different_lengths_decode():
    model = backbone()
    params = random_variables(model, TOKENS)
    expected = jax.jit(model.apply)(params, TOKENS)
    counts, rows = jnp.array([3, 8]), jnp.arange(2)
    prefill = jax.jit(lambda tokens: model.apply(params, tokens, counts, 24, method='prefill', mutable=['cache']))
    _, cache = prefill(TOKENS[:, :8])
    decode = jax.jit(lambda cache, t, i: model.apply({**params, **cache}, t, i, method='decode', mutable=['cache']))
    for index in [counts + step for step in range(16)]:
        features, cache = decode(cache, TOKENS[rows, index], index)
        assert_close(features[:, 0], expected[rows, index], 1e-5)
